//! Replay: what a bundle would have decided, over decisions that were really made, each with the entities of its index and the
//! other bundle of its time.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::kernel::web::{Ask, Caller, EntityName};
use crate::kernel::{Refusal, problem};

use super::engine::Force;
use super::past::{self, Past};
use super::rules::{self, Entities};
use super::snapshot::{self, Held, Slice};
use super::store::decisions as rows;
use super::{Governance, snapshot::read};

/// Decisions read where no limit is given.
const READ: usize = 50_000;
/// How long one answer is worked at; `next` says where to go on.
const PATIENCE: Duration = Duration::from_secs(4);
/// Entries read at a time.
const STEP: i64 = 256;
/// Flips listed in one answer; all are counted, and grouped.
const LISTED: usize = 1000;
/// How far before its segment a decision can have been made, in indexes: what was undone of the entities is kept so long.
const BEHIND: i64 = 20_000;

/// The entities of an index, and how they were a little before.
#[derive(Default)]
pub(super) struct History {
    entities: HashMap<EntityName, Held>,
    index: i64,
    /// What each change replaced, the newest last.
    undone: VecDeque<(i64, EntityName, Option<Held>)>,
}

impl History {
    fn apply(&mut self, index: i64, name: EntityName, now: Option<Held>) {
        let was = match now {
            Some(held) => self.entities.insert(name.clone(), held),
            None => self.entities.remove(&name),
        };
        self.undone.push_back((index, name, was));
        while self.undone.front().is_some_and(|(i, _, _)| *i < index - BEHIND) {
            self.undone.pop_front();
        }
    }

    /// As it was at an index not after this one.
    fn at(&self, index: i64) -> View<'_> {
        let mut then = HashMap::new();
        for (changed, name, was) in self.undone.iter().rev() {
            if *changed <= index {
                break;
            }
            then.insert(name.clone(), was.clone());
        }
        View { history: self, then, index }
    }
}

/// The entities of one moment.
struct View<'a> {
    history: &'a History,
    then: HashMap<EntityName, Option<Held>>,
    index: i64,
}

impl Entities for View<'_> {
    fn held(&self, name: &EntityName) -> Option<Held> {
        match self.then.get(name) {
            Some(then) => then.clone(),
            None => self.history.entities.get(name).cloned(),
        }
    }

    fn slice(&self, roots: &[&EntityName], given: &HashMap<EntityName, Held>) -> Result<Slice, Refusal> {
        snapshot::slice(|name| given.get(name).cloned().or_else(|| self.held(name)), self.index, roots)
    }
}

/// A decision that would be another.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Flip {
    /// The decision
    pub decision_id: String,
    /// Its entry
    pub index: i64,
    /// As it was
    pub before: bool,
    /// As it would have been
    pub after: bool,
    /// About whom
    #[schema(value_type = Object)]
    pub subject: EntityName,
    /// To do what
    pub action: String,
    /// To what
    #[schema(value_type = Object)]
    pub resource: EntityName,
    /// The policies that determined it
    pub policies_before: Vec<String>,
    /// Those that would have
    pub policies_after: Vec<String>,
}

/// How many flips there are of each policy, subject and action.
#[derive(Clone, Debug, Default, Serialize, utoipa::ToSchema)]
pub struct Groups {
    /// By policy: those that determined it before and would not have, or the other way round
    pub policy: BTreeMap<String, u64>,
    /// By subject, `Type::id`
    pub subject: BTreeMap<String, u64>,
    /// By action
    pub action: BTreeMap<String, u64>,
}

impl Groups {
    fn count(&mut self, flip: &Flip) {
        let (before, after) = (&flip.policies_before, &flip.policies_after);
        let changed = before.iter().filter(|p| !after.contains(p)).chain(after.iter().filter(|p| !before.contains(p)));
        for policy in changed {
            *self.policy.entry(policy.clone()).or_default() += 1;
        }
        *self.subject.entry(format!("{}::{}", flip.subject.kind, flip.subject.id)).or_default() += 1;
        *self.action.entry(flip.action.clone()).or_default() += 1;
    }
}

/// What a replay found.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Replay {
    /// The bundle that was tried
    pub bundle: String,
    /// From this index
    pub from: i64,
    /// To this index
    pub to: i64,
    /// The index that was reached
    pub reached: i64,
    /// Decisions that were decided again
    pub read: u64,
    /// Those whose record does not have all of what was asked; they were left out
    pub skipped: u64,
    /// How many would be other ones
    pub changed: u64,
    /// The first of them
    pub flips: Vec<Flip>,
    /// All of them, counted
    pub groups: Groups,
    /// Where to go on; `null` at the end
    pub next: Option<String>,
}

