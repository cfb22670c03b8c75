//! A bundle, parsed once: its policies with their scope index, its schema, and what the schema declares.

use std::collections::{BTreeSet, HashMap};
use std::str::FromStr as _;
use std::time::Duration;

use cedar_policy::{
    Entities, Entity, EntityUid, Policy, PolicyId, PolicySet, Schema, SchemaFragment, ValidationMode, Validator,
};
use miette::Diagnostic;
use serde_json::Value;

use crate::kernel::Fault;

use super::scope::Index;
use super::text;

/// The shipped schema.
pub const SCHEMA: &str = include_str!("../../config/policies/sop.cedarschema");
/// The shipped policies.
pub const SYSTEM: &str = include_str!("../../config/policies/system.cedar");

/// What is compiled.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// Cedar text, or Cedar's JSON of a policy set.
    pub policies: String,
    /// A schema in Cedar's text or JSON, beside the shipped one.
    pub schema: Option<String>,
}

/// A policy of a bundle.
pub struct Rule {
    /// As the bundle calls it: its `@id`, else Cedar's own.
    pub name: String,
    /// What it says.
    pub policy: Policy,
    /// How old what is known may be for a decision of it to be given while the store is away (`@stale_ok`); `None`: never.
    pub stale_ok: Option<Duration>,
}

/// A bundle, parsed once.
pub struct Compiled {
    /// Its id.
    pub id: String,
    pub(super) rules: Vec<Rule>,
    pub(super) index: Index,
    pub(super) schema: Schema,
    /// The bundle has a schema, and was held to it.
    pub validated: bool,
    /// Each action with the groups it is in. A question brings only its own: closing over all of them anew for each question
    /// cost more than deciding it.
    pub(super) actions: HashMap<EntityUid, Entities>,
    /// What an action's name is in: `Action`, or `Todo::Action` where the schema has a namespace.
    pub(super) action_type: String,
    declared: Declared,
    /// What does no harm and is worth knowing.
    pub warnings: Vec<Fault>,
}

/// Attributes and context members that a schema declares.
#[derive(Default)]
struct Declared {
    entities: HashMap<String, BTreeSet<String>>,
    contexts: HashMap<EntityUid, BTreeSet<String>>,
}

impl Compiled {
    /// Parses a bundle and holds it to its schema, strictly. An application's bundle without a schema is parsed only.
    ///
    /// # Errors
    /// With every fault, where it is and what is wrong.
    pub fn new(id: &str, source: &Source, system: bool) -> Result<Self, Vec<Fault>> {
        let mut fragments = vec![fragment("/schema", SCHEMA)?];
        if let Some(own) = &source.schema {
            fragments.push(fragment("/schema", own)?);
        }
        let declared = Declared::of(&fragments);
        let action_type = action_type(fragments.get(1));
        let schema = Schema::from_schema_fragments(fragments)
            .map_err(|e| located("/schema", source.schema.as_deref().unwrap_or(SCHEMA), &e))?;
        let set = parse(&source.policies)?;
        let validated = system || source.schema.is_some();
        let mut warnings = Vec::new();
        if validated {
            let checked = Validator::new(schema.clone()).validate(&set, ValidationMode::Strict);
            let faults: Vec<Fault> = checked
                .validation_errors()
                .flat_map(|e| called(&set, e.policy_id(), located("/policies", &source.policies, e)))
                .collect();
            if !faults.is_empty() {
                return Err(faults);
            }
            warnings = checked
                .validation_warnings()
                .flat_map(|w| called(&set, w.policy_id(), located("/policies", &source.policies, w)))
                .collect();
        }
        let rules = rules(&set, &source.policies, if system { 's' } else { 'a' })?;
        let index = Index::over(rules.iter().map(|r| &r.policy));
        let all = schema.action_entities().map_err(|e| vec![Fault::new("/schema", e.to_string())])?;
        let actions = all.iter().map(|a| Ok((a.uid(), with_groups(&all, a)?))).collect::<Result<_, Vec<Fault>>>()?;
        Ok(Self { id: id.to_owned(), rules, index, schema, validated, actions, action_type, declared, warnings })
    }

