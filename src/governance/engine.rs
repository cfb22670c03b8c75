//! Cedar: one question, put to the bundles in force.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use cedar_policy::{
    AuthorizationError, Authorizer, Context, Decision, Effect, Entities, Entity, EntityId, EntityTypeName, EntityUid,
    PolicyId, PolicySet, Request, RestrictedExpression, Schema,
};
use quick_cache::sync::Cache;
use serde_json::{Map, Value, json};

use crate::kernel::Refusal;
use crate::kernel::web::EntityName;

use super::compiled::{Compiled, Rule};
use super::scope::Placed;

/// One question.
pub struct Question<'a> {
    /// Who.
    pub principal: &'a EntityName,
    /// The action's full name: `Sop::Action`, `state:put`.
    pub action: (&'a str, &'a str),
    /// To what.
    pub resource: &'a EntityName,
    /// What else, as JSON.
    pub context: Map<String, Value>,
    /// What else, as Cedar has it.
    pub plain: Vec<(String, RestrictedExpression)>,
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The policies that determined it, by `@id`.
    pub policies: Vec<String>,
    /// What went wrong while policies were looked at; such a policy does not count.
    pub errors: Vec<String>,
}

/// The bundles that a question is put to: the system's, and the application's if there is one. What either forbids is
/// forbidden, and what neither permits is denied.
pub struct Force {
    system: Arc<Compiled>,
    application: Option<Arc<Compiled>>,
    /// Their ids.
    pub ids: Arc<[String]>,
    /// Cedar's sets of the policies that were found to match, by their numbers: questions are many and such sets few.
    sets: Cache<Box<[u32]>, Arc<PolicySet>>,
}

/// The action's own hierarchy is closed already, and to close over all anew costs more than to decide; but what it costs to add
/// entities grows with the cube of their number, so more than so many are closed over together.
pub(super) const CLOSED_ANEW: usize = 16;
/// Marks the number of an application's policy.
const APPLICATION: u32 = 1 << 31;
/// Sets held at most.
const SETS: usize = 20_000;

impl Force {
    /// Of these bundles.
    #[must_use]
    pub fn new(system: Arc<Compiled>, application: Option<Arc<Compiled>>) -> Self {
        let ids = std::iter::once(&system).chain(&application).map(|b| b.id.clone()).collect();
        Self { system, application, ids, sets: Cache::new(SETS) }
    }

    /// The system bundle.
    #[must_use]
    pub fn system(&self) -> &Arc<Compiled> {
        &self.system
    }

    /// The application's bundle.
    #[must_use]
    pub fn application(&self) -> Option<&Arc<Compiled>> {
        self.application.as_ref()
    }

    /// The bundle whose schema counts: the application's has the shipped one merged in.
    #[must_use]
    pub fn schema(&self) -> &Compiled {
        self.application.as_ref().unwrap_or(&self.system)
    }

    /// The type of the action of this name that a subject of this type is asked about: the daemon's own, or the application's.
    #[must_use]
    pub fn action_type(&self, subject: &str, action: &str) -> &str {
        let own = &self.schema().action_type;
        if !subject.starts_with("Sop::") {
            return own;
        }
        let known = |kind: &str| uid_of(kind, action).is_ok_and(|uid| self.schema().actions.contains_key(&uid));
        if !known("Sop::Action") && known(own) { own } else { "Sop::Action" }
    }

    /// The policy of this name.
    pub(super) fn named<'a>(&'a self, name: &'a str) -> Option<&'a Rule> {
        self.all_named(name).next()
    }

    fn rule(&self, id: &PolicyId) -> Option<&Rule> {
        let id = id.to_string();
        let (scope, number) = id.split_at_checked(1)?;
        let bundle = if scope == "s" { Some(&self.system) } else { self.application.as_ref() };
        bundle?.rules.get(number.parse::<usize>().ok()?)
    }

    /// The policies of this name: the application's and the system's.
    pub(super) fn all_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Rule> {
        let bundles = self.application.iter().chain(std::iter::once(&self.system));
        bundles.flat_map(|b| &b.rules).filter(move |r| r.name == name)
    }

    /// The policies whose scope matches, by number.
    fn matching(&self, put: &Put) -> Box<[u32]> {
        let [principal, action, resource] = put.placed();
        let mut numbers = self.system.index.matching(&principal, &action, &resource);
        if let Some(application) = &self.application {
            let found = application.index.matching(&principal, &action, &resource);
            numbers.extend(found.into_iter().map(|n| n | APPLICATION));
        }
        numbers.into()
    }

    /// The policies whose scope matches.
    pub(super) fn candidates(&self, put: &Put) -> Vec<&Rule> {
        self.matching(put).iter().filter_map(|n| self.numbered(*n)).collect()
    }

