//! Proposals and four eyes: changes that wait until others have approved them.
//!
//! Which changes wait, and for whom, is policy: a `forbid` that carries `@approvals` and lifts when `context.approved` is set. A
//! change that such policies alone forbid may be proposed; what is approved is the digest of exactly that change, and whoever
//! may do it does it, once.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::kernel::crypto::{self, Hash};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Refusal, Timestamp, ids, problem};
use crate::ledger::{Command, Committed, Entry, Failure, Tx};

use super::Governance;
use super::needs::{self, Need, Requirement};
use super::store::proposals::{self as rows, Proposal, Voice};
use super::voices::{Expire, Speak, Voicing};

/// Proposals of one author that may be pending.
const PENDING: i64 = 100;

/// The digest of a change: what is approved is this and nothing else.
pub(super) fn change_of(action: &str, target: &str, body: &[u8]) -> Hash {
    let body = crypto::base64(body);
    crypto::hash_tuple([action, target, &body])
}

/// One voice, as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Approval)]
pub struct ShownVoice {
    /// Who
    pub by: String,
    /// For or against
    pub approves: bool,
    /// Of another team than the author's
    pub outside: bool,
    /// Why
    pub reason: String,
    /// When
    #[schema(value_type = String)]
    pub at: Timestamp,
    /// Its entry
    pub index: i64,
}

/// A proposal as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Proposal)]
pub struct Shown {
    /// Its id
    pub id: String,
    /// `bundle`, `entity` or `request`
    pub kind: String,
    /// What is proposed: `governance:activate`, ...
    pub action: String,
    /// To what: the bundle's id, the entity's `type/id`
    pub target: String,
    /// What it would be, where the target does not say
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Object)]
    pub body: Option<Value>,
    /// Who proposed it
    pub author: String,
    /// Why
    pub reason: String,
    /// Approvals it needs at least
    pub required: i32,
    /// The role whose approvals count, where it is one
    pub role: Option<String>,
    /// How many of them must be of another team than the author's
    pub outside: i32,
    /// What each policy wants; all of it has to be met
    #[serde(default)]
    pub needs: Vec<Need>,
    /// Who approved or rejected it
    pub approvals: Vec<ShownVoice>,
    /// `pending`, `approved`, `rejected`, `expired`, `withdrawn` or `applied`
    pub status: String,
    /// Who did without the approvals, in an emergency
    pub overridden_by: Option<String>,
    /// Who looked at that afterwards
    pub reviewed_by: Option<String>,
    /// When it ends
    #[schema(value_type = String)]
    pub expires_at: Timestamp,
    /// When it was made
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// Index of its last change
    pub index: i64,
    /// Index of the change, once it was made
    pub applied_index: Option<i64>,
}

impl Shown {
    pub(super) fn of(p: Proposal, voices: Vec<Voice>, now: Timestamp) -> Self {
        let open = matches!(p.status.as_str(), "pending" | "approved");
        let status = if open && p.expires <= now { "expired".to_owned() } else { p.status };
        let voice = |v: Voice| ShownVoice {
            by: v.approver,
            approves: v.approves,
            outside: v.outside,
            reason: v.reason,
            at: v.time,
            index: v.index,
        };
        Self {
            id: p.id.to_string(),
            kind: p.kind,
            action: p.action,
            target: p.target,
            body: p.body.and_then(|b| serde_json::from_slice(&b).ok()),
            author: p.author,
            reason: p.reason,
            required: needs::required(&p.needs),
            role: needs::role(&p.needs).cloned(),
            outside: needs::outside(&p.needs),
            needs: p.needs,
            approvals: voices.into_iter().map(voice).collect(),
            status,
            overridden_by: p.overridden,
            reviewed_by: p.reviewed,
            expires_at: p.expires,
            created_at: p.time,
            index: p.index,
            applied_index: p.applied,
        }
    }
}

/// What is proposed.
pub(super) struct Wanted {
    pub kind: &'static str,
    pub ask: Ask,
    pub body: Option<Vec<u8>>,
    pub reason: String,
    /// Who else may not approve it.
    pub also: Option<String>,
}

impl Governance {
    /// The question with `approved` in it, and the proposal that allows it, where the policy wants others to approve. Without one
    /// the question stays as it is: what it waits for is said by whoever decides it.
    ///
    /// # Errors
    /// 503 when the store is away.
    pub(super) async fn approved(&self, caller: &Caller, ask: Ask, change: &Hash) -> Result<(Ask, Approved), Refusal> {
        let Some(need) = self.rules.requirement(caller, &ask)? else { return Ok((ask, Approved::none())) };
        let mut conn = self.connection().await?;
        let now = self.rules.clock.now();
        let found = rows::approved(&mut conn, change, now).await.map_err(|e| self.store.refusal(e))?;
        Ok(match found.into_iter().find(|p| need.met_by(&p.needs)) {
            Some(p) => (ask.with("approved", true), Approved(Some(p.id))),
            None => (ask, Approved::none()),
        })
    }

    /// Proposes a change of this room.
    pub(super) async fn propose(&self, caller: &Caller, wanted: Wanted) -> Result<Committed<Shown>, Refusal> {
        let need = self.rules.requirement(caller, &wanted.ask)?.unwrap_or_default();
        let change = change_of(wanted.ask.action, &wanted.ask.name, wanted.body.as_deref().unwrap_or_default());
        self.propose_change(caller, wanted, need, &change).await
    }

