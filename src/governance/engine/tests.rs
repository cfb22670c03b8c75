use super::*;
use crate::governance::compiled::{SYSTEM, Source};
use proptest::prelude::*;

fn compiled(policies: &str, schema: Option<&str>) -> Result<Compiled, Vec<crate::kernel::Fault>> {
    Compiled::new("b", &Source { policies: policies.to_owned(), schema: schema.map(str::to_owned) }, false)
}

fn shipped() -> Force {
    static SHIPPED: std::sync::LazyLock<Arc<Compiled>> = std::sync::LazyLock::new(|| {
        let source = Source { policies: SYSTEM.to_owned(), schema: None };
        Arc::new(Compiled::new("system", &source, true).unwrap())
    });
    Force::new(SHIPPED.clone(), None)
}

fn client(id: &str, scopes: &[&str]) -> Arc<Entity> {
    let name = EntityName { kind: "Sop::Client".into(), id: id.into() };
    let parents: Vec<EntityName> =
        scopes.iter().map(|s| EntityName { kind: "Sop::Role".into(), id: (*s).into() }).collect();
    let attrs = json!({"name": id, "scopes": scopes, "agent_type": "system"});
    Arc::new(entity(&name, &attrs, &parents, Some(&shipped().system().schema)).unwrap())
}

fn may(registered: &[&str], token: &[&str], action: &str, kind: &str, resource: &str) -> Answered {
    let engine = shipped();
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
    assert!(!may(&["state"], &["admin"], "token:register", "Client", "x").allowed, "a scope that was not registered");
}

#[test]
fn a_client_reads_itself() {
    assert_eq!(may(&[], &[], "token:client-read", "Client", "c").policies, ["self"]);
    assert!(!may(&[], &[], "token:client-read", "Client", "d").allowed);
}

#[test]
fn faults_have_a_place() {
    let schema = "entity user; entity doc { level: Long }; action view appliesTo { principal: [user], resource: [doc], context: {} };";
    let wrong = "permit (principal, action == Action::\"view\", resource)\n  when { resource.nam == \"x\" };";
    let faults = compiled(wrong, Some(schema)).err().unwrap();
    assert_eq!((faults[0].pointer.as_str(), faults[0].line, faults[0].column), ("/policies", Some(2), Some(10)));
    assert!(faults[0].detail.contains("nam"), "{faults:?}");
    let faults =
        compiled("permit (principal, action, resource);\npermit (principl, action, resource);", None).err().unwrap();
    assert_eq!((faults[0].line, faults[0].column), (Some(2), Some(9)), "{faults:?}");
    assert_eq!(compiled("permit (principal == ?principal, action, resource);", None).err().unwrap().len(), 1);
    let twice = "@id(\"a\") permit (principal, action, resource); @id(\"a\") forbid (principal, action, resource);";
    assert_eq!(compiled(twice, None).err().unwrap().len(), 1);
    assert_eq!(compiled("", Some("entity user {")).err().unwrap()[0].pointer, "/schema");
    assert!(
        compiled("", Some("namespace Sop { entity Key; }")).is_err(),
        "the shipped namespace is not an application's"
    );
}

#[test]
fn what_a_schema_declares_is_known() {
    let schema = "namespace Todo { type Call = { mfa?: Bool }; entity User; entity Item { owner: User }; action read appliesTo { principal: [User], resource: [Item], context: Call }; }";
    let bundle = compiled("", Some(schema)).unwrap();
    assert_eq!(bundle.action_type, "Todo::Action");
    let given = ["owner".to_owned(), "color".to_owned()];
    assert_eq!(bundle.undeclared("Todo::Item", given.iter()), ["color"]);
    assert_eq!(bundle.undeclared("Other", given.iter()), Vec::<String>::new());
    let read = uid_of("Todo::Action", "read").unwrap();
    assert_eq!(bundle.undeclared_context(&read, ["mfa".to_owned(), "ip".to_owned()].iter()), ["ip"]);
}

fn attribute() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z_]{0,3}".prop_map(Value::from),
        Just(json!(null)),
        Just(json!(1.5)),
        Just(json!(u64::MAX)),
        Just(json!({"__entity": {"type": "N::user", "id": "x"}})),
        Just(json!({"__entity": {"type": "no type", "id": "x"}})),
        Just(json!({"__entity": {"type": "user", "id": "x", "more": 1}})),
        Just(json!({"type": "user", "id": "x"})),
        Just(json!({"__extn": {"fn": "ip", "arg": "10.0.0.1"}})),
        Just(json!({"__extn": {"fn": "ip", "arg": "nowhere"}})),
        Just(json!({"__expr": "1 + 1"})),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{0,3}", inner, 0..3).prop_map(|m| json!(m)),
        ]
    })
}

