//! What rules: the bundles in force over the entities, read by every decision.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cedar_policy::RestrictedExpression;
use prometheus::Registry;
use serde_json::{Map, Value, json};
use smallvec::SmallVec;

use crate::config::Governance as Settings;
use crate::kernel::web::{Ask, Caller, Decision, Depends, EntityName, Permit};
use crate::kernel::{Clock, Refusal, ids};
use crate::ledger::authz_fact;

use super::authzen::Evaluation;
use super::bearer::{self, Bearers};
use super::canary::Canary;
use super::engine::{self, Answered, Force, Question};
use super::explain::{self, Explanation};
use super::metrics::Metrics;
use super::needs::Requirement;
use super::remembered::{self, Answer, Remembered};
use super::snapshot::{Given, Held, Slice, Snapshot};
use super::{IN_FORCE, entities};

/// What rules: parsed once, and read by every decision.
pub struct Rules {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) clock: Clock,
    pub(super) metrics: Metrics,
    pub(super) settings: Settings,
    remembered: Remembered,
    /// The fact that stands for the bundles in force.
    bundle: u64,
    bearers: OnceLock<Arc<dyn Bearers>>,
}

/// The policies that determined the answers, each once, in order.
fn determining(answers: &[Arc<Answer>]) -> Arc<[String]> {
    if let [one] = answers {
        return one.policies.clone();
    }
    let mut all: Vec<String> = answers.iter().flat_map(|a| a.policies.iter().cloned()).collect();
    all.sort();
    all.dedup();
    all.into()
}

impl Rules {
    /// The shipped bundle over the entities of `snapshot`.
    ///
    /// # Errors
    /// When the shipped bundle does not check, or a metric is registered twice.
    pub fn new(
        snapshot: Arc<Snapshot>,
        clock: Clock,
        registry: &Registry,
        settings: &Settings,
    ) -> Result<Self, String> {
        let metrics = Metrics::new(registry).map_err(|e| e.to_string())?;
        let (settings, bundle) = (settings.clone(), authz_fact(IN_FORCE.as_bytes()));
        let (remembered, bearers) = (Remembered::new(), OnceLock::new());
        Ok(Self { snapshot, clock, metrics, settings, remembered, bundle, bearers })
    }

    /// Access tokens are looked at by `bearers`; set once, at the start.
    pub fn vouched_by(&self, bearers: Arc<dyn Bearers>) {
        let _ = self.bearers.set(bearers);
    }

    /// A question with what the token in it says.
    pub(super) fn vouched(&self, e: Evaluation) -> Result<Evaluation, Refusal> {
        bearer::vouched(e, self.bearers.get())
    }

    pub(super) fn count(&self, origin: &str, bundles: &[String], allowed: bool) {
        self.metrics.decided(origin, bundles.last().map_or("none", String::as_str), allowed);
    }

    /// The canary decided for a subject: whether it denied what the active bundle permits is counted.
    fn watch(&self, canary: &Canary, newly_denied: bool) {
        canary.note(&self.settings, self.clock.elapsed(), newly_denied);
        if newly_denied {
            self.metrics.new_denials.inc();
        }
    }

    /// Decides the daemon's own API: all of `asks`, or none. `at` is the index the snapshot reflected before this call.
    ///
    /// # Errors
    /// When a question cannot be put.
    pub fn decide(&self, caller: &Caller, asks: &[Ask], at: i64) -> Result<Permit, Refusal> {
        let mut depends: Depends = Depends::new();
        depends.push(self.bundle);
        let (mut answers, mut denied) = (SmallVec::<[Arc<Answer>; 1]>::new(), None);
        for (i, ask) in asks.iter().enumerate() {
            let answer = self.decide_one(caller, ask)?;
            depends.extend(answer.depends.iter().copied());
            if !answer.allowed {
                denied = Some(i);
                answers.clear();
            }
            answers.push(answer);
            if denied.is_some() {
                break;
            }
        }
        // Each is looked up on the writer's thread, and questions of one caller rest on much the same.
        depends.sort_unstable();
        depends.dedup();
        self.count("api", answers.first().map_or(&[], |a| &a.bundles[..]), denied.is_none());
        let shown = denied.and_then(|i| asks.get(i)).or(asks.first());
        let decision = shown.map(|ask| Decision {
            id: ids::new_id(self.clock.now()),
            at,
            bundle: answers.first().map_or_else(Default::default, |a| a.bundles.clone()),
            policies: determining(&answers),
            action: ask.action,
            resource: EntityName { kind: format!("Sop::{}", ask.kind), id: ask.name.clone() },
            caller: caller.clone(),
            context: ask.context.clone(),
        });
        Ok(Permit { allowed: denied.is_none(), at, depends, decision, denied, waits: None, proposal: None })
    }

