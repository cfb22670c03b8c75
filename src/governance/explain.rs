//! Why: the policies that determined a decision, and of those that could have, the condition that failed.

use cedar_policy::{AuthorizationError, Authorizer, Decision, Effect, Policy, PolicyId, PolicySet};
use serde::Serialize;
use serde_json::{Value, json};

use crate::kernel::Refusal;

use super::authzen::Evaluation;
use super::compiled::Rule;
use super::engine::{Force, Put};
use super::rules::{self, Entities};
use super::text;

/// Policies named that nearly matched.
const NEAR: usize = 10;

/// A policy that determined a decision.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Determining {
    pub id: String,
    pub effect: &'static str,
    pub text: String,
}

/// A policy that did not, and why.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Missed {
    pub id: String,
    pub effect: &'static str,
    /// What failed: a part of the scope, or a condition as it is written.
    pub failed: String,
}

/// Why something was decided.
pub(super) struct Explanation {
    pub allowed: bool,
    pub policies: Vec<Determining>,
    pub missed: Vec<Missed>,
    pub reason: String,
}

fn effect(rule: &Rule) -> &'static str {
    if rule.policy.effect() == Effect::Permit { "permit" } else { "forbid" }
}

/// Explains what these bundles decide over these entities.
///
/// # Errors
/// As the evaluation.
pub(super) fn explain(force: &Force, entities: &dyn Entities, e: &Evaluation) -> Result<Explanation, Refusal> {
    let (put, _, _) = rules::put(force, entities, e)?;
    let answered = force.answer(&put)?;
    let determining: Vec<&Rule> = answered.policies.iter().filter_map(|name| force.named(name)).collect();
    let mut missed = Vec::new();
    for rule in force.candidates(&put) {
        if let Some(failed) = failing(rule, &put).filter(|_| !answered.policies.contains(&rule.name)) {
            missed.push(Missed { id: rule.name.clone(), effect: effect(rule), failed });
        }
    }
    if determining.is_empty() {
        for (rule, part) in force.near(&put).into_iter().take(NEAR.saturating_sub(missed.len())) {
            missed.push(Missed { id: rule.name.clone(), effect: effect(rule), failed: format!("scope: {part}") });
        }
    }
    let named = |effect: &str| format!("{effect} by {}", answered.policies.join(", "));
    let reason = match (answered.allowed, determining.is_empty()) {
        (true, _) => named("permitted"),
        (false, false) => named("forbidden"),
        (false, true) => match missed.iter().find(|m| m.effect == "permit") {
            Some(m) => format!("no policy permits it; {} would, but for {}", m.id, m.failed),
            None => "no policy permits it, and none comes near".to_owned(),
        },
    };
    let policies = determining
        .into_iter()
        .map(|r| Determining { id: r.name.clone(), effect: effect(r), text: source_of(&r.policy) })
        .collect();
    Ok(Explanation { allowed: answered.allowed, policies, missed, reason })
}

fn source_of(policy: &Policy) -> String {
    policy.to_cedar().unwrap_or_else(|| policy.to_string())
}

/// The first condition of a policy that does not hold, as it is written.
fn failing(rule: &Rule, put: &Put) -> Option<String> {
    let (json, source) = (rule.policy.to_json().ok()?, source_of(&rule.policy));
    let written = text::conditions(&source);
    for (n, condition) in json["conditions"].as_array()?.iter().enumerate() {
        let kind = condition["kind"].as_str()?;
        // `when` holds if all of its parts do, `unless` if none of them does.
        let operator = if kind == "when" { "&&" } else { "||" };
        let parts = parts(&condition["body"], operator);
        let written = written.get(n).map_or_else(Vec::new, |body| text::operands(body, operator));
        let written = Some(written).filter(|written| written.len() == parts.len());
        for (n, part) in parts.into_iter().enumerate() {
            let alone = json!({
                "effect": "permit", "principal": {"op": "All"}, "action": {"op": "All"}, "resource": {"op": "All"},
                "conditions": [{"kind": kind, "body": part}],
            });
            let policy = Policy::from_json(Some(PolicyId::new("part")), alone).ok()?;
            let again = source_of(&policy);
            let mut set = PolicySet::new();
            set.add(policy).ok()?;
            let response = Authorizer::new().is_authorized(&put.request, &set, &put.entities);
            if response.decision() == Decision::Allow {
                continue;
            }
            // As Cedar would write it, only where it cannot be found in the text.
            let own = again.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(i, _)| i);
            let inner = written.as_ref().and_then(|written| written.get(n)).copied().unwrap_or(own);
            let inner = inner.split_whitespace().collect::<Vec<_>>().join(" ");
            let error = response
                .diagnostics()
                .errors()
                .next()
                .map(|AuthorizationError::PolicyEvaluationError(e)| format!(" ({})", e.inner()))
                .unwrap_or_default();
            return Some(format!("{kind} {{ {inner} }}{error}"));
        }
    }
    None
}

/// The operands of nested `&&` or `||`, in order.
fn parts(body: &Value, operator: &str) -> Vec<Value> {
    match body.get(operator) {
        Some(both) => [parts(&both["left"], operator), parts(&both["right"], operator)].concat(),
        None => vec![body.clone()],
    }
}