    /// Proposes the change of this digest.
    pub(super) async fn propose_change(
        &self,
        caller: &Caller,
        wanted: Wanted,
        need: Requirement,
        change: &Hash,
    ) -> Result<Committed<Shown>, Refusal> {
        let Wanted { kind, ask, body, reason, also } = wanted;
        let mut authors = vec![caller.actor().to_owned()];
        authors.extend(also.filter(|a| a != caller.actor()));
        let now = self.rules.clock.now();
        let proposal = Proposal {
            id: ids::new_id(now),
            kind: kind.to_owned(),
            action: ask.action.to_owned(),
            target: ask.name.clone(),
            change: change.to_vec(),
            body,
            author: caller.actor().to_owned(),
            authors,
            reason,
            needs: need.needs,
            status: "pending".to_owned(),
            overridden: None,
            reviewed: None,
            created: 0,
            time: now,
            expires: now.plus(need.within),
            index: 0,
            applied: None,
        };
        let may = Ask::new("governance:propose", "Proposal", ask.resource());
        self.ledger.write(caller, &[may], Propose(proposal)).await
    }

    /// One proposal.
    pub(super) async fn proposal(&self, caller: &Caller, id: Uuid) -> Result<Shown, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:proposal-read", "Proposal", id.to_string())]).await?;
        let mut conn = self.connection().await?;
        let row = rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        let row = row.ok_or_else(|| Refusal::not_found(format!("proposal {id}")))?;
        let voices = rows::voices(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        Ok(Shown::of(row, voices, self.rules.clock.now()))
    }

    /// Proposals, newest first.
    pub(super) async fn proposals(
        &self,
        caller: &Caller,
        status: Option<&str>,
        unreviewed: bool,
        before: i64,
        limit: usize,
    ) -> Result<Vec<(i64, Shown)>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:proposal-read", "Proposal", "")]).await?;
        let mut conn = self.connection().await?;
        let limit = i64::try_from(limit).unwrap_or(1000);
        // Without bodies: a thousand of them are a gigabyte.
        let page = rows::page(&mut conn, before, status, unreviewed, limit).await.map_err(|e| self.store.refusal(e))?;
        let (now, mut shown) = (self.rules.clock.now(), Vec::new());
        for row in page {
            let voices = rows::voices(&mut conn, row.id).await.map_err(|e| self.store.refusal(e))?;
            shown.push((row.created, Shown::of(row, voices, now)));
        }
        Ok(shown)
    }

    /// Approves, rejects, withdraws, overrides or reviews.
    pub(super) async fn speak(
        &self,
        caller: &Caller,
        id: Uuid,
        what: Voicing,
        reason: String,
    ) -> Result<Committed<Shown>, Refusal> {
        let mut conn = self.connection().await?;
        let row = rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        drop(conn);
        let own = row.is_some_and(|p| p.authors.iter().any(|a| a == caller.actor()));
        let mut ask = Ask::new(what.action(), "Proposal", id.to_string());
        if own {
            ask = ask.with("own", true);
        }
        let roles = self.rules.roles(caller.principal());
        let team = self.rules.team(caller.principal());
        let command = Speak { id, what, reason, by: caller.actor().to_owned(), roles, team, rules: self.rules.clone() };
        self.ledger.write(caller, &[ask], command).await
    }

    /// Ends proposals that are past their time.
    pub(super) async fn expire(&self) -> Result<(), Refusal> {
        let mut conn = self.connection().await?;
        let past = rows::past(&mut conn, self.rules.clock.now()).await.map_err(|e| self.store.refusal(e))?;
        drop(conn);
        for id in past {
            match self.ledger.write(&Caller::daemon("governance"), &[], Expire(id)).await {
                Err(r) if r.problem() != &problem::CONFLICT => return Err(r),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The proposal that a change rests on, if it needs one.
pub(super) struct Approved(Option<Uuid>);

impl Approved {
    /// The change needs none.
    pub const fn none() -> Self {
        Self(None)
    }

    /// Looks whether it still stands, before anything is written.
    pub async fn check(&self, tx: &mut Tx<'_>) -> Result<Option<Proposal>, Failure> {
        let Some(id) = self.0 else { return Ok(None) };
        let found = rows::one(tx.read(), id).await?.filter(|p| p.status == "approved" && p.expires > tx.now());
        let gone = || Refusal::new(&problem::NOT_APPROVED, "the proposal was used, withdrawn or has expired");
        Ok(Some(found.ok_or_else(gone)?))
    }

    /// Uses it up, in the commit of the change.
    pub async fn spend(&self, tx: &mut Tx<'_>, proposal: Option<Proposal>, entry: Entry) -> Result<Entry, Failure> {
        let Some(mut p) = proposal else { return Ok(entry) };
        p.status = "applied".to_owned();
        p.index = tx.index();
        p.applied = Some(tx.index());
        rows::update(tx.write(), &p).await?;
        Ok(entry.change("proposal", p.id.to_string()))
    }
}

struct Propose(Proposal);

impl Command for Propose {
    type Out = Shown;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Shown, Entry), Failure> {
        let p = &mut self.0;
        if rows::pending(tx.read(), &p.author).await? >= PENDING {
            let detail = format!("{PENDING} proposals of yours are pending; withdraw some of them");
            return Err(Refusal::new(&problem::CONFLICT, detail).into());
        }
        (p.created, p.index, p.time) = (tx.index(), tx.index(), tx.now());
        rows::put(tx.write(), p).await?;
        let entry = Entry::ok("governance:propose", format!("proposal/{}", p.id))
            .reason(p.reason.clone())
            .change("action", p.action.clone())
            .change("target", p.target.clone())
            .change("change", crypto::base64(&p.change))
            .change("required", needs::required(&p.needs));
        Ok((Shown::of(p.clone(), Vec::new(), p.time), entry))
    }
}

/// An entity's change as a proposal has it.
pub(super) fn entity_body(attrs: &Map<String, Value>, parents: &[crate::kernel::web::EntityName]) -> Vec<u8> {
    crate::ledger::entry::canonical(&json!({"attrs": attrs, "parents": parents}))
}
