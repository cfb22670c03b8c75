//! What is in force, and the commands that change it: to activate and to roll back, canaries, the shipped bundle.

use std::sync::Arc;

use crate::kernel::{Refusal, problem};
use crate::ledger::{AUTHZ, Command, Entry, Failure, Touch, Tx};

use super::IN_FORCE;
use super::bundles::{Create, Ruling};
use super::compiled::Compiled;
use super::proposals::Approved;
use super::store::bundles::{self as rows, Bundle, InForce, Text};
use super::store::shadows;

/// Where to.
pub(super) enum Target {
    Bundle(String),
    Previous,
}

/// Brings a bundle into force.
pub(super) struct Enforce {
    pub to: Target,
    pub approved: Approved,
    pub reason: Option<String>,
    pub actor: String,
    pub forced: bool,
}

impl Enforce {
    async fn target(&self, tx: &mut Tx<'_>, now: &InForce) -> Result<Option<Bundle>, Failure> {
        let id = match &self.to {
            Target::Bundle(id) => Some(id.clone()),
            Target::Previous => rows::before(tx.read(), now)
                .await?
                .ok_or_else(|| Refusal::new(&problem::CONFLICT, "no other bundle was in force before"))?,
        };
        let Some(id) = id else { return Ok(None) };
        let found = rows::one(tx.read(), &id).await?;
        Ok(Some(found.ok_or_else(|| Refusal::not_found(format!("bundle {id}")))?))
    }
}

impl Command for Enforce {
    type Out = Ruling;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Ruling, Entry), Failure> {
        let back = self.reason.is_some();
        let was = current(tx).await?;
        let target = self.target(tx, &was).await?;
        let mut now = InForce { index: tx.index(), canary: None, percent: 0.0, stop_at: 100.0, ..was.clone() };
        let replaced = match &target {
            Some(b) if b.scope == "system" => Some(std::mem::replace(&mut now.system, b.id.clone())),
            Some(b) => now.application.replace(b.id.clone()),
            None => now.application.take(),
        };
        let id = target.as_ref().map(|b| b.id.clone());
        if replaced == id {
            let detail = format!("bundle {} is in force", id.unwrap_or_default());
            return Err(Refusal::new(&problem::CONFLICT, detail).into());
        }
        let proposal = self.approved.check(tx).await?;
        let (index, time) = (tx.index(), tx.now());
        if let Some(old) = &replaced {
            rows::set_status(tx.write(), old, "retired", index).await?;
        }
        if let Some(canary) = &was.canary {
            rows::rest(tx.write(), canary, index).await?;
        }
        if let Some(id) = &id {
            shadows::end(tx.write(), id, index).await?;
            rows::set_status(tx.write(), id, "active", index).await?;
        }
        let action = if back { "governance:rollback" } else { "governance:activate" };
        rows::enforce(tx.write(), &now, action, &self.actor, time).await?;
        let named = id.clone().unwrap_or_else(|| "none".to_owned());
        let mut entry = Entry::ok(action, format!("bundle/{named}"))
            .change("replaced", replaced.unwrap_or_else(|| "none".to_owned()))
            .touch(Touch::key(AUTHZ, IN_FORCE));
        if let Some(reason) = &self.reason {
            entry = entry.reason(reason.clone()).signal("warning", format!("governance-rollback/{named}"));
        }
        if self.forced {
            entry = entry.change("forced", true).signal("critical", format!("governance-forced/{named}"));
        }
        let entry = self.approved.spend(tx, proposal, entry).await?;
        Ok((now.into(), entry))
    }
}

/// What is in force, as the command that changes it finds it.
async fn current(tx: &mut Tx<'_>) -> Result<InForce, Failure> {
    let now = rows::in_force_at(tx.read(), i64::MAX).await?;
    Ok(now.ok_or_else(|| Refusal::unavailable("no bundle is in force yet; ask again"))?)
}

/// Lets a bundle decide for some.
pub(super) struct SetCanary {
    pub id: String,
    pub percent: f64,
    pub stop_at: f64,
    pub actor: String,
    /// Why it was stopped, where nobody asked for it.
    pub reason: Option<String>,
    /// Only if nothing else came into force since this index.
    pub since: Option<i64>,
}

