//! A question about many elements, as a search asks it: what is the same for all of them is put to Cedar once, and each element is
//! added to that. What is then answered is answered by the engine as it answers a single question.

use std::sync::Arc;

use cedar_policy::{Entities, EntityUid, Request};

use crate::kernel::Refusal;
use crate::kernel::web::EntityName;

use super::authzen::Evaluation;
use super::engine::{self, CLOSED_ANEW, Put};
use super::rules;
use super::snapshot::{InForce, REACH, Snapshot};

/// Which part of the question the elements are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Varies {
    Subject,
    Resource,
}

/// The question, as of one state of the snapshot.
pub(super) struct Series<'a> {
    snapshot: &'a Snapshot,
    version: u64,
    in_force: Arc<InForce>,
    varies: Varies,
    asked: &'a Evaluation,
    /// Without any element.
    base: Put,
}

impl<'a> Series<'a> {
    /// Prepares a question. `None` where elements differ by more than what they are and reach, or where one alone could say more
    /// about what is wrong: each is then asked about by itself.
    pub fn new(snapshot: &'a Snapshot, asked: &'a Evaluation, varies: Varies) -> Option<Self> {
        // Before anything is read: what changes from here on ends the series.
        let version = snapshot.version();
        let in_force = snapshot.force();
        let element = if varies == Varies::Subject { &asked.subject } else { &asked.resource };
        // A canary is for some subjects, and a client is asked about with the scopes it is registered with.
        let own = varies == Varies::Subject && (in_force.canary.is_some() || element.name.kind.starts_with("Sop::"));
        if own || !element.properties.is_empty() {
            return None;
        }
        let mut base = rules::put(in_force.of(&asked.subject.name), snapshot, asked).ok()?.0;
        if snapshot.held(&element.name).is_none() {
            // Nobody's: it only stands where elements will.
            let uid = engine::uid(&element.name).ok()?;
            base.entities = base.entities.remove_entities([uid]).ok()?;
        }
        Some(Self { snapshot, version, in_force, varies, asked, base })
    }

    /// Whether it is permitted of this element. `None` where the series has ended, or the element reaches too much: it is asked
    /// about by itself.
    pub fn permits(&self, id: &str) -> Option<bool> {
        let kind = if self.varies == Varies::Subject { &self.asked.subject } else { &self.asked.resource };
        let name = EntityName { kind: kind.name.kind.clone(), id: id.to_owned() };
        let slice = self.snapshot.slice(&[&name], &[]).ok()?;
        if self.snapshot.version() != self.version || self.base.reached + slice.names.len() > REACH {
            return None;
        }
        if self.base.entities.len() + slice.entities.len() > CLOSED_ANEW {
            return None;
        }
        let new = slice.entities.iter().filter(|e| self.base.entities.get(&e.uid()).is_none());
        let entities = self.base.entities.clone().add_entities(new.map(|e| e.as_ref().clone()), None).ok()?;
        let put = self.about(engine::uid(&name).ok()?, entities).ok()?;
        Some(self.in_force.of(&self.asked.subject.name).answer(&put).is_ok_and(|a| a.allowed))
    }