proptest! {
    /// What is read without Cedar's JSON is what Cedar reads.
    #[test]
    fn plain_attributes_are_cedar_s(attrs in prop::collection::btree_map("[a-z_]{0,3}", attribute(), 0..4), parents in 0..3usize) {
        let parents: Vec<EntityName> = (0..parents).map(name).collect();
        let own = name(5);
        let attrs = json!(attrs);
        let above: Vec<Value> = parents.iter().map(|p| json!({"type": p.kind, "id": p.id})).collect();
        let cedar = Entity::from_json_value(json!({"uid": {"type": own.kind, "id": own.id}, "attrs": attrs, "parents": above}), None);
        match (entity(&own, &attrs, &parents, None), cedar) {
            (Ok(ours), Ok(theirs)) => {
                prop_assert!(ours.deep_eq(&theirs), "{attrs}");
                prop_assert_eq!(&ours.to_json_value().unwrap()["attrs"], &theirs.to_json_value().unwrap()["attrs"]);
            }
            (ours, theirs) => prop_assert_eq!(ours.is_err(), theirs.is_err(), "{}", attrs),
        }
        let members = attrs.as_object().unwrap();
        let ours = context(Vec::new(), members.clone()).map(|c| c.to_json_value().unwrap());
        let theirs = Context::from_json_value(attrs.clone(), None).map(|c| c.to_json_value().unwrap());
        prop_assert_eq!(ours.ok(), theirs.ok());
    }
}

/// Entities a0..a5 of two types, each in some of those before it.
fn world() -> impl Strategy<Value = Vec<Vec<usize>>> {
    prop::collection::vec(prop::collection::vec(0..6usize, 0..3), 6)
}

fn name(i: usize) -> EntityName {
    EntityName { kind: if i.is_multiple_of(2) { "user" } else { "N::group" }.to_owned(), id: format!("e{i}") }
}

fn part(variable: &'static str) -> impl Strategy<Value = String> {
    let literal = |i: usize| format!("{}::\"e{i}\"", name(i).kind);
    (0..6u8, 0..6usize, 0..2u8).prop_map(move |(form, i, kind)| {
        let kind = if kind == 0 { "user" } else { "N::group" };
        match form {
            0 | 1 => variable.to_owned(),
            2 => format!("{variable} == {}", literal(i)),
            3 => format!("{variable} in {}", literal(i)),
            4 => format!("{variable} is {kind}"),
            _ => format!("{variable} is {kind} in {}", literal(i)),
        }
    })
}

fn policy() -> impl Strategy<Value = String> {
    let action = prop_oneof![
        Just("action".to_owned()),
        (0..4usize).prop_map(|i| format!("action == Action::\"a{i}\"")),
        (0..4usize).prop_map(|i| format!("action in Action::\"a{i}\"")),
        (0..4usize, 0..4usize).prop_map(|(i, j)| format!("action in [Action::\"a{i}\", Action::\"a{j}\"]")),
    ];
    let condition = prop_oneof![
        Just(String::new()),
        (0..4i64).prop_map(|n| format!(" when {{ context.n < {n} }}")),
        Just(" unless { principal == resource }".to_owned()),
        Just(" when { principal.missing }".to_owned()),
    ];
    (any::<bool>(), part("principal"), action, part("resource"), condition)
        .prop_map(|(permit, p, a, r, c)| format!("{} ({p}, {a}, {r}){c};", if permit { "permit" } else { "forbid" }))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    /// The index narrows and changes nothing: decision, determining policies and errors are plain Cedar's over all policies.
    #[test]
    fn the_index_agrees_with_plain_cedar(
        policies in prop::collection::vec(policy(), 0..24),
        parents in world(),
        asked in (0..6usize, 0..5usize, 0..6usize, 0..4i64),
    ) {
        let (p, a, r, n) = asked;
        let text = policies.join("\n");
        let force = Force::new(shipped().system, Some(Arc::new(compiled(&text, None).unwrap())));
        let entities: Vec<Arc<Entity>> = (0..6)
            .map(|i| {
                let above: Vec<EntityName> = parents[i].iter().filter(|j| **j < i).map(|j| name(*j)).collect();
                Arc::new(entity(&name(i), &json!({}), &above, None).unwrap())
            })
            .chain([
                Arc::new(entity(&EntityName { kind: "Action".into(), id: "a3".into() }, &json!({}), &[EntityName { kind: "Action".into(), id: "a0".into() }], None).unwrap()),
            ])
            .collect();
        let (principal, resource) = (name(p), name(r));
        let action = format!("a{a}");
        let question = Question {
            principal: &principal,
            action: ("Action", &action),
            resource: &resource,
            context: json!({"n": n}).as_object().unwrap().clone(),
            plain: Vec::new(),
        };
        let anew = Entities::from_entities(entities.iter().map(|e| e.as_ref().clone()), None).unwrap();
        let put = force.put(question, entities).unwrap();
        for e in anew.iter() {
            let above = |all: &Entities| all.ancestors(&e.uid()).unwrap().cloned().collect::<std::collections::BTreeSet<_>>();
            prop_assert_eq!(above(&anew), above(&put.entities));
        }
        let answered = force.answer(&put).unwrap();
        let mut all = PolicySet::new();
        for rule in force.system.rules.iter().chain(&force.application.as_ref().unwrap().rules) {
            all.add(rule.policy.clone()).unwrap();
        }
        let plain = Authorizer::new().is_authorized(&put.request, &all, &put.entities);
        let mut reasons: Vec<String> = plain.diagnostics().reason().map(|id| force.rule(id).unwrap().name.clone()).collect();
        reasons.sort();
        prop_assert_eq!(answered.allowed, plain.decision() == Decision::Allow);
        prop_assert_eq!(&answered.policies, &reasons);
        prop_assert_eq!(answered.errors.len(), plain.diagnostics().errors().count());
    }
}