    /// How many policies.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Members of `given` that the schema does not declare for entities of this type; none where it does not know the type.
    pub(super) fn undeclared<'g>(&self, kind: &str, given: impl Iterator<Item = &'g String>) -> Vec<String> {
        let Some(known) = self.declared.entities.get(kind).filter(|_| self.validated) else { return Vec::new() };
        given.filter(|name| !known.contains(*name)).cloned().collect()
    }

    /// The same of a context.
    pub(super) fn undeclared_context<'g>(
        &self,
        action: &EntityUid,
        given: impl Iterator<Item = &'g String>,
    ) -> Vec<String> {
        let Some(known) = self.declared.contexts.get(action).filter(|_| self.validated) else { return Vec::new() };
        given.filter(|name| !known.contains(*name)).cloned().collect()
    }
}

fn with_groups(all: &Entities, action: &Entity) -> Result<Entities, Vec<Fault>> {
    let groups = all.ancestors(&action.uid()).into_iter().flatten().filter_map(|group| all.get(group)).cloned();
    let whole = Entities::from_entities(std::iter::once(action.clone()).chain(groups), None);
    whole.map_err(|e| vec![Fault::new("/schema", e.to_string())])
}

/// The policies under ids that two bundles cannot share.
fn rules(set: &PolicySet, text: &str, scope: char) -> Result<Vec<Rule>, Vec<Fault>> {
    if let Some(template) = set.templates().next() {
        let detail = format!("{} is a template; a bundle takes policies without slots", template.id());
        return Err(vec![Fault::new("/policies", detail)]);
    }
    let mut all: Vec<&Policy> = set.policies().collect();
    // Cedar numbers policies in the order of the text, and gives them in none.
    let number = |p: &Policy| p.id().to_string().strip_prefix("policy").and_then(|n| n.parse::<u64>().ok());
    all.sort_by_cached_key(|p| (number(p).is_none(), number(p), p.id().to_string()));
    let (mut names, mut written) = (BTreeSet::new(), None);
    let (mut rules, mut faults) = (Vec::with_capacity(all.len()), Vec::new());
    for (n, policy) in all.into_iter().enumerate() {
        let name = policy.annotation("id").map_or_else(|| policy.id().to_string(), str::to_owned);
        let mut wrong = |detail: String| {
            let mut fault = Fault::new("/policies", detail);
            let written = written.get_or_insert_with(|| text::statements(text));
            if let Some(own) = written.get(n) {
                (fault.line, fault.column) = (Some(own.line), Some(own.column));
            }
            faults.push(fault);
        };
        if !names.insert(name.clone()) {
            wrong(format!("two policies are called {name:?}"));
        }
        let marked = policy.annotation("stale_ok");
        let stale_ok = marked.and_then(span);
        if marked.is_some() && stale_ok.is_none() {
            wrong(format!("{name}: @stale_ok is a time such as \"90s\", \"15m\", \"72h\", \"7d\""));
        }
        rules.push(Rule { name, policy: policy.new_id(PolicyId::new(format!("{scope}{n}"))), stale_ok });
    }
    if faults.is_empty() { Ok(rules) } else { Err(faults) }
}

/// `90s`, `15m`, `72h`, `7d`.
pub(super) fn span(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let each = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    Some(Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(each)?))
}

fn parse(text: &str) -> Result<PolicySet, Vec<Fault>> {
    if text.trim_start().starts_with('{') {
        return PolicySet::from_json_str(text).map_err(|e| located("/policies", text, &e));
    }
    PolicySet::from_str(text).map_err(|errors| errors.iter().flat_map(|e| located("/policies", text, e)).collect())
}

