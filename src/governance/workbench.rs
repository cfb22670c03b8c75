//! What an author does with a bundle before any daemon sees it: compiles it, looks it over, puts it to its cases. The same
//! engine as the daemon's, with nothing in force, no store and no record.

use std::collections::HashMap;
use std::sync::Arc;

use cedar_policy::{ActionConstraint, Effect, PrincipalConstraint, ResourceConstraint};
use serde_json::Value;

use crate::kernel::Fault;

use super::cases::Case;
use super::compiled::{Compiled, Rule, span};
use super::engine::Force;
use super::library::{self, Library};
use super::trial::Trial;
use super::{text, validate};

pub use super::compiled::{SCHEMA, Source};
pub use super::trial::{Coverage, Outcome, Report};

/// A bundle on the workbench.
pub struct Bench {
    bundle: Arc<Compiled>,
    force: Force,
    source: Source,
}

/// A policy as its author wrote it.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Its `@id`, else its number
    pub id: String,
    /// `permit` or `forbid`
    pub effect: &'static str,
    /// It has an `@id`
    pub named: bool,
    /// As it is written
    pub text: String,
    /// Line and column, from 1, where it is Cedar text
    pub place: Option<(u32, u32)>,
    /// What it says, however it is written: Cedar's JSON
    pub says: Value,
}

/// What was found in a bundle that compiles.
#[derive(Clone, Debug)]
pub struct Finding {
    /// It is not what its author can have meant, rather than worth a look
    pub wrong: bool,
    /// What kind of finding it is
    pub rule: &'static str,
    /// Where and what
    pub fault: Fault,
}

impl Bench {
    /// Compiles a bundle as a daemon does, beside the shipped system bundle or in its place.
    ///
    /// # Errors
    /// With every fault, its line and column.
    pub fn new(source: Source, system: bool) -> Result<Self, Vec<Fault>> {
        let bundle = Arc::new(Compiled::new("bench", &source, system)?);
        let library = Library::new().map_err(|e| vec![Fault::new("", e)])?;
        let force = validate::beside(library.shipped(), &bundle, system);
        Ok(Self { bundle, force, source })
    }

    /// It has a schema and was held to it.
    #[must_use]
    pub fn validated(&self) -> bool {
        self.bundle.validated
    }

    /// Its policies, in the order of the text.
    #[must_use]
    pub fn policies(&self) -> Vec<Policy> {
        let written = text::statements(&self.source.policies);
        let written = if written.len() == self.bundle.len() { written } else { Vec::new() };
        let policy = |(n, rule): (usize, &Rule)| {
            let statement = written.get(n);
            Policy {
                id: rule.name.clone(),
                effect: if rule.policy.effect() == Effect::Permit { "permit" } else { "forbid" },
                named: rule.policy.annotation("id").is_some(),
                text: statement.map_or_else(
                    || rule.policy.to_cedar().unwrap_or_else(|| rule.policy.to_string()),
                    |s| s.text.to_owned(),
                ),
                place: statement.map(|s| (s.line, s.column)),
                says: rule.policy.to_json().unwrap_or_default(),
            }
        };
        self.bundle.rules.iter().enumerate().map(policy).collect()
    }

    /// Puts it to cases; `each` hears of every one.
    #[must_use]
    pub fn run<'c>(&self, cases: impl IntoIterator<Item = &'c Case>, mut each: impl FnMut()) -> Report {
        let mut trial = Trial::new(&self.force, &self.bundle);
        for case in cases {
            trial.put(case);
            each();
        }
        trial.end()
    }

    /// Looks it over: what Cedar warns of, and what Cedar cannot know.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let cedar = |w: &Fault| Finding { wrong: false, rule: "cedar", fault: w.clone() };
        let mut found: Vec<Finding> = self.bundle.warnings.iter().map(cedar).collect();
        let policies = self.policies();
        let mut same: HashMap<String, &str> = HashMap::new();
        for (policy, rule) in policies.iter().zip(&self.bundle.rules) {
            let mut find = |wrong: bool, kind: &'static str, detail: String| {
                let mut fault = Fault::new("/policies", detail);
                (fault.line, fault.column) = policy.place.unzip();
                found.push(Finding { wrong, rule: kind, fault });
            };
            let id = &policy.id;
            if !policy.named {
                find(
                    false,
                    "no-id",
                    format!("{id} has no @id: it is called by its place, which changes when another is put before it"),
                );
            }
            if everything(rule) {
                let what = if policy.effect == "permit" {
                    "permits everything to everybody"
                } else {
                    "forbids everything to everybody"
                };
                find(false, "unconditional", format!("{id} {what}"));
            }
            for (name, detail) in annotations(rule) {
                find(true, "annotation", format!("{id}: @{name} {detail}"));
            }
            let mut said = policy.says.clone();
            said["annotations"] = Value::Null;
            if let Some(first) = same.get(&said.to_string()) {
                find(false, "duplicate", format!("{id} says the same as {first}"));
            } else {
                same.insert(said.to_string(), id);
            }
        }
        found
    }
}

/// Neither scope nor conditions leave anything out.
fn everything(rule: &Rule) -> bool {
    let policy = &rule.policy;
    policy.principal_constraint() == PrincipalConstraint::Any
        && policy.action_constraint() == ActionConstraint::Any
        && policy.resource_constraint() == ResourceConstraint::Any
        && !policy.has_non_scope_constraint()
}

/// What the annotations about approvals say that nobody could follow: the daemon then does as if they were not there.
fn annotations(rule: &Rule) -> Vec<(&'static str, String)> {
    let value = |name: &str| rule.policy.annotation(name);
    let number = |text: &str| text.parse::<i32>().is_ok_and(|n| n > 0);
    let mut found = Vec::new();
    for name in ["approvals", "outside"] {
        if let Some(text) = value(name).filter(|t| !number(t)) {
            found.push((name, format!("is a number from 1, not {text:?}")));
        }
    }
    if let Some(text) = value("within").filter(|t| span(t).is_none()) {
        found.push(("within", format!("is a time such as 90s, 15m, 72h or 7d, not {text:?}")));
    }
    let permits = rule.policy.effect() == Effect::Permit;
    if let Some(name) =
        ["approvals", "approvers", "outside", "within"].into_iter().find(|n| permits && value(n).is_some())
    {
        found.push((name, "does nothing on a permit: only what is forbidden can wait for others".to_owned()));
    }
    found
}

/// The policies of a text that need not fit any schema.
///
/// # Errors
/// With what does not parse.
pub fn policies(text: &str) -> Result<Vec<Policy>, Vec<Fault>> {
    let source = Source { policies: text.to_owned(), schema: None };
    Bench::new(source, false).map(|bench| bench.policies())
}

/// The id of the system bundle that cases are decided with.
#[must_use]
pub fn system() -> String {
    library::shipped_id()
}