    /// Decides one ask, or remembers what was decided.
    fn decide_one(&self, caller: &Caller, ask: &Ask) -> Result<Arc<Answer>, Refusal> {
        // Before anything is read: what changes from here on makes what is remembered worthless.
        let version = self.snapshot.version();
        let asked = remembered::question(caller, ask);
        if let Some(answer) = asked.as_ref().and_then(|q| self.remembered.get(q, version)) {
            return Ok(answer);
        }
        // No canary: it never rules the daemon itself.
        let force = &self.snapshot.force().active;
        let resource = EntityName { kind: format!("Sop::{}", ask.kind), id: ask.name.clone() };
        let mut given = SmallVec::<[_; 1]>::new();
        if self.snapshot.held(&resource).is_none() {
            given.push((&resource, Held::alone(stand_in(&resource)?)));
        }
        let slice = self.snapshot.slice(&[caller.principal(), &resource], &given)?;
        let depends = slice.names.iter().map(|n| authz_fact(entities::fact(n).as_bytes())).collect();
        let text = |s: &String| RestrictedExpression::new_string(s.clone());
        let plain = vec![
            ("scopes".to_owned(), RestrictedExpression::new_set(caller.scopes().iter().map(text))),
            ("method".to_owned(), RestrictedExpression::new_string(caller.request().method.to_string())),
            ("path".to_owned(), text(&caller.request().path)),
        ];
        let question = Question {
            principal: caller.principal(),
            action: ("Sop::Action", ask.action),
            resource: &resource,
            context: ask.context.clone(),
            plain,
        };
        let answer = force.ask(question, slice.entities)?;
        let (policies, bundles) = (answer.policies.into(), force.ids.clone());
        let answer = Arc::new(Answer { version, allowed: answer.allowed, policies, bundles, depends });
        if let Some(question) = asked {
            self.remembered.keep(question, answer.clone());
        }
        Ok(answer)
    }

    /// Whether it is allowed as it is.
    pub(super) fn allows(&self, caller: &Caller, ask: &Ask) -> Result<bool, Refusal> {
        Ok(self.decide_one(caller, ask)?.allowed)
    }

    /// What a change waits for before the caller may make it: `None` where it needs nobody, or where no approval would help.
    pub(super) fn requirement(&self, caller: &Caller, ask: &Ask) -> Result<Option<Requirement>, Refusal> {
        let now = self.decide_one(caller, ask)?;
        if now.allowed || !self.decide_one(caller, &ask.clone().with("approved", true))?.allowed {
            return Ok(None);
        }
        let in_force = self.snapshot.force();
        let mut need = Requirement::default();
        // All of a name: an application's policy must not hide what the system's of that name wants.
        for rule in now.policies.iter().flat_map(|name| in_force.active.all_named(name)) {
            need.tighten(|annotation| rule.policy.annotation(annotation));
        }
        Ok(Some(need))
    }

    /// Whether these bundles would let somebody with these scopes do something to any bundle.
    pub(super) fn may(&self, force: &Force, who: &EntityName, scopes: &[String], action: &str) -> bool {
        let resource = EntityName { kind: "Sop::Bundle".to_owned(), id: "previous".to_owned() };
        let given = stand_in(&resource).map(|entity| [(&resource, Held::alone(entity))]);
        let slice = given.and_then(|given| self.snapshot.slice(&[who, &resource], &given));
        let text = |s: &String| RestrictedExpression::new_string(s.clone());
        let plain = vec![("scopes".to_owned(), RestrictedExpression::new_set(scopes.iter().map(text)))];
        let (action, context) = (("Sop::Action", action), Map::new());
        let question = Question { principal: who, action, resource: &resource, context, plain };
        slice.and_then(|slice| force.ask(question, slice.entities)).is_ok_and(|a| a.allowed)
    }

