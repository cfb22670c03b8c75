//! Who may do what: policies in Cedar, entities they know, decisions they give, and the record of each.
//!
//! **Invariants.** Nothing is permitted that no policy permits. A decision names the index it was taken at and what it rests
//! on; the ledger takes it again when one of those changed before the commit. An AuthZEN evaluation is in the record before it
//! is answered.
//!
//! **Not here.** Who the caller is (`token`), how a denial is recorded (`ledger`).
//!
//! **Why this way.** The daemon's own API is ruled by the same engine and the same entities as anyone else's: what an operator
//! learns about one holds for the other.

mod authzen;
mod decisions;
pub mod engine;
pub mod entities;
pub mod http;
mod remembered;
mod snapshot;
mod store;

use std::collections::HashMap;
use std::sync::Arc;

use cedar_policy::RestrictedExpression;
use prometheus::{IntCounterVec, Opts, Registry};
use serde_json::{Map, Value, json};
use smallvec::SmallVec;

use crate::kernel::supervisor::Supervisor;
use crate::kernel::web::{Ask, Caller, Decision, Depends, EntityName, Permit};
use crate::kernel::{Clock, Fault, Refusal, ids};
use crate::ledger::{Committed, Ledger, authz_fact};
use crate::store::Store;

use authzen::{Evaluation, Semantic};
use decisions::{Record, Recorder};
use engine::{Engine, Question};
use entities::Shown;
use remembered::{Answer, Remembered};
use snapshot::Held;
pub use snapshot::Snapshot;

/// What rules: parsed once, and read by every decision.
pub struct Rules {
    engine: Engine,
    snapshot: Arc<Snapshot>,
    clock: Clock,
    decided: IntCounterVec,
    remembered: Remembered,
    /// The ids of the active bundles, and the fact that stands for them.
    bundles: Arc<[String]>,
    bundle: u64,
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

/// The records of decisions, for who gives receipts of them.
#[must_use]
pub fn records(store: &Store) -> Arc<dyn crate::audit::Records> {
    Arc::new(decisions::Decisions(store.clone()))
}

impl Rules {
    /// The shipped bundle over the entities of `snapshot`.
    ///
    /// # Errors
    /// When the shipped bundle does not check, or a metric is registered twice.
    pub fn new(snapshot: Arc<Snapshot>, clock: Clock, registry: &Registry) -> Result<Self, String> {
        let decided =
            IntCounterVec::new(Opts::new("sop_governance_decisions_total", "Decisions"), &["origin", "outcome"]);
        let decided = decided.map_err(|e| e.to_string())?;
        registry.register(Box::new(decided.clone())).map_err(|e| e.to_string())?;
        for origin in ["api", "authzen"] {
            for outcome in ["allowed", "denied"] {
                decided.with_label_values(&[origin, outcome]).inc_by(0);
            }
        }
        let engine = Engine::shipped()?;
        let bundles = Arc::new([engine.id().to_owned()]);
        let bundle = authz_fact(b"bundle");
        Ok(Self { engine, snapshot, clock, decided, remembered: Remembered::new(), bundles, bundle })
    }

    fn count(&self, origin: &str, allowed: bool) {
        self.decided.with_label_values(&[origin, if allowed { "allowed" } else { "denied" }]).inc();
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
        self.count("api", denied.is_none());
        let shown = denied.and_then(|i| asks.get(i)).or(asks.first());
        let decision = shown.map(|ask| Decision {
            id: ids::new_id(self.clock.now()),
            at,
            bundle: self.bundles.clone(),
            policies: determining(&answers),
            principal: caller.principal().clone(),
            action: ask.action.to_owned(),
            resource: EntityName { kind: format!("Sop::{}", ask.kind), id: ask.name.clone() },
        });
        Ok(Permit { allowed: denied.is_none(), at, depends, decision, denied })
    }

