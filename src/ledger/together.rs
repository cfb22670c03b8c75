//! Several operations as one command, with one entry: all of them, or none.
//!
//! They are decided in order, in memory, each on the facts as those before it left them; only when none has refused is anything
//! written. So a refusal needs nothing undone, and neighbours in the batch do not notice.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::PgConnection;

use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::hot::{At, Fact, Hot, HotKey, Rows};
use super::verbs::{Operation, Step, Verbs};
use super::{Command, Committed, Entry, Failure, Ledger, Outcome, Permit, Tx, segment};

/// The action of a transaction's entry.
pub const TX: &str = "ledger:tx";

/// What a transaction answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Together {
    /// The one index of all its changes.
    pub index: i64,
    /// Of each operation, in order, what its own route would have answered.
    pub results: Vec<Value>,
}

struct Transaction {
    steps: Vec<Box<dyn Step>>,
}

type Facts = HashMap<(&'static str, Vec<u8>), Fact>;

/// Reads facts, one statement a kind.
async fn learn(conn: &mut PgConnection, all: Vec<HotKey>) -> Result<Facts, sqlx::Error> {
    let mut wanted: Vec<(&'static dyn Hot, Vec<Vec<u8>>)> = Vec::new();
    for HotKey { kind, key } in all {
        match wanted.iter_mut().find(|(k, _)| k.name() == kind.name()) {
            Some((_, keys)) if keys.contains(&key) => {}
            Some((_, keys)) => keys.push(key),
            None => wanted.push((kind, vec![key])),
        }
    }
    let mut facts = Facts::new();
    for (kind, keys) in wanted {
        let found = kind.load(conn, &keys).await?;
        facts.extend(found.into_iter().map(|(key, fact)| ((kind.name(), key), fact)));
    }
    Ok(facts)
}

/// What an operation changed, as the entry of all lists it.
fn listed(entry: &mut Entry) -> Value {
    let mut one = Map::new();
    one.insert("action".to_owned(), entry.action.into());
    one.insert("resource".to_owned(), std::mem::take(&mut entry.resource).into());
    if !entry.change.is_empty() {
        one.insert("change".to_owned(), std::mem::take(&mut entry.change).into());
    }
    if let Some(reason) = entry.reason.take() {
        one.insert("reason".to_owned(), reason.into());
    }
    one.into()
}

/// The refusal of operation `i`.
fn of_operation(failure: Failure, i: usize) -> Failure {
    match failure {
        Failure::Refused(refusal) => Failure::Refused(refusal.under(&format!("/operations/{i}"))),
        database @ Failure::Database(_) => database,
    }
}

impl Command for Transaction {
    type Out = Together;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Together, Entry), Failure> {
        let at = tx.at();
        let decided_on = self.steps.iter().filter_map(|s| s.fact()).collect();
        let mut facts = learn(tx.read(), decided_on).await?;
        let mut all = Entry::ok(TX, format!("tx/{}", at.index));
        let (mut rows, mut results, mut list) = (Rows::default(), Vec::new(), Vec::new());
        for (i, step) in self.steps.iter_mut().enumerate() {
            let fact = step.fact().map(|HotKey { kind, key }| (kind, (kind.name(), key)));
            let known = fact.as_ref().and_then(|(_, key)| facts.get(key).cloned());
            let position = fact.as_ref().map_or(0, |(kind, _)| rows.of(*kind)) as i64;
            let decided = step.decide(tx.read(), known.as_ref(), At { position, ..at }).await;
            let decided = decided.map_err(|failure| of_operation(failure, i))?;
            if let Some((kind, key)) = fact {
                match decided.after {
                    Some(after) => facts.insert(key, after),
                    None => facts.remove(&key),
                };
                if let Some(row) = decided.row {
                    rows.push(kind, row);
                }
            }
            let mut entry = decided.entry;
            list.push(listed(&mut entry));
            all.touched.append(&mut entry.touched);
            all.signal = all.signal.or(entry.signal);
            all.segment = match (all.segment, entry.segment) {
                (Some(before), Some(more)) => Some(segment::joined(before, &more)),
                (before, more) => before.or(more),
            };
            results.push(decided.value);
        }
        rows.write(tx).await?;
        for step in &mut self.steps {
            step.write(tx).await?;
        }
        Ok((Together { index: at.index, results }, all.change("operations", list)))
    }
}

/// Which operation a refusal is of.
fn place(refusal: &Refusal) -> Option<usize> {
    let pointer = &refusal.errors().first()?.pointer;
    pointer.strip_prefix("/operations/")?.split('/').next()?.parse().ok()
}

impl Ledger {
    /// What can be combined: the verbs of all rooms, given once, at the start.
    pub fn combines(&self, verbs: Verbs) {
        verbs.iter().for_each(|v| self.0.shared.metrics.operations.with_label_values(&[v.name()]).reset());
        let _ = self.0.shared.verbs.set(verbs);
    }

    /// The verbs that can be combined.
    pub fn verbs(&self) -> Option<&Verbs> {
        self.0.shared.verbs.get()
    }

    /// Makes all operations, at one index and with one entry, or none.
    ///
    /// # Errors
    /// What the layers refuse, and what any of the operations does, with a pointer to it.
    pub async fn together(&self, caller: &Caller, operations: Vec<Operation>) -> Result<Committed<Together>, Refusal> {
        let (mut asks, mut first, mut steps, mut told) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for operation in operations {
            first.push(asks.len());
            asks.extend(operation.asks);
            steps.push(operation.step);
            told.push(operation.done);
        }
        match self.write(caller, &asks, Transaction { steps }).await {
            Ok(done) => {
                for ((i, told), value) in told.into_iter().enumerate().zip(&done.value.results) {
                    if !done.replayed {
                        told(value);
                        self.0.shared.metrics.operations.with_label_values(&[asks[first[i]].action]).inc();
                    }
                }
                Ok(done)
            }
            // The policy let it through and what it names did not (a token that is for another): a denial like any, and recorded.
            Err(refusal) if refusal.problem() == &problem::DENIED && refusal.index().is_none() => {
                let ask = place(&refusal).and_then(|i| asks.get(*first.get(i)?));
                let ask = ask.ok_or_else(|| Refusal::internal("a denial of no operation"))?;
                let mut entry = Entry::ok(ask.action, ask.resource()).outcome(Outcome::Denied);
                if let Some(id) = refusal.extra().get("id") {
                    entry = entry.change("id", id.clone());
                }
                let entry = entry.reason(refusal.detail().to_owned());
                let recorded = self.record(caller, Permit::granted(), entry).await?;
                Err(refusal.recorded_at(recorded.index))
            }
            Err(refusal) => Err(refusal),
        }
    }
}