impl Command for SetCanary {
    type Out = Ruling;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Ruling, Entry), Failure> {
        let was = current(tx).await?;
        if self.since.is_some_and(|since| since != was.index) {
            return Err(Refusal::new(&problem::CONFLICT, "something else has come into force since").into());
        }
        let on = self.percent > 0.0;
        if !on && was.canary.as_ref() != Some(&self.id) {
            return Err(Refusal::new(&problem::CONFLICT, format!("bundle {} is no canary", self.id)).into());
        }
        if was.application.as_ref() == Some(&self.id) {
            return Err(
                Refusal::new(&problem::CONFLICT, format!("bundle {} is in force for everybody", self.id)).into()
            );
        }
        let (index, time) = (tx.index(), tx.now());
        let (canary, percent, stop_at) = (on.then(|| self.id.clone()), self.percent, self.stop_at);
        let now = InForce { index, canary, percent, stop_at, ..was.clone() };
        if let Some(old) = was.canary.filter(|old| *old != self.id || !on) {
            rows::rest(tx.write(), &old, index).await?;
        }
        if on {
            shadows::end(tx.write(), &self.id, index).await?;
            rows::set_status(tx.write(), &self.id, "canary", index).await?;
        }
        rows::enforce(tx.write(), &now, "governance:canary", &self.actor, time).await?;
        let mut entry = Entry::ok("governance:canary", format!("bundle/{}", self.id))
            .change("percent", self.percent.to_string())
            .change("stop_at", self.stop_at.to_string())
            .touch(Touch::key(AUTHZ, IN_FORCE));
        if let Some(reason) = &self.reason {
            entry = entry.reason(reason.clone()).signal("warning", format!("governance-canary/{}", self.id));
        }
        Ok((now.into(), entry))
    }
}

/// The number of the shipped bundle: a higher one replaces a lower one, where no operator's bundle does.
const SHIPPED: i32 = 2;

/// Keeps the shipped bundle, and brings it into force where none is, or an older shipped one.
pub(super) struct Ship(pub Arc<Compiled>);

impl Ship {
    /// Whether there is anything to do.
    async fn wanted(&self, tx: &mut Tx<'_>) -> Result<Option<InForce>, Failure> {
        let now = rows::in_force_at(tx.read(), i64::MAX).await?;
        let Some(now) = now else {
            let application = None;
            let (canary, percent, stop_at) = (None, 0.0, 100.0);
            return Ok(Some(InForce { index: 0, system: self.0.id.clone(), application, canary, percent, stop_at }));
        };
        let ruling = rows::one(tx.read(), &now.system).await?;
        let older = ruling.and_then(|b| b.shipped).is_some_and(|n| n < SHIPPED);
        Ok((older && now.system != self.0.id).then_some(InForce { system: self.0.id.clone(), ..now }))
    }
}

impl Command for Ship {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let wanted = self.wanted(tx).await?;
        let mut now = wanted.ok_or_else(|| Refusal::new(&problem::CONFLICT, "a system bundle is in force"))?;
        let (index, time) = (tx.index(), tx.now());
        let known = rows::one(tx.read(), &self.0.id).await?.is_some();
        if !known {
            let text = Text { policies: super::compiled::SYSTEM.into(), schema: None, tests: None };
            let create = Create {
                id: self.0.id.clone(),
                scope: "system",
                note: "shipped".to_owned(),
                author: "daemon:governance".to_owned(),
                validated: true,
                count: i32::try_from(self.0.len()).unwrap_or(i32::MAX),
                shipped: Some(SHIPPED),
                text,
            };
            let row = create.row(tx);
            rows::put(tx.write(), &row, &create.text).await?;
        }
        now.index = index;
        if let Some(was) = rows::in_force_at(tx.read(), i64::MAX).await? {
            rows::set_status(tx.write(), &was.system, "retired", index).await?;
        }
        rows::set_status(tx.write(), &self.0.id, "active", index).await?;
        rows::enforce(tx.write(), &now, "governance:activate", "daemon:governance", time).await?;
        let entry = Entry::ok("governance:activate", format!("bundle/{}", self.0.id))
            .change("shipped", SHIPPED)
            .touch(Touch::key(AUTHZ, IN_FORCE));
        Ok(((), entry))
    }
}