    /// Permits of which the principal or the resource alone does not match. Those for other actions are nobody's near miss.
    pub(super) fn near(&self, put: &Put) -> Vec<(&Rule, &'static str)> {
        let [principal, action, resource] = put.placed();
        let mut near = Vec::new();
        for bundle in self.application.iter().chain(std::iter::once(&self.system)) {
            for (number, rule) in (0..).zip(&bundle.rules) {
                let missing = match bundle.index.misses(number, &principal, &action, &resource) {
                    [true, false, false] => "principal",
                    [false, false, true] => "resource",
                    _ => continue,
                };
                if rule.policy.effect() == Effect::Permit {
                    near.push((rule, missing));
                }
            }
        }
        near
    }

    fn numbered(&self, number: u32) -> Option<&Rule> {
        if number & APPLICATION == 0 {
            return self.system.rules.get(number as usize);
        }
        self.application.as_ref()?.rules.get((number ^ APPLICATION) as usize)
    }

    fn set(&self, numbers: Box<[u32]>) -> Result<Arc<PolicySet>, Refusal> {
        if let Some(set) = self.sets.get(&numbers) {
            return Ok(set);
        }
        let mut set = PolicySet::new();
        for rule in numbers.iter().filter_map(|n| self.numbered(*n)) {
            set.add(rule.policy.clone()).map_err(Refusal::internal)?;
        }
        let set = Arc::new(set);
        self.sets.insert(numbers, set.clone());
        Ok(set)
    }

    /// Answers, over the entities that the question can reach.
    ///
    /// # Errors
    /// 400 when a name or a value cannot be Cedar's.
    pub fn ask(&self, question: Question<'_>, entities: Vec<Arc<Entity>>) -> Result<Answered, Refusal> {
        let put = self.put(question, entities)?;
        self.answer(&put)
    }

    /// A question as Cedar has it.
    pub(super) fn put(&self, question: Question<'_>, entities: Vec<Arc<Entity>>) -> Result<Put, Refusal> {
        let principal = uid(question.principal)?;
        let action = uid_of(question.action.0, question.action.1)?;
        let resource = uid(question.resource)?;
        let context = context(question.plain, question.context)?;
        let request = Request::new(principal.clone(), action.clone(), resource.clone(), context, None)
            .map_err(|e| Refusal::malformed("", e.to_string()))?;
        let actions = self.schema().actions.get(&action).cloned().unwrap_or_else(Entities::empty);
        let anew = entities.len() > CLOSED_ANEW;
        let entities = entities.into_iter().map(Arc::unwrap_or_clone);
        let all = if anew {
            Entities::from_entities(actions.iter().cloned().chain(entities), None)
        } else {
            actions.add_entities(entities, None)
        };
        let entities = all.map_err(|e| Refusal::malformed("", format!("the entities do not go together: {e}")))?;
        Ok(Put { principal, action, resource, request, entities, reached: 0 })
    }

    pub(super) fn answer(&self, put: &Put) -> Result<Answered, Refusal> {
        self.answer_while(put).map(|(answered, _)| answered)
    }

    /// The answer, and how old what is known may be for it to be given while the store is away: as the policies that determined
    /// it say, each of them; `None`, it is not given then.
    pub(super) fn answer_while(&self, put: &Put) -> Result<(Answered, Option<Duration>), Refusal> {
        let set = self.set(self.matching(put))?;
        let response = Authorizer::new().is_authorized(&put.request, &set, &put.entities);
        let name = |id: &PolicyId| self.rule(id).map_or_else(|| id.to_string(), |r| r.name.clone());
        let mut policies: Vec<String> = response.diagnostics().reason().map(name).collect();
        policies.sort();
        let failed = |e: &AuthorizationError| match e {
            AuthorizationError::PolicyEvaluationError(e) => format!("{}: {}", name(e.policy_id()), e.inner()),
        };
        let mut errors: Vec<String> = response.diagnostics().errors().map(failed).collect();
        errors.sort();
        let stale_ok = response.diagnostics().reason().map(|id| self.rule(id)?.stale_ok).min().flatten();
        Ok((Answered { allowed: response.decision() == Decision::Allow, policies, errors }, stale_ok))
    }
}

/// A question as Cedar has it.
pub(super) struct Put {
    pub principal: EntityUid,
    pub action: EntityUid,
    pub resource: EntityUid,
    pub request: Request,
    pub entities: Entities,
    /// How many names it reaches.
    pub reached: usize,
}

impl Put {
    pub fn placed(&self) -> [Placed<'_>; 3] {
        [&self.principal, &self.action, &self.resource]
            .map(|uid| Placed::new(uid, self.entities.ancestors(uid).into_iter().flatten()))
    }
}

