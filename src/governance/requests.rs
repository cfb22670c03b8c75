//! Four eyes for any change of any room. A request that the policy lets through only once others have approved is proposed by
//! sending it with `Sop-Propose: REASON`, and made by sending the same again with `Sop-Proposal: ID`.
//!
//! Which requests those are is policy, as everywhere; what is approved is the digest of method, path, query, media type, the header fields that say what is to be done, and body.
//! The proposal is used up in the commit of the change: the ledger asks for that, whatever the command.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller, Permit, Proposing, Voiced};
use crate::kernel::{BoxFuture, Refusal, problem};
use crate::ledger::entry::canonical;
use crate::ledger::{Approvals, Failure, Tx};

use super::Governance;
use super::needs::{self, Requirement};
use super::proposals::Wanted;
use super::store::proposals as rows;

/// Uses up approved proposals, in the commit of what they are for.
pub(super) struct Spend;

impl Approvals for Spend {
    fn check<'a>(&'a self, tx: &'a mut Tx<'_>, proposal: Uuid) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let now = tx.now();
            let found = rows::one(tx.read(), proposal).await?;
            if found.is_some_and(|p| p.status == "approved" && p.expires > now) {
                return Ok(());
            }
            Err(Refusal::new(&problem::NOT_APPROVED, "the proposal was used, withdrawn or has expired").into())
        })
    }

    fn spend<'a>(&'a self, tx: &'a mut Tx<'_>, proposal: Uuid) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move {
            let found = rows::one(tx.read(), proposal).await?;
            let mut p = found.ok_or(Failure::Database(sqlx::Error::RowNotFound))?;
            (p.status, p.index, p.applied) = ("applied".to_owned(), tx.index(), Some(tx.index()));
            rows::update(tx.write(), &p).await?;
            Ok(())
        })
    }
}

impl Governance {
    /// A request was denied: where the approval of others would let it through, it is proposed, or was approved, or the denial
    /// says what it waits for.
    ///
    /// # Errors
    /// 202 `proposed` with the proposal.
    pub async fn four_eyes(&self, caller: &Caller, asks: &[Ask], denied: Permit, at: i64) -> Result<Permit, Refusal> {
        if matches!(&*caller.request().method, "GET" | "HEAD") {
            return Ok(denied);
        }
        let mut need: Option<Requirement> = None;
        let mut first = None;
        for ask in asks {
            match self.rules.requirement(caller, ask)? {
                Some(more) => {
                    first = first.or(Some(ask));
                    need = Some(need.map_or(more.clone(), |need| need.and(more)));
                }
                None if self.rules.allows(caller, ask)? => {}
                None => return Ok(denied),
            }
        }
        let (Some(need), Some(first)) = (need, first) else { return Ok(denied) };
        match caller.request().proposing.as_deref() {
            None => Ok(waits(denied, first, &need)),
            Some(Proposing { voiced: Voiced::Approved(id), digest, .. }) => {
                let mut conn = self.connection().await?;
                let found = rows::one(&mut conn, *id).await.map_err(|e| self.store.refusal(e))?;
                // One that was used is looked at again in the commit: a retry hears there what came of it the first time.
                let now = self.rules.clock.now();
                let stands = found.filter(|p| p.status == "applied" || (p.status == "approved" && p.expires > now));
                if !stands.is_some_and(|p| p.change[..] == digest[..] && p.kind == "request" && need.met_by(&p.needs)) {
                    return Ok(waits(denied, first, &need));
                }
                let asks: Vec<Ask> = asks.iter().map(|ask| ask.clone().with("approved", true)).collect();
                let mut permit = self.rules.decide(caller, &asks, at)?;
                permit.proposal = Some(*id);
                Ok(permit)
            }
            Some(proposing) => Err(self.propose_request(caller, first, need, proposing).await?),
        }
    }

    async fn propose_request(
        &self,
        caller: &Caller,
        ask: &Ask,
        need: Requirement,
        proposing: &Proposing,
    ) -> Result<Refusal, Refusal> {
        let Voiced::Propose(reason) = &proposing.voiced else { return Err(Refusal::internal("nothing is proposed")) };
        let wanted = Wanted {
            kind: "request",
            ask: ask.clone(),
            body: Some(shown(caller, proposing)),
            reason: reason.clone(),
            also: None,
        };
        let waits_for = need.said();
        let done = self.propose_change(&caller.unvoiced(), wanted, need, &proposing.digest).await?;
        let (id, index) = (done.value.id.clone(), done.index);
        let detail = format!("proposal {id} waits for {waits_for} to approve it");
        let proposal = serde_json::to_value(done.value).map_err(Refusal::internal)?;
        Ok(Refusal::new(&problem::PROPOSED, detail)
            .with("proposal", proposal)
            .with_header("location", format!("/v1/governance/proposals/{id}"))
            .recorded_at(index))
    }
}

/// A denial that others can lift.
fn waits(denied: Permit, ask: &Ask, need: &Requirement) -> Permit {
    let detail = format!(
        "{} on {} waits for {} to approve it: send it with `Sop-Propose: REASON` to propose it, and with `Sop-Proposal: ID` once it is approved",
        ask.action,
        ask.resource(),
        need.said()
    );
    let waits = Refusal::new(&problem::NOT_APPROVED, detail).with("required", needs::required(&need.needs));
    Permit { waits: Some(waits), ..denied }
}

/// The request, as those who are to approve it see it.
fn shown(caller: &Caller, proposing: &Proposing) -> Vec<u8> {
    let request = caller.request();
    let mut m = Map::new();
    m.insert("method".into(), request.method.clone().into());
    m.insert("path".into(), request.path.clone().into());
    for (name, value) in [("query", &proposing.query), ("content_type", &proposing.content_type)] {
        if !value.is_empty() {
            m.insert(name.into(), value.clone().into());
        }
    }
    if !proposing.fields.is_empty() {
        let fields = proposing.fields.iter().map(|(name, value)| (name.clone(), Value::from(value.as_str())));
        m.insert("headers".into(), Value::Object(fields.collect()));
    }
    match std::str::from_utf8(&proposing.body) {
        Ok("") => {}
        Ok(text) => drop(m.insert("body".into(), text.into())),
        Err(_) => drop(m.insert("body_base64".into(), STANDARD.encode(&proposing.body).into())),
    }
    canonical(&Value::Object(m))
}
