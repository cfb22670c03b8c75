//! A draft becomes validated: it is compiled again, held to its schema, and put to all its cases.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Fault, Refusal, problem};
use crate::ledger::{Command, Committed, Entry, Failure, Tx};

use super::Governance;
use super::bundles::unfit;
use super::cases::Case;
use super::compiled::Compiled;
use super::engine::Force;
use super::library;
use super::store::bundles::{self as rows, Bundle, Text};
use super::trial::{Report, Trial};

/// How long they are put before others have their turn.
const TURN: Duration = Duration::from_millis(50);
/// Failures told in one answer.
const TOLD: usize = 100;

/// A bundle that holds, and what its cases say.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BundleValidation)]
pub struct Validation {
    /// The bundle
    pub bundle: String,
    /// `validated`
    pub status: String,
    /// It has a schema and was held to it, strictly
    pub validated: bool,
    /// The system bundle its cases were decided with
    pub system: String,
    /// What its cases say
    #[serde(flatten)]
    pub report: Report,
}

/// The cases of a bundle.
pub(super) fn cases_of(text: &Text) -> Result<Vec<Case>, Refusal> {
    let read = |bytes: &[u8]| serde_json::from_slice(bytes).map_err(Refusal::internal);
    text.tests.as_deref().map_or(Ok(Vec::new()), read)
}

/// What a bundle's cases are decided with: a system bundle alone, any other beside the system bundle that is given.
pub(super) fn beside(system: &Arc<Compiled>, bundle: &Arc<Compiled>, is_system: bool) -> Force {
    if is_system { Force::new(bundle.clone(), None) } else { Force::new(system.clone(), Some(bundle.clone())) }
}

/// Only what is not in use yet, and was not, becomes validated.
fn open(bundle: &Bundle) -> Result<(), Refusal> {
    if matches!(bundle.status.as_str(), "draft" | "validated") {
        return Ok(());
    }
    let detail =
        format!("bundle {} is {}: only a draft is validated, and what is validated again", bundle.id, bundle.status);
    Err(Refusal::new(&problem::CONFLICT, detail))
}

impl Governance {
    /// Compiles a draft again, puts it to its cases, and says in the record that it holds.
    pub(super) async fn validate(&self, caller: &Caller, id: &str) -> Result<Committed<Validation>, Refusal> {
        let ask = Ask::new("governance:validate", "Bundle", id);
        self.ledger.permit(caller, std::slice::from_ref(&ask)).await?;
        let (row, text) = {
            let mut conn = self.connection().await?;
            let row = rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
            (row, rows::text(&mut conn, id).await.map_err(|e| self.store.refusal(e))?)
        };
        let (Some(row), Some(text)) = (row, text) else { return Err(Refusal::not_found(format!("bundle {id}"))) };
        open(&row)?;
        let cases = cases_of(&text)?;
        let is_system = row.scope == "system";
        let made = tokio::task::block_in_place(|| Compiled::new(id, &library::source(&text), is_system));
        let bundle = Arc::new(made.map_err(unfit)?);
        let force = beside(self.rules.snapshot.force().active.system(), &bundle, is_system);
        let report = self.put_to(&force, &bundle, &cases).await?;
        self.rules.metrics.ran(&report);
        failures(&report)?;
        let system = force.system().id.clone();
        let validated = bundle.validated;
        let whole = Validation { bundle: id.to_owned(), status: "validated".to_owned(), validated, system, report };
        self.ledger.write(caller, &[ask], Validate(whole)).await
    }

    /// Puts the cases, some at a time, so that others have their turn.
    async fn put_to(&self, force: &Force, bundle: &Arc<Compiled>, cases: &[Case]) -> Result<Report, Refusal> {
        let clock = &self.rules.clock;
        let (began, patience) = (clock.elapsed(), self.rules.settings.cases_timeout.get());
        let mut trial = Trial::new(force, bundle);
        let mut waiting = cases.iter();
        while waiting.len() > 0 {
            let now = clock.elapsed();
            if now.saturating_sub(began) > patience {
                let (done, all, seconds) = (cases.len() - waiting.len(), cases.len(), patience.as_secs_f64());
                let detail = format!(
                    "after {seconds} s, {done} of {all} cases were run; have fewer, or smaller ones, in a bundle"
                );
                return Err(Refusal::new(&problem::UNPROCESSABLE, detail.clone()).at("/tests", detail));
            }
            tokio::task::block_in_place(|| {
                for case in waiting.by_ref() {
                    trial.put(case);
                    if clock.elapsed().saturating_sub(now) > TURN {
                        break;
                    }
                }
            });
            tokio::task::yield_now().await;
        }
        Ok(trial.end())
    }
}

/// 422, if any case did not come out as it must.
fn failures(report: &Report) -> Result<(), Refusal> {
    let failed: Vec<Fault> = (0..)
        .zip(&report.results)
        .filter(|(_, r)| !r.ok)
        .map(|(i, r): (usize, _)| Fault::new(format!("/tests/{i}"), r.said()))
        .take(TOLD)
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    let detail = format!("{} of {} cases do not come out as they must", report.failed.len(), report.cases);
    let coverage = serde_json::to_value(&report.coverage).unwrap_or_default();
    let refusal = Refusal::new(&problem::UNPROCESSABLE, detail).with_faults(failed);
    Err(refusal.with("cases", report.cases).with("passed", report.passed).with("coverage", coverage))
}

/// Says in the record that a bundle holds.
struct Validate(Validation);

impl Command for Validate {
    type Out = Validation;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Validation, Entry), Failure> {
        let Validation { bundle, system, report, .. } = &self.0;
        let row = rows::one(tx.read(), bundle).await?;
        open(&row.ok_or_else(|| Refusal::not_found(format!("bundle {bundle}")))?)?;
        let index = tx.index();
        rows::set_status(tx.write(), bundle, "validated", index).await?;
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let entry = Entry::ok("governance:validate", format!("bundle/{bundle}"))
            .change("cases", count(report.cases))
            .change("policies", count(report.coverage.policies))
            .change("covered", count(report.coverage.covered))
            .change("system", system.clone());
        Ok((self.0.clone(), entry))
    }
}
