//! Cedar: the parsed bundle, and one question put to it.

use std::collections::HashMap;
use std::str::FromStr as _;
use std::sync::Arc;

use cedar_policy::{
    Authorizer, Context, Decision, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicySet, Request,
    RestrictedExpression, Schema, ValidationMode, Validator,
};
use serde_json::{Map, Value, json};

use crate::kernel::Refusal;
use crate::kernel::web::EntityName;

/// The shipped schema.
pub const SCHEMA: &str = include_str!("../../config/policies/sop.cedarschema");
/// The shipped policies.
pub const SYSTEM: &str = include_str!("../../config/policies/system.cedar");

/// A bundle, parsed once.
pub struct Engine {
    policies: PolicySet,
    schema: Schema,
    /// Each action with the groups it is in. A question brings only its own: closing over all of them anew for each question
    /// cost more than deciding it.
    actions: HashMap<EntityUid, Vec<Entity>>,
    /// What the annotation `@id` calls each policy.
    names: HashMap<String, String>,
    id: String,
}

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

impl Engine {
    /// Parses and checks (strictly, against the schema) a bundle.
    ///
    /// # Errors
    /// With what does not parse or does not type-check.
    pub fn new(schema: &str, policies: &str) -> Result<Self, String> {
        let (schema, _) = Schema::from_cedarschema_str(schema).map_err(|e| format!("{:?}", miette(&e)))?;
        let policies = PolicySet::from_str(policies).map_err(|e| e.to_string())?;
        let checked = Validator::new(schema.clone()).validate(&policies, ValidationMode::Strict);
        if !checked.validation_passed() {
            let all: Vec<String> = checked.validation_errors().map(ToString::to_string).collect();
            return Err(all.join("; "));
        }
        let names = policies
            .policies()
            .map(|p| (p.id().to_string(), p.annotation("id").map_or_else(|| p.id().to_string(), str::to_owned)))
            .collect();
        let all = schema.action_entities().map_err(|e| e.to_string())?;
        let with_groups = |action: &Entity| {
            let groups = all.ancestors(&action.uid()).into_iter().flatten().filter_map(|group| all.get(group)).cloned();
            (action.uid(), std::iter::once(action.clone()).chain(groups).collect())
        };
        let actions = all.iter().map(with_groups).collect();
        Ok(Self { policies, schema, actions, names, id: "system".to_owned() })
    }

    /// The shipped bundle.
    ///
    /// # Errors
    /// Never, unless it was built wrong; a test holds it.
    pub fn shipped() -> Result<Self, String> {
        Self::new(SCHEMA, SYSTEM)
    }

    /// The bundle's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The schema.
    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Answers, over the entities that the question can reach.
    ///
    /// # Errors
    /// 400 when a name or a value cannot be Cedar's.
    pub fn ask(&self, question: Question<'_>, entities: Vec<Arc<Entity>>) -> Result<Answered, Refusal> {
        let principal = uid(question.principal)?;
        let action = uid_of(question.action.0, question.action.1)?;
        let resource = uid(question.resource)?;
        let wrong = |e: &dyn std::fmt::Display| Refusal::malformed("/context", e.to_string());
        let mut context = Context::from_pairs(question.plain).map_err(|e| wrong(&e))?;
        if !question.context.is_empty() {
            let given = Context::from_json_value(Value::Object(question.context), None).map_err(|e| wrong(&e))?;
            context = context.merge(given).map_err(|e| wrong(&e))?;
        }
        let actions = self.actions.get(&action).cloned().unwrap_or_default();
        let request = Request::new(principal, action, resource, context, None)
            .map_err(|e| Refusal::malformed("", e.to_string()))?;
        let all =
            Entities::from_entities(actions.into_iter().chain(entities.into_iter().map(Arc::unwrap_or_clone)), None);
        let all = all.map_err(|e| Refusal::malformed("", format!("the entities do not go together: {e}")))?;
        let response = Authorizer::new().is_authorized(&request, &self.policies, &all);
        let name =
            |id: &cedar_policy::PolicyId| self.names.get(&id.to_string()).cloned().unwrap_or_else(|| id.to_string());
        let mut policies: Vec<String> = response.diagnostics().reason().map(name).collect();
        policies.sort();
        Ok(Answered {
            allowed: response.decision() == Decision::Allow,
            policies,
            errors: response.diagnostics().errors().map(ToString::to_string).collect(),
        })
    }
}

