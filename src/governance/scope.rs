//! The scope index: of thousands of policies, the few whose scope (principal, action, resource) matches a question.
//!
//! A policy stands under one key of each part of its scope: the entity it names, the type it names, or anything. A question
//! looks under its own entity, that entity's ancestors, its type, and anything, so what it costs depends on how deep its
//! hierarchy is and not on how many policies there are. What is found is checked against the whole scope, so it is exactly
//! the policies whose conditions Cedar would look at; a property holds the answers equal to plain Cedar's.

use std::collections::HashMap;

use cedar_policy::{ActionConstraint, EntityTypeName, EntityUid, Policy, PrincipalConstraint, ResourceConstraint};

/// One part of a scope.
#[derive(Clone, Debug)]
enum Part {
    Any,
    Is(EntityTypeName),
    Eq(EntityUid),
    In(EntityUid),
    IsIn(EntityTypeName, EntityUid),
}

/// An entity of a question, with its ancestors.
pub(super) struct Placed<'a> {
    uid: &'a EntityUid,
    /// In order.
    ancestors: Vec<&'a EntityUid>,
}

impl<'a> Placed<'a> {
    pub fn new(uid: &'a EntityUid, ancestors: impl Iterator<Item = &'a EntityUid>) -> Self {
        let mut ancestors: Vec<&EntityUid> = ancestors.collect();
        ancestors.sort_unstable();
        Self { uid, ancestors }
    }

    fn is_below(&self, uid: &EntityUid) -> bool {
        self.ancestors.binary_search(&uid).is_ok()
    }

    fn is_in(&self, uid: &EntityUid) -> bool {
        self.uid == uid || self.is_below(uid)
    }
}

impl Part {
    fn matches(&self, placed: &Placed<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::Is(kind) => placed.uid.type_name() == kind,
            Self::Eq(uid) => placed.uid == uid,
            Self::In(uid) => placed.is_in(uid),
            Self::IsIn(kind, uid) => placed.uid.type_name() == kind && placed.is_in(uid),
        }
    }
}

/// What stands under the keys of one part of a scope.
#[derive(Debug)]
struct Level<T> {
    any: Option<Box<T>>,
    types: HashMap<EntityTypeName, T>,
    uids: HashMap<EntityUid, T>,
}

impl<T> Default for Level<T> {
    fn default() -> Self {
        Self { any: None, types: HashMap::new(), uids: HashMap::new() }
    }
}

impl<T: Default> Level<T> {
    fn under(&mut self, part: &Part) -> &mut T {
        match part {
            Part::Any => self.any.get_or_insert_default(),
            Part::Is(kind) => self.types.entry(kind.clone()).or_default(),
            Part::Eq(uid) | Part::In(uid) | Part::IsIn(_, uid) => self.uids.entry(uid.clone()).or_default(),
        }
    }

    fn matching<'s>(&'s self, placed: &'s Placed<'_>) -> impl Iterator<Item = &'s T> {
        let kind = if self.types.is_empty() { None } else { self.types.get(placed.uid.type_name()) };
        let own = self.uids.get(placed.uid);
        // Whichever are fewer are gone through.
        let (mut up, mut down) = (None, None);
        if placed.ancestors.len() <= self.uids.len() {
            up = Some(placed.ancestors.iter().filter_map(|uid| self.uids.get(*uid)));
        } else {
            let above = |(uid, t): (&EntityUid, &'s T)| placed.is_below(uid).then_some(t);
            down = Some(self.uids.iter().filter_map(above));
        }
        let above = up.into_iter().flatten().chain(down.into_iter().flatten());
        // An entity that is among its own ancestors would be looked under twice; what is found is made unique in the end.
        self.any.as_deref().into_iter().chain(kind).chain(own).chain(above)
    }
}

struct Scope {
    principal: Part,
    /// Any of these; none stands for any action.
    actions: Option<Vec<EntityUid>>,
    /// The action itself and not one below it.
    exactly: bool,
    resource: Part,
}

/// The scopes of a bundle's policies, by their numbers.
#[derive(Default)]
pub(super) struct Index {
    scopes: Vec<Scope>,
    by: Level<Level<Level<Vec<u32>>>>,
}

impl Index {
    /// Over these policies, numbered in their order.
    pub fn over<'a>(policies: impl IntoIterator<Item = &'a Policy>) -> Self {
        let mut index = Self::default();
        for policy in policies {
            index.add(policy);
        }
        index
    }

    fn add(&mut self, policy: &Policy) {
        let number = u32::try_from(self.scopes.len()).unwrap_or(u32::MAX);
        let principal = match policy.principal_constraint() {
            PrincipalConstraint::Any => Part::Any,
            PrincipalConstraint::In(uid) => Part::In(uid),
            PrincipalConstraint::Eq(uid) => Part::Eq(uid),
            PrincipalConstraint::Is(kind) => Part::Is(kind),
            PrincipalConstraint::IsIn(kind, uid) => Part::IsIn(kind, uid),
        };
        let resource = match policy.resource_constraint() {
            ResourceConstraint::Any => Part::Any,
            ResourceConstraint::In(uid) => Part::In(uid),
            ResourceConstraint::Eq(uid) => Part::Eq(uid),
            ResourceConstraint::Is(kind) => Part::Is(kind),
            ResourceConstraint::IsIn(kind, uid) => Part::IsIn(kind, uid),
        };
        let (actions, exactly) = match policy.action_constraint() {
            ActionConstraint::Any => (None, false),
            ActionConstraint::Eq(uid) => (Some(vec![uid]), true),
            ActionConstraint::In(uids) => (Some(uids), false),
        };
        let below = self.by.under(&principal);
        match &actions {
            None => below.under(&Part::Any).under(&resource).push(number),
            Some(uids) => {
                for uid in uids {
                    below.under(&Part::In(uid.clone())).under(&resource).push(number);
                }
            }
        }
        self.scopes.push(Scope { principal, actions, exactly, resource });
    }

    /// The numbers of the policies whose scope matches, in order.
    pub fn matching(&self, principal: &Placed<'_>, action: &Placed<'_>, resource: &Placed<'_>) -> Vec<u32> {
        let mut found = Vec::new();
        for by_action in self.by.matching(principal) {
            for by_resource in by_action.matching(action) {
                for numbers in by_resource.matching(resource) {
                    found.extend(numbers.iter().filter(|n| self.holds(**n, principal, action, resource)));
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    fn holds(&self, number: u32, principal: &Placed<'_>, action: &Placed<'_>, resource: &Placed<'_>) -> bool {
        self.misses(number, principal, action, resource).iter().all(|miss| !miss)
    }

    /// Which parts of a policy's scope do not match: principal, action, resource.
    pub fn misses(&self, number: u32, principal: &Placed<'_>, action: &Placed<'_>, resource: &Placed<'_>) -> [bool; 3] {
        let Some(scope) = self.scopes.get(number as usize) else { return [true; 3] };
        let fits = |uid: &EntityUid| if scope.exactly { action.uid == uid } else { action.is_in(uid) };
        let acts = scope.actions.as_ref().is_none_or(|uids| uids.iter().any(fits));
        [!scope.principal.matches(principal), !acts, !scope.resource.matches(resource)]
    }
}