/// Cedar's name of an entity.
///
/// # Errors
/// 400 when the type is no Cedar name.
pub fn uid(name: &EntityName) -> Result<EntityUid, Refusal> {
    uid_of(&name.kind, &name.id)
}

pub(super) fn uid_of(kind: &str, id: &str) -> Result<EntityUid, Refusal> {
    Ok(EntityUid::from_type_name_and_id(type_of(kind)?, EntityId::new(id)))
}

/// Names of types held at most, by each thread.
const TYPES: usize = 256;

thread_local! {
    static HELD: RefCell<HashMap<String, EntityTypeName>> = RefCell::default();
}

/// Cedar's name of a type. They are few, and to parse one costs more than to clone it.
fn type_of(kind: &str) -> Result<EntityTypeName, Refusal> {
    HELD.with_borrow_mut(|held| {
        if let Some(name) = held.get(kind) {
            return Ok(name.clone());
        }
        let name = EntityTypeName::from_str(kind).map_err(|_| {
            let wrong = format!("{kind:?} is no entity type: write names of letters, digits and _, joined by ::");
            Refusal::malformed("", wrong)
        })?;
        if held.len() >= TYPES {
            held.clear();
        }
        held.insert(kind.to_owned(), name.clone());
        Ok(name)
    })
}

/// An entity from attributes in Cedar's JSON and parents.
///
/// # Errors
/// 400 with what does not fit; against the schema if one is given.
pub fn entity(
    name: &EntityName,
    attrs: &Value,
    parents: &[EntityName],
    schema: Option<&Schema>,
) -> Result<Entity, Refusal> {
    // The type must be a name before Cedar is asked, so that the pointer is right.
    let own = uid(name)?;
    if schema.is_none()
        && let Some(attrs) = attrs.as_object().and_then(plain_members)
        && let Ok(parents) = parents.iter().map(uid).collect::<Result<HashSet<_>, _>>()
        && let Ok(entity) = Entity::new(own, attrs, parents)
    {
        return Ok(entity);
    }
    let parents: Vec<Value> = parents.iter().map(|p| json!({"type": p.kind, "id": p.id})).collect();
    let whole = json!({"uid": {"type": name.kind, "id": name.id}, "attrs": attrs, "parents": parents});
    Entity::from_json_value(whole, schema).map_err(|e| Refusal::malformed("/attrs", e.to_string()))
}

/// A context of what is given as Cedar has it and as JSON.
fn context(plain: Vec<(String, RestrictedExpression)>, json: Map<String, Value>) -> Result<Context, Refusal> {
    let wrong = |e: &dyn std::fmt::Display| Refusal::malformed("/context", e.to_string());
    if let Some(members) = plain_members::<Vec<_>>(&json) {
        return Context::from_pairs(plain.into_iter().chain(members)).map_err(|e| wrong(&e));
    }
    let context = Context::from_pairs(plain).map_err(|e| wrong(&e))?;
    let given = Context::from_json_value(Value::Object(json), None).map_err(|e| wrong(&e))?;
    context.merge(given).map_err(|e| wrong(&e))
}

/// The members of an object, where each is plain.
fn plain_members<T: FromIterator<(String, RestrictedExpression)>>(members: &Map<String, Value>) -> Option<T> {
    members.iter().map(|(name, value)| Some((name.clone(), plain(value)?))).collect()
}

/// What Cedar's own reading of JSON makes of it, many times as fast, where that is plain: no escapes but those of entities.
/// What is not, and what is wrong, is left to Cedar.
fn plain(value: &Value) -> Option<RestrictedExpression> {
    match value {
        Value::Bool(b) => Some(RestrictedExpression::new_bool(*b)),
        Value::Number(n) => n.as_i64().map(RestrictedExpression::new_long),
        Value::String(s) => Some(RestrictedExpression::new_string(s.clone())),
        Value::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(plain).collect();
            Some(RestrictedExpression::new_set(items?))
        }
        Value::Object(members) => match members.get("__entity") {
            Some(Value::Object(name)) if members.len() == 1 && name.len() == 2 => {
                let uid = uid_of(name.get("type")?.as_str()?, name.get("id")?.as_str()?).ok()?;
                Some(RestrictedExpression::new_entity_uid(uid))
            }
            _ if members.keys().any(|name| name.starts_with("__")) => None,
            _ => RestrictedExpression::new_record(plain_members::<Vec<_>>(members)?).ok(),
        },
        Value::Null => None,
    }
}

/// A resource that is known by its name only.
///
/// # Errors
/// 400 when the type is no Cedar name.
pub fn named(name: &EntityName) -> Result<Entity, Refusal> {
    let attrs = HashMap::from([("name".to_owned(), RestrictedExpression::new_string(name.id.clone()))]);
    Entity::new(uid(name)?, attrs, HashSet::new()).map_err(Refusal::internal)
}

#[cfg(test)]
mod tests;
