//! Cases put to a bundle: what came out of each, and which policies that says something about.

use std::collections::BTreeSet;
use std::sync::Arc;

use cedar_policy::{Authorizer, Effect, Entities, PolicySet, Request};
use serde::{Deserialize, Serialize};

use crate::kernel::Refusal;

use super::cases::Case;
use super::compiled::{Compiled, Rule};
use super::engine::{Force, Put};
use super::explain::{self, Explanation};
use super::rules;

/// What came of a case.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = PolicyCaseResult)]
pub struct Outcome {
    /// The case
    pub name: String,
    /// What must come out
    pub expected: bool,
    /// What came out; null where it could not be decided
    pub decided: Option<bool>,
    /// The policies that determined it
    pub policies: Vec<String>,
    /// Whether it is as it must be
    pub ok: bool,
    /// Why not
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Where it asks for what the schema does not know: it may say less than it seems to
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl Outcome {
    /// What was expected, what came out, and why.
    #[must_use]
    pub fn said(&self) -> String {
        let verdict = |allowed: bool| if allowed { "permit" } else { "deny" };
        let decided = self.decided.map_or("nothing", verdict);
        let why = self.why.as_deref().unwrap_or("as it must be");
        format!("{}: expected {}, decided {decided}: {why}", self.name, verdict(self.expected))
    }
}

/// Of which policies the cases say something.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = PolicyCoverage)]
pub struct Coverage {
    /// How many policies there are
    pub policies: usize,
    /// How many determined a case
    pub covered: usize,
    /// Those that determined none
    pub uncovered: Vec<String>,
    /// Of those, the ones whose scope matched in some case
    pub reached: Vec<String>,
}

impl Coverage {
    /// Of a hundred; all where there are no policies.
    #[must_use]
    pub fn percent(&self) -> f64 {
        if self.policies == 0 { 100.0 } else { self.covered as f64 * 100.0 / self.policies as f64 }
    }
}

/// What came of all cases.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = PolicyCaseReport)]
pub struct Report {
    /// How many there are
    pub cases: usize,
    /// How many came out as they must
    pub passed: usize,
    /// The names of those that did not
    pub failed: Vec<String>,
    /// Of which policies they say something
    pub coverage: Coverage,
    /// Each, in order
    pub results: Vec<Outcome>,
}

/// A bundle on trial.
pub(super) struct Trial<'a> {
    force: &'a Force,
    bundle: &'a Arc<Compiled>,
    covered: BTreeSet<usize>,
    reached: BTreeSet<usize>,
    results: Vec<Outcome>,
}

impl<'a> Trial<'a> {
    /// Of `bundle`, as part of `force`.
    pub fn new(force: &'a Force, bundle: &'a Arc<Compiled>) -> Self {
        Self { force, bundle, covered: BTreeSet::new(), reached: BTreeSet::new(), results: Vec::new() }
    }

    /// Puts a case the way an evaluation is put.
    pub fn put(&mut self, case: &Case) {
        let outcome = self.decide(case).unwrap_or_else(|e| Outcome {
            name: case.name.clone(),
            expected: case.expect,
            decided: None,
            policies: Vec::new(),
            ok: false,
            why: Some(format!("it cannot be decided: {}", e.detail())),
            warnings: Vec::new(),
        });
        self.results.push(outcome);
    }

