//! What is said to a proposal, by whom, and what comes of it.

use std::sync::Arc;

use uuid::Uuid;

use crate::kernel::web::EntityName;
use crate::kernel::{Refusal, problem};
use crate::ledger::{Command, Entry, Failure, Tx};

use super::Rules;
use super::needs::{self, Need};
use super::proposals::Shown;
use super::store::proposals::{self as rows, Proposal, Voice};

/// What is said to a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voicing {
    Approve,
    Reject,
    Withdraw,
    Override,
    Review,
}

impl Voicing {
    pub const fn action(self) -> &'static str {
        match self {
            Self::Approve => "governance:approve",
            Self::Reject => "governance:reject",
            Self::Withdraw => "governance:withdraw",
            Self::Override => "governance:override",
            Self::Review => "governance:review",
        }
    }
}

/// Says it.
pub(super) struct Speak {
    pub id: Uuid,
    pub what: Voicing,
    pub reason: String,
    pub by: String,
    pub roles: Vec<String>,
    pub team: Option<String>,
    pub rules: Arc<Rules>,
}

fn conflict(detail: impl Into<String>) -> Failure {
    Refusal::new(&problem::CONFLICT, detail).into()
}

/// Whether so many have approved as this asks for.
fn met(need: &Need, voices: &[Voice]) -> bool {
    let counted = |outside: bool| {
        let counts = |v: &&Voice| v.approves && need.counts(&v.roles) && (!outside || v.outside);
        voices.iter().filter(counts).count() as i64
    };
    i64::from(need.required) <= counted(false) && i64::from(need.outside) <= counted(true)
}

impl Speak {
    /// Whether it can be said, to this proposal, by them.
    fn fits(&self, p: &Proposal, voices: &[Voice]) -> Result<(), Failure> {
        if self.what == Voicing::Review {
            return match (&p.overridden, &p.reviewed) {
                (Some(by), None) if *by != self.by => Ok(()),
                (Some(_), None) => Err(conflict("whoever overrode it cannot review that")),
                _ => Err(conflict("there is nothing to review")),
            };
        }
        let open = p.status == "pending" || (p.status == "approved" && self.what == Voicing::Withdraw);
        if !open {
            return Err(conflict(format!("the proposal is {}", p.status)));
        }
        let own = p.authors.contains(&self.by);
        match self.what {
            Voicing::Approve if own => Err(conflict("an author cannot approve their own proposal")),
            Voicing::Approve if !p.needs.iter().any(|need| need.counts(&self.roles)) => {
                let roles = p.needs.iter().filter_map(|need| need.role.clone()).collect::<Vec<_>>().join(" and ");
                Err(conflict(format!("only approvals of the role {roles} count")))
            }
            Voicing::Approve | Voicing::Reject if voices.iter().any(|v| v.approver == self.by) => {
                Err(conflict("you have said so before"))
            }
            Voicing::Withdraw if p.author != self.by => Err(conflict("only its author can withdraw a proposal")),
            _ => Ok(()),
        }
    }

    fn outside(&self, p: &Proposal) -> bool {
        let author = EntityName { kind: "Sop::Client".to_owned(), id: p.author.clone() };
        let theirs = self.rules.team(&author);
        self.team.is_some() && self.team != theirs
    }
}

impl Command for Speak {
    type Out = Shown;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Shown, Entry), Failure> {
        let found = rows::one(tx.read(), self.id).await?;
        let mut p = found.ok_or_else(|| Refusal::not_found(format!("proposal {}", self.id)))?;
        let mut voices = rows::voices(tx.read(), self.id).await?;
        if p.expires <= tx.now() && matches!(p.status.as_str(), "pending" | "approved") {
            p.status = "expired".to_owned();
        }
        self.fits(&p, &voices)?;
        let (index, time) = (tx.index(), tx.now());
        p.index = index;
        let mut entry = Entry::ok(self.what.action(), format!("proposal/{}", p.id))
            .change("action", p.action.clone())
            .change("target", p.target.clone());
        if !self.reason.is_empty() {
            entry = entry.reason(self.reason.clone());
        }
        match self.what {
            Voicing::Approve | Voicing::Reject => {
                let approves = self.what == Voicing::Approve;
                let (approver, reason) = (self.by.clone(), self.reason.clone());
                let wanted = |role: &&String| p.needs.iter().any(|need| need.role.as_ref() == Some(role));
                let roles = self.roles.iter().filter(wanted).cloned().collect();
                let voice = Voice { approver, approves, outside: self.outside(&p), roles, reason, index, time };
                rows::speak(tx.write(), p.id, &voice).await?;
                voices.push(voice);
                if !approves {
                    p.status = "rejected".to_owned();
                } else if p.needs.iter().all(|need| met(need, &voices)) {
                    p.status = "approved".to_owned();
                }
            }
            Voicing::Withdraw => p.status = "withdrawn".to_owned(),
            Voicing::Override => {
                p.status = "approved".to_owned();
                p.overridden = Some(self.by.clone());
                // Loud: it opens an incident, and stays on the list of what is to be reviewed.
                entry = entry
                    .change("missing", needs::required(&p.needs))
                    .signal("critical", format!("governance-override/{}", p.id));
            }
            Voicing::Review => p.reviewed = Some(self.by.clone()),
        }
        rows::update(tx.write(), &p).await?;
        let entry = entry.change("status", p.status.clone());
        Ok((Shown::of(p, voices, time), entry))
    }
}

/// Ends a proposal that is past its time.
pub(super) struct Expire(pub Uuid);

impl Command for Expire {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let found = rows::one(tx.read(), self.0).await?;
        let open = found.filter(|p| matches!(p.status.as_str(), "pending" | "approved") && p.expires <= tx.now());
        let mut p = open.ok_or_else(|| conflict("the proposal is not open"))?;
        p.status = "expired".to_owned();
        p.index = tx.index();
        rows::update(tx.write(), &p).await?;
        Ok(((), Entry::ok("governance:expire", format!("proposal/{}", p.id)).change("target", p.target)))
    }
}