/// From where to where, and how many.
#[derive(Clone, Debug, Default)]
pub(super) struct Range {
    pub from: i64,
    pub to: Option<i64>,
    pub limit: Option<usize>,
    /// Where an earlier answer ended.
    pub after: Option<(i64, usize)>,
}

impl Governance {
    /// Decides recorded decisions again with another bundle.
    pub(super) async fn replay(&self, caller: &Caller, id: &str, range: Range) -> Result<Replay, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:decision-read", "Bundle", id)]).await?;
        let (row, _) = self.open(id).await?;
        let head = self.ledger.index();
        let to = range.to.unwrap_or(head).min(head);
        if range.from > head {
            return Err(Refusal::new(&problem::BEYOND_HEAD, format!("the newest index is {head}")));
        }
        let mut run = Run::new(id, range.from, to, range.limit.unwrap_or(READ), range.after);
        let began = self.rules.clock.elapsed();
        let mut from = range.after.map_or(range.from, |(index, _)| index);
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let start = (from - BEHIND).max(0);
        run.history.index = start;
        let all = rows::all_at(&mut conn, start).await.map_err(refusal)?;
        run.history.entities = all.into_iter().filter_map(read).collect();
        while from <= to && run.next.is_none() {
            let until = (from + STEP - 1).min(to);
            let changes = rows::changes(&mut conn, run.history.index, until).await.map_err(refusal)?;
            for (index, name, row) in changes {
                run.history.apply(index, name, row.and_then(read).map(|(_, held)| held));
            }
            run.history.index = until;
            let entries = rows::between(&mut conn, from, until).await.map_err(refusal)?;
            for past in entries.iter().flat_map(past::of_entry) {
                if let Entry::Vacant(slot) = run.forces.entry(past.bundles.clone()) {
                    let others = self.others(&past.bundles, &row.scope).await?;
                    slot.insert(self.force_of(&others, Some(id)).await?);
                }
            }
            tokio::task::block_in_place(|| entries.iter().flat_map(past::of_entry).for_each(|p| run.again(p)));
            run.done.reached = until;
            from = until + 1;
            if self.rules.clock.elapsed().saturating_sub(began) > PATIENCE && from <= to && run.next.is_none() {
                run.next = Some((from, 0));
            }
        }
        run.done.next = run.next.map(|place| crate::kernel::web::cursor::encode(&place));
        Ok(run.done)
    }

    /// The bundles of a decision but for the one of this scope.
    async fn others(&self, ids: &[String], scope: &str) -> Result<Vec<String>, Refusal> {
        let mut others = Vec::new();
        for id in ids {
            if self.open(id).await?.0.scope != scope {
                others.push(id.clone());
            }
        }
        Ok(others)
    }
}

/// A replay on its way.
struct Run {
    done: Replay,
    limit: usize,
    after: Option<(i64, usize)>,
    next: Option<(i64, usize)>,
    history: History,
    forces: HashMap<Vec<String>, Arc<Force>>,
}

impl Run {
    fn new(id: &str, from: i64, to: i64, limit: usize, after: Option<(i64, usize)>) -> Self {
        let done = Replay {
            bundle: id.to_owned(),
            from,
            to,
            reached: from,
            read: 0,
            skipped: 0,
            changed: 0,
            flips: Vec::new(),
            groups: Groups::default(),
            next: None,
        };
        Self { done, limit, after, next: None, history: History::default(), forces: HashMap::new() }
    }

    fn again(&mut self, past: Past) {
        let place = (past.index, past.position.unwrap_or(0));
        if self.next.is_some() || self.after.is_some_and(|after| place < after) {
            return;
        }
        if self.done.read as usize >= self.limit {
            self.next = Some(place);
            return;
        }
        self.done.read += 1;
        let (Some(asked), Some(force)) = (&past.asked, self.forces.get(&past.bundles)) else {
            self.done.skipped += 1;
            return;
        };
        let Ok(evaluated) = rules::evaluate(force, &self.history.at(past.at), asked) else {
            self.done.skipped += 1;
            return;
        };
        if evaluated.answered.allowed == past.allowed {
            return;
        }
        self.done.changed += 1;
        let flip = Flip {
            decision_id: past.id,
            index: past.index,
            before: past.allowed,
            after: evaluated.answered.allowed,
            subject: asked.subject.name.clone(),
            action: asked.action.0.clone(),
            resource: asked.resource.name.clone(),
            policies_before: past.policies,
            policies_after: evaluated.answered.policies,
        };
        self.done.groups.count(&flip);
        if self.done.flips.len() < LISTED {
            self.done.flips.push(flip);
        }
    }
}