#[test]
fn a_deep_hierarchy_is_closed_over_in_time() {
    // With the stack that every thread of the daemon has.
    let thread = std::thread::Builder::new().stack_size(crate::kernel::supervisor::STACK).spawn(deep);
    thread.unwrap().join().unwrap();
}

fn deep() {
    let force = shipped();
    let group = |n: usize| EntityName { kind: "group".into(), id: n.to_string() };
    let entities =
        |n| (0..n).map(|i| Arc::new(entity(&group(i), &json!({}), &[group(i + 1)], None).unwrap())).collect();
    let (who, what) = (group(0), group(10));
    let put = |n: usize| {
        let clock = crate::kernel::Clock::system();
        let began = clock.elapsed();
        let (action, context) = (("Action", "view"), Map::new());
        let question = Question { principal: &who, action, resource: &what, context, plain: Vec::new() };
        let put = force.put(question, entities(n)).unwrap();
        assert_eq!(put.entities.ancestors(&put.principal).unwrap().count(), n, "all there are above");
        clock.elapsed() - began
    };
    put(CLOSED_ANEW);
    put(CLOSED_ANEW + 1);
    // To add as many to what is there would take minutes.
    let took = put(900);
    assert!(took < std::time::Duration::from_secs(10), "{took:?}");
}

#[test]
fn a_policy_of_the_same_name_lends_nobody_its_marks() {
    let source = |policies: &str| Source { policies: policies.to_owned(), schema: None };
    let marked = r#"@id("x") @stale_ok("7d") permit (principal, action, resource == Sop::Role::"a");
        @id("y") @approvals("2") forbid (principal, action, resource == Sop::Role::"z");"#;
    let own = r#"@id("x") permit (principal, action, resource == Sop::Role::"b");
        @id("y") permit (principal, action, resource == Sop::Role::"b");"#;
    let system = Arc::new(Compiled::new("s", &source(marked), true).unwrap());
    let force = Force::new(system, Some(Arc::new(compiled(own, None).unwrap())));
    let asked = |user: &str| {
        let who = EntityName { kind: "Sop::Role".into(), id: user.into() };
        let (action, context) = (("Sop::Action", "state:get"), Map::new());
        let question = Question { principal: &who, action, resource: &who, context, plain: Vec::new() };
        force.answer_while(&force.put(question, Vec::new()).unwrap()).unwrap()
    };
    let week = std::time::Duration::from_secs(7 * 86_400);
    assert_eq!(asked("a").1, Some(week));
    let (answered, stale) = asked("b");
    assert!(answered.allowed && answered.policies == ["x", "y"] && stale.is_none(), "{answered:?} {stale:?}");
    assert_eq!(asked("c").1, None, "what nobody determined is not given");
    let approvals = force.all_named("y").filter_map(|r| r.policy.annotation("approvals"));
    assert_eq!(approvals.collect::<Vec<_>>(), ["2"]);
}