    /// The scopes a client is registered with.
    pub(super) fn scopes(&self, client: &EntityName) -> Vec<String> {
        let attrs = self.snapshot.held(client).and_then(|h| h.entity.to_json_value().ok()).unwrap_or_default();
        let scopes = attrs["attrs"]["scopes"].as_array().into_iter().flatten();
        scopes.filter_map(|s| s.as_str().map(str::to_owned)).collect()
    }

    /// The roles somebody is in.
    pub(super) fn roles(&self, who: &EntityName) -> Vec<String> {
        let held = self.snapshot.held(who);
        let parents = held.iter().flat_map(|held| &held.parents);
        parents.filter(|p| p.kind == "Sop::Role").map(|p| p.id.clone()).collect()
    }

    /// The team somebody is in: their role `team:NAME`.
    pub(super) fn team(&self, who: &EntityName) -> Option<String> {
        self.roles(who).into_iter().find(|role| role.starts_with("team:"))
    }

    /// Answers an AuthZEN evaluation that somebody waits for: one of a canary counts towards its stop.
    pub(super) fn answer(&self, e: &Evaluation) -> Result<Evaluated, Refusal> {
        let evaluated = self.evaluate(e)?;
        let in_force = self.snapshot.force();
        if let Some(canary) = in_force.canary_of(&e.subject.name) {
            let permitted = || evaluate(&in_force.active, &*self.snapshot, e).is_ok_and(|a| a.answered.allowed);
            self.watch(canary, !evaluated.answered.allowed && permitted());
        }
        Ok(evaluated)
    }

    /// Puts an AuthZEN evaluation to what is in force.
    pub(super) fn evaluate(&self, e: &Evaluation) -> Result<Evaluated, Refusal> {
        let in_force = self.snapshot.force();
        let force = in_force.of(&e.subject.name);
        let mut evaluated = evaluate(force, &*self.snapshot, e)?;
        evaluated.at = evaluated.at.max(in_force.index);
        if e.explain {
            // If an entity changed in between, why the other answer was given is no help.
            let why = explain::explain(force, &*self.snapshot, e)?;
            evaluated.why = Some(why).filter(|why| why.allowed == evaluated.answered.allowed);
        }
        Ok(evaluated)
    }
}

/// Where entities are looked up: what this daemon holds, or what was once.
pub(super) trait Entities {
    /// What is known of an entity.
    fn held(&self, name: &EntityName) -> Option<Arc<Held>>;
    /// What can be reached.
    ///
    /// # Errors
    /// 422 when it is too much.
    fn slice(&self, roots: &[&EntityName], given: &Given<'_>) -> Result<Slice, Refusal>;
}

impl Entities for Snapshot {
    fn held(&self, name: &EntityName) -> Option<Arc<Held>> {
        self.held(name)
    }