    fn decide(&mut self, case: &Case) -> Result<Outcome, Refusal> {
        let (asked, world) = (case.evaluation()?, case.world());
        let (put, ignored, _) = rules::put(self.force, &world, &asked)?;
        let answered = self.force.answer(&put)?;
        let determines = |rule: &Rule| {
            let effect = if answered.allowed { Effect::Permit } else { Effect::Forbid };
            // The system's policies may have the same names: it must hold by itself.
            answered.policies.contains(&rule.name) && rule.policy.effect() == effect && holds(rule, &put)
        };
        for rule in self.force.candidates(&put) {
            let Some(number) = number(self.bundle, rule) else { continue };
            self.reached.insert(number);
            if determines(rule) {
                self.covered.insert(number);
            }
        }
        let missing: Vec<&str> =
            case.policies.iter().filter(|p| !answered.policies.contains(p)).map(String::as_str).collect();
        let why = if answered.allowed != case.expect {
            Some(reason(explain::explain(self.force, &world, &asked)?))
        } else if !missing.is_empty() {
            let by = if answered.policies.is_empty() { "no policy".to_owned() } else { answered.policies.join(", ") };
            Some(format!("determined by {by}, not by {}", missing.join(", ")))
        } else {
            None
        };
        let errors = answered.errors.iter().map(|e| format!("a policy could not be looked at: {e}"));
        let mut warnings: Vec<String> =
            ignored.iter().map(|at| format!("{at} is left out: the schema has no such thing")).collect();
        warnings.extend(errors);
        warnings.extend(self.unknown(&put));
        Ok(Outcome {
            name: case.name.clone(),
            expected: case.expect,
            decided: Some(answered.allowed),
            policies: answered.policies,
            ok: why.is_none(),
            why,
            warnings,
        })
    }

    /// What the schema does not know about the question, if the bundle has one: a denial of it proves nothing.
    fn unknown(&self, put: &Put) -> Vec<String> {
        if !self.bundle.validated {
            return Vec::new();
        }
        let schema = &self.force.schema().schema;
        let context = put.request.context().cloned().unwrap_or_else(cedar_policy::Context::empty);
        let (principal, action, resource) = (put.principal.clone(), put.action.clone(), put.resource.clone());
        if let Err(e) = Request::new(principal, action, resource, context, Some(schema)) {
            return vec![e.to_string()];
        }
        let world = put.entities.iter().filter(|e| e.uid().type_name().basename() != "Action").cloned();
        Entities::from_entities(world, Some(schema)).err().into_iter().map(|e| said(&e)).collect()
    }

    /// What came out.
    pub fn end(self) -> Report {
        let named = |numbers: &mut dyn Iterator<Item = usize>| -> Vec<String> {
            numbers.filter_map(|n| self.bundle.rules.get(n)).map(|r| r.name.clone()).collect()
        };
        let uncovered = named(&mut (0..self.bundle.len()).filter(|n| !self.covered.contains(n)));
        let reached = named(&mut self.reached.difference(&self.covered).copied());
        let failed: Vec<String> = self.results.iter().filter(|r| !r.ok).map(|r| r.name.clone()).collect();
        Report {
            cases: self.results.len(),
            passed: self.results.len() - failed.len(),
            failed,
            coverage: Coverage { policies: self.bundle.len(), covered: self.covered.len(), uncovered, reached },
            results: self.results,
        }
    }
}

/// Why it came out so, with all permits that would have done and the condition each misses by.
fn reason(why: Explanation) -> String {
    let mut said = why.reason;
    if why.policies.is_empty() {
        let permits = why.missed.into_iter().filter(|m| m.effect == "permit").skip(1);
        let close = permits.filter(|m| !m.failed.starts_with("scope: "));
        said.extend(close.map(|m| format!("; {} would, but for {}", m.id, m.failed)));
    }
    said
}

/// The number of a policy, if it is the bundle's own.
fn number(bundle: &Compiled, rule: &Rule) -> Option<usize> {
    let own = |at: &usize| bundle.rules.get(*at).is_some_and(|r| std::ptr::eq(r, rule));
    rule.policy.id().to_string().get(1..)?.parse().ok().filter(own)
}

/// Whether the conditions of a policy hold; its scope does.
fn holds(rule: &Rule, put: &Put) -> bool {
    let mut alone = PolicySet::new();
    if alone.add(rule.policy.clone()).is_err() {
        return false;
    }
    Authorizer::new().is_authorized(&put.request, &alone, &put.entities).diagnostics().reason().next().is_some()
}

/// An error with its causes.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