fn fragment(at: &str, text: &str) -> Result<SchemaFragment, Vec<Fault>> {
    if text.trim_start().starts_with('{') {
        return SchemaFragment::from_json_str(text).map_err(|e| located(at, text, &e));
    }
    SchemaFragment::from_cedarschema_str(text).map(|(fragment, _)| fragment).map_err(|e| located(at, text, &e))
}

/// What an error says, and where in the text.
fn located(pointer: &str, text: &str, error: &(impl Diagnostic + ?Sized)) -> Vec<Fault> {
    let mut detail = error.to_string();
    if let Some(help) = error.help() {
        detail = format!("{detail}; {help}");
    }
    let mut fault = Fault::new(pointer, detail);
    let offset = error.labels().and_then(|mut labels| labels.next()).map(|label| label.offset());
    if let Some(before) = offset.and_then(|at| text.get(..at)) {
        let line = before.bytes().filter(|b| *b == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        fault.line = u32::try_from(line).ok();
        fault.column = u32::try_from(column).ok();
    }
    let mut faults = vec![fault];
    faults.extend(error.related().into_iter().flatten().flat_map(|e| located(pointer, text, e)));
    faults
}

/// What Cedar says of a policy by its number, by its name.
fn called(set: &PolicySet, id: &PolicyId, mut faults: Vec<Fault>) -> Vec<Fault> {
    if let Some(name) = set.policy(id).and_then(|policy| policy.annotation("id")) {
        let (number, name) = (format!("for policy `{id}`"), format!("for policy `{name}`"));
        faults.iter_mut().for_each(|f| f.detail = f.detail.replacen(&number, &name, 1));
    }
    faults
}

/// What actions are in: the one namespace of the schema that has some.
fn action_type(own: Option<&SchemaFragment>) -> String {
    let json = own.and_then(|f| f.clone().to_json_value().ok()).unwrap_or_default();
    let with_actions = json
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, n)| n["actions"].as_object().is_some_and(|actions| !actions.is_empty()));
    let names: Vec<&String> = with_actions.map(|(name, _)| name).collect();
    match names[..] {
        [name] if !name.is_empty() => format!("{name}::Action"),
        _ => "Action".to_owned(),
    }
}

impl Declared {
    fn of(fragments: &[SchemaFragment]) -> Self {
        let mut declared = Self::default();
        for json in fragments.iter().filter_map(|f| f.clone().to_json_value().ok()) {
            for (namespace, body) in json.as_object().into_iter().flatten() {
                declared.take(namespace, body);
            }
        }
        declared
    }

    fn take(&mut self, namespace: &str, body: &Value) {
        let full = |name: &str| if namespace.is_empty() { name.to_owned() } else { format!("{namespace}::{name}") };
        for (name, entity) in body["entityTypes"].as_object().into_iter().flatten() {
            let shape = if entity["shape"].is_null() {
                Some(BTreeSet::new())
            } else {
                members(&entity["shape"], namespace, body)
            };
            if let Some(members) = shape {
                self.entities.insert(full(name), members);
            }
        }
        for (name, action) in body["actions"].as_object().into_iter().flatten() {
            let context = &action["appliesTo"]["context"];
            let members = if context.is_null() { Some(BTreeSet::new()) } else { members(context, namespace, body) };
            let uid = EntityUid::from_str(&format!("{}::{}", full("Action"), Value::from(name.as_str())));
            if let (Some(members), Ok(uid)) = (members, uid) {
                self.contexts.insert(uid, members);
            }
        }
    }
}

/// The members of a record type; `None` where it cannot be told.
fn members(shape: &Value, namespace: &str, body: &Value) -> Option<BTreeSet<String>> {
    if shape["type"] == "Record" {
        return Some(shape["attributes"].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect());
    }
    let named = if shape["type"] == "EntityOrCommon" || shape["type"] == "CommonType" {
        &shape["name"]
    } else {
        &shape["type"]
    };
    let name = named.as_str()?;
    let own = name.strip_prefix(namespace).and_then(|n| n.strip_prefix("::")).unwrap_or(name);
    members(body["commonTypes"].get(own)?, namespace, body)
}