    /// Decides one ask, or remembers what was decided.
    fn decide_one(&self, caller: &Caller, ask: &Ask) -> Result<Arc<Answer>, Refusal> {
        // Before anything is read: what changes from here on makes what is remembered worthless.
        let version = self.snapshot.version();
        let asked = remembered::question(caller, ask);
        if let Some(answer) = asked.as_ref().and_then(|q| self.remembered.get(q, version)) {
            return Ok(answer);
        }
        let resource = EntityName { kind: format!("Sop::{}", ask.kind), id: ask.name.clone() };
        let mut given = HashMap::new();
        if self.snapshot.held(&resource).is_none() {
            let entity = Arc::new(stand_in(&resource)?);
            given.insert(resource.clone(), Held { entity, parents: Vec::new(), refers: Vec::new() });
        }
        let slice = self.snapshot.slice(&[caller.principal(), &resource], &given);
        let depends = slice.names.iter().map(|n| authz_fact(entities::fact(n).as_bytes())).collect();
        let text = |s: &String| RestrictedExpression::new_string(s.clone());
        let plain = vec![
            ("scopes".to_owned(), RestrictedExpression::new_set(caller.scopes().iter().map(text))),
            ("method".to_owned(), text(&caller.request().method)),
            ("path".to_owned(), text(&caller.request().path)),
        ];
        let question = Question {
            principal: caller.principal(),
            action: ("Sop::Action", ask.action),
            resource: &resource,
            context: ask.context.clone(),
            plain,
        };
        let answer = self.engine.ask(question, slice.entities)?;
        let mut policies = answer.policies;
        policies.sort();
        let answer = Arc::new(Answer { version, allowed: answer.allowed, policies: policies.into(), depends });
        if let Some(question) = asked {
            self.remembered.keep(question, answer.clone());
        }
        Ok(answer)
    }

    /// Answers an AuthZEN evaluation.
    fn evaluate(&self, e: &Evaluation) -> Result<engine::Answered, Refusal> {
        let system = e.subject.name.kind.starts_with("Sop::");
        let mut given = HashMap::new();
        for thing in [&e.subject, &e.resource] {
            let held = self.snapshot.held(&thing.name);
            if thing.properties.is_empty() && held.is_some() {
                continue;
            }
            // A request's properties stand in for what is stored, attribute by attribute.
            let mut attrs = held
                .as_ref()
                .and_then(|h| h.entity.to_json_value().ok())
                .map_or_else(Map::new, |v| v["attrs"].as_object().cloned().unwrap_or_default());
            if held.is_none() && thing.name.kind.starts_with("Sop::") {
                attrs.insert("name".into(), thing.name.id.clone().into());
            }
            attrs.extend(thing.properties.clone());
            let parents = held.map(|h| h.parents).unwrap_or_default();
            let entity = Held::new(&thing.name, &Value::Object(attrs), parents).ok_or_else(|| {
                Refusal::malformed("", format!("the properties of {} cannot be Cedar attributes", thing.name.kind))
            })?;
            given.insert(thing.name.clone(), entity);
        }
        let slice = self.snapshot.slice(&[&e.subject.name, &e.resource.name], &given);
        let mut context = e.context.clone();
        if !e.action.1.is_empty() {
            context.insert("action".into(), Value::Object(e.action.1.clone()));
        }
        if system && !context.contains_key("scopes") {
            // Asked about without a token, a client has the scopes it is registered with.
            let attrs = self.snapshot.held(&e.subject.name).and_then(|h| h.entity.to_json_value().ok());
            context.insert("scopes".into(), attrs.map_or_else(|| json!([]), |a| a["attrs"]["scopes"].clone()));
        }
        let action = if system { "Sop::Action" } else { "Action" };
        let question = Question {
            principal: &e.subject.name,
            action: (action, &e.action.0),
            resource: &e.resource.name,
            context,
            plain: Vec::new(),
        };
        self.engine.ask(question, slice.entities)
    }
}

/// An entity for a resource that is not stored: its name is all there is to know.
fn stand_in(name: &EntityName) -> Result<cedar_policy::Entity, Refusal> {
    if name.kind == "Sop::Client" {
        return engine::entity(name, &json!({"name": name.id, "scopes": [], "agent_type": "external"}), &[], None);
    }
    engine::named(name)
}

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct Governance {
    rules: Arc<Rules>,
    ledger: Ledger,
    store: Store,
    recorder: Recorder,
}

/// A decision as it was recorded.
struct Recorded {
    allowed: bool,
    context: Map<String, Value>,
}

impl Governance {
    /// Opens the room and starts the recorder.
    #[must_use]
    pub fn start(rules: Arc<Rules>, ledger: Ledger, store: Store, tasks: &Supervisor) -> Self {
        let recorder = Recorder::start(ledger.clone(), tasks);
        Self { rules, ledger, store, recorder }
    }