fn miette(e: &impl std::fmt::Display) -> String {
    e.to_string()
}

/// Cedar's name of an entity.
///
/// # Errors
/// 400 when the type is no Cedar name.
pub fn uid(name: &EntityName) -> Result<EntityUid, Refusal> {
    uid_of(&name.kind, &name.id)
}

fn uid_of(kind: &str, id: &str) -> Result<EntityUid, Refusal> {
    let kind = EntityTypeName::from_str(kind).map_err(|_| {
        Refusal::malformed(
            "",
            format!("{kind:?} is no entity type: write names of letters, digits and _, joined by ::"),
        )
    })?;
    Ok(EntityUid::from_type_name_and_id(kind, EntityId::new(id)))
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
    uid(name)?;
    let parents: Vec<Value> = parents.iter().map(|p| json!({"type": p.kind, "id": p.id})).collect();
    let whole = json!({"uid": {"type": name.kind, "id": name.id}, "attrs": attrs, "parents": parents});
    Entity::from_json_value(whole, schema).map_err(|e| Refusal::malformed("/attrs", e.to_string()))
}

/// A resource that is known by its name only.
///
/// # Errors
/// 400 when the type is no Cedar name.
pub fn named(name: &EntityName) -> Result<Entity, Refusal> {
    let attrs = HashMap::from([("name".to_owned(), RestrictedExpression::new_string(name.id.clone()))]);
    Entity::new(uid(name)?, attrs, std::collections::HashSet::new()).map_err(Refusal::internal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(id: &str, scopes: &[&str]) -> Arc<Entity> {
        let name = EntityName { kind: "Sop::Client".into(), id: id.into() };
        let parents: Vec<EntityName> =
            scopes.iter().map(|s| EntityName { kind: "Sop::Role".into(), id: (*s).into() }).collect();
        let attrs = json!({"name": id, "scopes": scopes, "agent_type": "system"});
        Arc::new(entity(&name, &attrs, &parents, Some(Engine::shipped().unwrap().schema())).unwrap())
    }

    fn may(registered: &[&str], token: &[&str], action: &str, kind: &str, resource: &str) -> Answered {
        let engine = Engine::shipped().unwrap();
        let principal = EntityName { kind: "Sop::Client".into(), id: "c".into() };
        let resource = EntityName { kind: format!("Sop::{kind}"), id: resource.into() };
        let context = json!({"scopes": token}).as_object().unwrap().clone();
        let mut entities = vec![client("c", registered)];
        if resource != principal {
            entities.push(Arc::new(named(&resource).unwrap()));
        }
        engine
            .ask(
                Question {
                    principal: &principal,
                    action: ("Sop::Action", action),
                    resource: &resource,
                    context,
                    plain: Vec::new(),
                },
                entities,
            )
            .unwrap()
    }

    #[test]
    fn a_scope_gives_its_group_and_nothing_else() {
        assert_eq!(may(&["state"], &["state"], "state:put", "Key", "a").policies, ["state"]);
        assert!(may(&["state:read"], &["state:read"], "state:get", "Key", "a").allowed);
        assert!(!may(&["state:read"], &["state:read"], "state:put", "Key", "a").allowed);
        assert!(!may(&["state"], &["state"], "audit:read", "Entry", "").allowed);
        assert!(may(&["audit:read"], &["audit:read"], "audit:receipt", "Entry", "1").allowed);
        assert!(!may(&[], &[], "state:get", "Key", "a").allowed);
    }

    #[test]
    fn the_token_s_scopes_count_and_the_role() {
        assert!(may(&["admin"], &["admin"], "token:register", "Client", "x").allowed);
        assert!(!may(&["admin"], &["state:read"], "token:register", "Client", "x").allowed, "a down-scoped token");
        assert!(
            !may(&["state"], &["admin"], "token:register", "Client", "x").allowed,
            "a scope that was not registered"
        );
    }

    #[test]
    fn a_client_reads_itself() {
        assert_eq!(may(&[], &[], "token:client-read", "Client", "c").policies, ["self"]);
        assert!(!may(&[], &[], "token:client-read", "Client", "d").allowed);
    }

    #[test]
    fn what_does_not_type_check_is_refused() {
        let wrong =
            "permit (principal, action == Sop::Action::\"state:put\", resource) when { resource.nam == \"x\" };";
        assert!(Engine::new(SCHEMA, wrong).err().unwrap().contains("nam"));
        assert!(Engine::new(SCHEMA, "permit (principal").is_err());
    }
}