    fn slice(&self, roots: &[&EntityName], given: &Given<'_>) -> Result<Slice, Refusal> {
        self.slice(roots, given)
    }
}

/// An evaluation's answer.
pub(super) struct Evaluated {
    pub answered: Answered,
    /// The bundles it was put to.
    pub bundles: Arc<[String]>,
    /// What the request gave that the schema does not declare.
    pub ignored: Vec<String>,
    /// It reflects every change up to here.
    pub at: i64,
    /// Why, if that was asked for.
    pub why: Option<Explanation>,
    /// How old what is known may be for it to be given while the store is away.
    pub stale_ok: Option<Duration>,
}

/// Puts an evaluation to these bundles over these entities.
pub(super) fn evaluate(force: &Force, entities: &dyn Entities, e: &Evaluation) -> Result<Evaluated, Refusal> {
    let (put, ignored, at) = put(force, entities, e)?;
    let (answered, stale_ok) = force.answer_while(&put)?;
    Ok(Evaluated { answered, bundles: force.ids.clone(), ignored, at, why: None, stale_ok })
}

/// An evaluation as Cedar has it, what of it was left out, and the index of the entities.
pub(super) fn put(
    force: &Force,
    entities: &dyn Entities,
    e: &Evaluation,
) -> Result<(engine::Put, Vec<String>, i64), Refusal> {
    let mut ignored = Vec::new();
    let mut given = SmallVec::<[_; 2]>::new();
    for (part, thing) in [("subject", &e.subject), ("resource", &e.resource)] {
        let held = entities.held(&thing.name);
        if thing.properties.is_empty() && held.is_some() {
            continue;
        }
        let undeclared = force.schema().undeclared(&thing.name.kind, thing.properties.keys());
        let known = thing.properties.iter().filter(|(name, _)| !undeclared.contains(name));
        let held = with_properties(&thing.name, held.as_deref(), known)?;
        ignored.extend(undeclared.iter().map(|name| format!("/{part}/properties/{name}")));
        // Of one entity that is subject and resource, what is said of the resource counts.
        given.insert(0, (&thing.name, held));
    }
    let slice = entities.slice(&[&e.subject.name, &e.resource.name], &given)?;
    let action = (force.action_type(&e.subject.name.kind, &e.action.0), e.action.0.as_str());
    let mut context = e.context.clone();
    if !e.action.1.is_empty() {
        context.insert("action".into(), Value::Object(e.action.1.clone()));
    }
    if !context.is_empty() {
        for name in force.schema().undeclared_context(&engine::uid_of(action.0, action.1)?, context.keys()) {
            context.remove(&name);
            ignored.push(format!("/context/{name}"));
        }
    }
    if e.subject.name.kind.starts_with("Sop::") && !context.contains_key("scopes") {
        // Asked about without a token, a client has the scopes it is registered with.
        let attrs = entities.held(&e.subject.name).and_then(|h| h.entity.to_json_value().ok());
        context.insert("scopes".into(), attrs.map_or_else(|| json!([]), |a| a["attrs"]["scopes"].clone()));
    }
    let (principal, resource) = (&e.subject.name, &e.resource.name);
    let question = Question { principal, action, resource, context, plain: Vec::new() };
    let mut put = force.put(question, slice.entities)?;
    put.reached = slice.names.len();
    Ok((put, ignored, slice.index))
}

/// A request's properties stand in for what is stored, attribute by attribute.
fn with_properties<'p>(
    name: &EntityName,
    held: Option<&Held>,
    properties: impl Iterator<Item = (&'p String, &'p Value)>,
) -> Result<Arc<Held>, Refusal> {
    let mut stored = held.and_then(|h| h.entity.to_json_value().ok());
    let mut attrs = match stored.as_mut().and_then(|entity| entity.get_mut("attrs")).map(Value::take) {
        Some(Value::Object(attrs)) => attrs,
        _ => Map::new(),
    };
    if held.is_none() && name.kind.starts_with("Sop::") {
        attrs.insert("name".into(), name.id.clone().into());
        if name.kind == "Sop::Client" {
            attrs.insert("scopes".into(), json!([]));
            attrs.insert("agent_type".into(), "external".into());
        }
    }
    attrs.extend(properties.map(|(name, value)| (name.clone(), value.clone())));
    let parents = held.map(|h| h.parents.clone()).unwrap_or_default();
    let unfit = || Refusal::malformed("", format!("the properties of {} cannot be Cedar attributes", name.kind));
    Held::new(name, &Value::Object(attrs), parents).ok_or_else(unfit)
}

/// An entity for a resource that is not stored: its name is all there is to know.
fn stand_in(name: &EntityName) -> Result<cedar_policy::Entity, Refusal> {
    if name.kind == "Sop::Client" {
        return engine::entity(name, &json!({"name": name.id, "scopes": [], "agent_type": "external"}), &[], None);
    }
    engine::named(name)
}