    /// Evaluates, one after the other, as far as the semantic says; all are recorded before the answer.
    async fn evaluate(
        &self,
        caller: &Caller,
        items: Vec<Result<Evaluation, Refusal>>,
        semantic: Semantic,
    ) -> Result<Vec<Recorded>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:evaluate", "Bundle", "active")]).await?;
        let at = self.ledger.index();
        let (mut records, mut answers) = (Vec::new(), Vec::new());
        for item in items {
            let answered = item.and_then(|e| self.rules.evaluate(&e).map(|a| (e, a)));
            let allowed = answered.as_ref().is_ok_and(|(_, a)| a.allowed);
            let mut context = Map::new();
            match answered {
                Ok((e, a)) => {
                    self.rules.count("authzen", allowed);
                    let record =
                        Record::new(&self.rules.clock, caller, &e, allowed, &a.policies, self.rules.engine.id(), at)?;
                    context.insert("decision_id".into(), record.id.to_string().into());
                    context.insert("policies".into(), a.policies.into());
                    context.insert("bundle".into(), self.rules.engine.id().into());
                    if !a.errors.is_empty() {
                        context.insert("errors".into(), a.errors.into());
                    }
                    answers.push((Recorded { allowed, context }, Some(records.len())));
                    records.push(record);
                }
                Err(refusal) => {
                    context.insert(
                        "error".into(),
                        json!({"status": refusal.problem().status, "message": refusal.detail()}),
                    );
                    answers.push((Recorded { allowed, context }, None));
                }
            }
            match semantic {
                Semantic::DenyOnFirstDeny if !allowed => break,
                Semantic::PermitOnFirstPermit if allowed => break,
                _ => {}
            }
        }
        let places = if records.is_empty() { Vec::new() } else { self.recorder.keep(records).await? };
        Ok(answers
            .into_iter()
            .map(|(mut recorded, place)| {
                if let Some(place) = place.and_then(|i| places.get(i)) {
                    recorded.context.insert("index".into(), place.index.into());
                    recorded.context.insert("position".into(), place.position.into());
                }
                recorded
            })
            .collect())
    }

    /// Puts an entity.
    async fn put_entity(
        &self,
        caller: &Caller,
        name: EntityName,
        attrs: Value,
        parents: Vec<EntityName>,
    ) -> Result<Committed<Shown>, Refusal> {
        own(&name)?;
        let schema = name.kind.starts_with("Sop::").then(|| self.rules.engine.schema());
        engine::entity(&name, &attrs, &parents, schema)?;
        let ask = Ask::new("governance:entity-put", "Entity", format!("{}/{}", name.kind, name.id));
        self.ledger.write(caller, &[ask], entities::Put { name, attrs, parents }).await
    }

    /// Deletes an entity.
    async fn delete_entity(&self, caller: &Caller, name: EntityName) -> Result<Committed<()>, Refusal> {
        own(&name)?;
        let ask = Ask::new("governance:entity-delete", "Entity", format!("{}/{}", name.kind, name.id));
        self.ledger.write(caller, &[ask], entities::Delete { name }).await
    }

    /// Reads an entity.
    async fn entity(&self, caller: &Caller, name: EntityName) -> Result<Shown, Refusal> {
        let ask = Ask::new("governance:entity-read", "Entity", format!("{}/{}", name.kind, name.id));
        self.ledger.permit(caller, &[ask]).await?;
        let mut conn = self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))?;
        let found = store::some(&mut conn, std::slice::from_ref(&name)).await.map_err(|e| self.store.refusal(e))?.pop();
        let row = found.ok_or_else(|| Refusal::not_found(format!("entity {}::{:?}", name.kind, name.id)))?;
        Ok(Shown { kind: row.name.kind, id: row.name.id, attrs: row.attrs, parents: row.parents, index: row.index })
    }
}

/// A client's entity is kept by the token room, with the client.
fn own(name: &EntityName) -> Result<(), Refusal> {
    if name.kind == "Sop::Client" {
        let detail = "a client's entity is kept with its registration; change it under /oauth2/register";
        return Err(Refusal::new(&crate::kernel::problem::UNPROCESSABLE, detail).with_faults([Fault::new("", detail)]));
    }
    Ok(())
}