    fn about(&self, element: EntityUid, entities: Entities) -> Result<Put, Refusal> {
        let (mut principal, mut resource) = (self.base.principal.clone(), self.base.resource.clone());
        match self.varies {
            Varies::Subject => principal = element,
            Varies::Resource => resource = element,
        }
        let context = self.base.request.context().cloned().unwrap_or_else(cedar_policy::Context::empty);
        let action = self.base.action.clone();
        let request = Request::new(principal.clone(), action.clone(), resource.clone(), context, None);
        let request = request.map_err(|e| Refusal::malformed("", e.to_string()))?;
        Ok(Put { principal, action, resource, request, entities, reached: 0 })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::governance::authzen::Thing;
    use crate::governance::compiled::{Compiled, Source};
    use crate::governance::snapshot::Held;

    fn name(i: usize) -> EntityName {
        EntityName { kind: ["user", "doc"][i % 2].to_owned(), id: format!("e{i}") }
    }

    fn literal(i: usize) -> String {
        format!("{}::\"e{i}\"", name(i).kind)
    }

    fn policy() -> impl Strategy<Value = String> {
        let part = |variable: &'static str| {
            (0..5u8, 0..9usize).prop_map(move |(form, i)| match form {
                0 | 1 => variable.to_owned(),
                2 => format!("{variable} == {}", literal(i)),
                3 => format!("{variable} in {}", literal(i)),
                _ => format!("{variable} is {}", name(i).kind),
            })
        };
        let condition = prop_oneof![
            Just("when { resource has level && principal has level && resource.level <= principal.level }".to_owned()),
            (0..9usize).prop_map(|i| format!("when {{ resource has owner && resource.owner in {} }}", literal(i))),
            (0..9usize).prop_map(|i| format!("unless {{ principal has owner && principal.owner == {} }}", literal(i))),
            Just("when { resource.owner.level > 1 }".to_owned()),
            Just("when { context has n && context.n == 1 }".to_owned()),
        ];
        (any::<bool>(), part("principal"), part("resource"), condition).prop_map(|(permit, p, r, c)| {
            format!("{} ({p}, action, {r}) {c};", if permit { "permit" } else { "forbid" })
        })
    }

    /// What it is in, its level, its owner.
    type Made = (Vec<usize>, Option<i64>, Option<usize>);

    /// Entities in some of those before them, with an owner that may not be there.
    fn world() -> impl Strategy<Value = BTreeMap<usize, Made>> {
        let entity = (prop::collection::vec(0..9usize, 0..3), prop::option::of(0..4i64), prop::option::of(0..9usize));
        prop::collection::btree_map(0..9usize, entity, 2..9)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        /// Of each element the series says what is said of it alone.
        #[test]
        fn a_series_is_its_questions(
            policies in prop::collection::vec(policy(), 0..8),
            world in world(),
            fixed in 0..9usize,
            level in prop::option::of(0..4i64),
            n in prop::option::of(0..2i64),
            subjects in any::<bool>(),
        ) {
            let source = Source { policies: policies.join("\n"), schema: None };
            let entities = world.iter().map(|(i, (parents, level, owner))| {
                let parents = parents.iter().filter(|p| *p < i).map(|p| name(*p)).collect();
                let mut attrs = Map::new();
                attrs.extend(level.map(|level| ("level".to_owned(), json!(level))));
                attrs.extend(owner.map(|o| ("owner".to_owned(), json!({"__entity": {"type": name(o).kind, "id": name(o).id}}))));
                (name(*i), Held::new(&name(*i), &Value::Object(attrs), parents).unwrap())
            });
            let snapshot = Snapshot::of(Compiled::new("a", &source, false).unwrap(), entities.collect());
            let properties: Map<String, Value> = level.map(|l| ("level".to_owned(), json!(l))).into_iter().collect();
            let fixed = Thing { name: name(fixed), properties };
            for kind in ["user", "doc"] {
                let element = Thing { name: EntityName { kind: kind.to_owned(), id: "?".to_owned() }, properties: Map::new() };
                let (subject, resource) = if subjects { (element, fixed.clone()) } else { (fixed.clone(), element) };
                let context = n.map(|n| ("n".to_owned(), json!(n))).into_iter().collect();
                let action = ("view".to_owned(), Map::new());
                let mut asked = Evaluation { subject, action, resource, context, explain: false, asked: String::new() };
                let all = snapshot.ids(kind, None, 100);
                let varies = if subjects { Varies::Subject } else { Varies::Resource };
                let series = Series::new(&snapshot, &asked, varies).unwrap();
                let together: Vec<Option<bool>> = all.iter().map(|id| series.permits(id)).collect();
                drop(series);
                for (id, together) in all.iter().zip(together) {
                    id.clone_into(if subjects { &mut asked.subject.name.id } else { &mut asked.resource.name.id });
                    let alone = rules::evaluate(&snapshot.force().active, &snapshot, &asked);
                    prop_assert_eq!(together, alone.ok().map(|e| e.answered.allowed), "{:?}", id);
                }
            }
        }
    }
}
