//! Checks: put, removed, and what becomes of their results.

use crate::kernel::{Refusal, problem};
use crate::ledger::{Command, Entry, Failure, Tx};

use super::incidents::{self, Here, Wrong};
use super::model::{Check, Kind, Spec, Status};
use super::store;

pub(super) fn absent(name: &str) -> Refusal {
    Refusal::not_found(format!("check {name}"))
}

/// What makes two incidents of a check the same.
pub(super) fn fingerprint(name: &str) -> String {
    format!("check/{name}")
}

/// Makes or changes a check. It begins anew: what was seen by the old one says nothing of the new.
pub(super) struct Put {
    pub name: String,
    pub spec: Spec,
}

#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Done {
    pub new: bool,
    pub check: Check,
}

impl Command for Put {
    type Out = Done;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Done, Entry), Failure> {
        let was = store::one(tx.read(), &self.name).await?;
        let (index, now) = (tx.index(), tx.now());
        let same = was.as_ref().filter(|w| w.spec == self.spec);
        let check = Check {
            name: self.name.clone(),
            spec: self.spec.clone(),
            status: same.map_or(Status::Unknown, |w| w.status),
            output: same.map_or_else(String::new, |w| w.output.clone()),
            since: same.map_or(now, |w| w.since),
            index,
            created_index: was.as_ref().map_or(index, |w| w.created_index),
            spec_index: index,
            beat: index,
        };
        store::put(tx.write(), &check).await?;
        let mut entry = Entry::ok("health:check-put", format!("check/{}", self.name))
            .change("interval_ms", (self.spec.interval * 1000.0) as i64);
        if let Some(target) = &self.spec.target {
            entry = entry.change("target", target.clone());
        }
        Ok((Done { new: was.is_none(), check }, entry))
    }
}

/// Removes a check; its incident is over with it.
pub(super) struct Remove {
    pub name: String,
    pub actor: String,
}

impl Command for Remove {
    type Out = Check;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Check, Entry), Failure> {
        let was = store::one(tx.read(), &self.name).await?.ok_or_else(|| absent(&self.name))?;
        let here = Here { index: tx.index(), now: tx.now(), actor: &self.actor };
        store::remove(tx.write(), &self.name).await?;
        incidents::resolve(tx.write(), &here, &fingerprint(&self.name), "the check was removed").await?;
        Ok((was, Entry::ok("health:check-delete", format!("check/{}", self.name))))
    }
}

/// Says how a check is from now on, and opens or ends its incident in the same commit.
pub(super) struct SetStatus {
    pub name: String,
    /// The check as it was when it was looked at; `None`: whichever is there (a report of its owner).
    pub spec_index: Option<i64>,
    /// The report it was last seen at, if its silence is the result.
    pub silent_since: Option<i64>,
    pub status: Status,
    pub output: String,
    pub actor: String,
}

impl Command for SetStatus {
    type Out = Check;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Check, Entry), Failure> {
        let mut check = store::one(tx.read(), &self.name).await?.ok_or_else(|| absent(&self.name))?;
        let other = self.spec_index.is_some_and(|i| i != check.spec_index);
        if other || self.silent_since.is_some_and(|b| b != check.beat) {
            return Err(Refusal::new(&problem::CONFLICT, "the check is not the one that was looked at").into());
        }
        if self.spec_index.is_none() && check.spec.kind != Kind::Ttl {
            return Err(Refusal::new(&problem::CONFLICT, "only a ttl check is reported").into());
        }
        let (index, now) = (tx.index(), tx.now());
        let here = Here { index, now, actor: &self.actor };
        let (before, flipped) = (check.status, check.status != self.status);
        if !flipped && self.spec_index.is_some() {
            return Err(Refusal::new(&problem::CONFLICT, "the check is like that already").into());
        }
        check.status = self.status;
        check.output.clone_from(&self.output);
        check.index = index;
        if flipped {
            check.since = now;
        }
        if self.silent_since.is_none() {
            check.beat = index;
        }
        store::put(tx.write(), &check).await?;
        let print = fingerprint(&self.name);
        match self.status {
            Status::Critical if flipped => {
                let summary = format!("check {} is critical: {}", self.name, self.output);
                let wrong = Wrong {
                    fingerprint: &print,
                    severity: check.spec.severity.as_str(),
                    summary: &summary,
                    service: check.spec.service.as_deref(),
                };
                incidents::open(tx.write(), &here, &wrong).await?;
            }
            Status::Passing => {
                incidents::resolve(tx.write(), &here, &print, &format!("it passes again: {}", self.output)).await?;
            }
            _ => {}
        }
        let entry = Entry::ok("health:status", format!("check/{}", self.name))
            .change("from", before.as_str())
            .change("to", self.status.as_str())
            .reason(self.output.clone());
        Ok((check, entry))
    }
}

/// Reports that change nothing anyone can see, as one entry (rule 18).
pub(super) struct Reports(pub Vec<(String, String)>);

impl Command for Reports {
    type Out = Vec<String>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Vec<String>, Entry), Failure> {
        let names: Vec<&str> = self.0.iter().map(|(name, _)| name.as_str()).collect();
        let index = tx.index();
        let found = store::beat(tx.write(), &names, index).await?;
        let reports: Vec<String> = self.0.iter().map(|(name, actor)| format!("{name} by {actor}")).collect();
        Ok((found, Entry::ok("health:report", "checks").change("reports", reports)))
    }
}
