//! A bundle on disk: `sop policy lint|test|diff` without a daemon, `draft` and `validate` with one.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cases::case;
use crate::policy::{SCHEMA, VIEW, start};
use crate::support::reaper;
use crate::support::record;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/policies/example");

/// Without a daemon and without the means to find one: exit code, stdout, stderr.
async fn sop(args: &[&str]) -> (i32, String, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.env_clear().current_dir("/").args(args);
    let done = command.output().await.unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

/// A folder with these files.
fn folder(files: &[(&str, &str)]) -> PathBuf {
    let dir = reaper::folder("p");
    for (name, text) in files {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

fn with_cases(cases: &Value) -> PathBuf {
    folder(&[("a.cedar", VIEW), ("s.cedarschema", SCHEMA), ("tests/a.json", &cases.to_string())])
}

fn at(dir: &Path) -> &str {
    dir.to_str().unwrap()
}

/// The tags of an XML document with their attributes, and whether it is well formed.
fn tags(xml: &str) -> Vec<(String, Vec<(String, String)>)> {
    let text = |t: &str| {
        assert!(!t.contains('<') && t.chars().all(|c| c >= ' ' || c == '\n'), "{t:?}");
        let mut out = String::new();
        let mut parts = t.split('&');
        out.push_str(parts.next().unwrap());
        for part in parts {
            let (name, rest) = part.split_once(';').unwrap_or_else(|| panic!("a bare & in {t:?}"));
            let number = name.strip_prefix('#').and_then(|n| char::from_u32(n.parse().ok()?));
            out.push(match name {
                "amp" => '&',
                "lt" => '<',
                "gt" => '>',
                "quot" => '"',
                "apos" => '\'',
                _ => number.unwrap_or_else(|| panic!("&{name}; in {t:?}")),
            });
            out.push_str(rest);
        }
        out
    };
    let mut rest = xml.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n").unwrap();
    let (mut open, mut found) = (Vec::new(), Vec::new());
    while let Some((before, after)) = rest.split_once('<') {
        text(before);
        let (tag, after) = after.split_once('>').unwrap();
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let closed = tag.ends_with('/');
        let (name, mut attributes) =
            tag.trim_end_matches('/').split_once(' ').unwrap_or((tag.trim_end_matches('/'), ""));
        let mut pairs = Vec::new();
        while !attributes.trim().is_empty() {
            let (key, value) = attributes.trim().split_once("=\"").unwrap();
            let (value, after) = value.split_once('"').unwrap();
            pairs.push((key.to_owned(), text(value)));
            attributes = after;
        }
        found.push((name.to_owned(), pairs));
        if !closed {
            open.push(name.to_owned());
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{xml}");
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_is_tested_without_a_daemon_and_covered_whole() {
    let (code, said, _) = sop(&["policy", "test", EXAMPLE, "--strict", "--min-coverage", "100"]).await;
    assert_eq!((code, said.as_str()), (0, "13 passed, 0 failed\n6 of 6 policies covered\n"));
    let (code, said, _) = sop(&["policy", "lint", EXAMPLE, "--strict"]).await;
    assert_eq!((code, said.as_str()), (0, "0 errors, 0 warnings\n"));
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config/policies/system.cedar");
    assert_eq!(sop(&["policy", "lint", "--system", shipped]).await.0, 0, "what is shipped holds as well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_case_is_told_and_reported_for_ci() {
    let name = "<b> & \"q\" ' ]]> 🦀 \u{fffe}";
    let mut off = case("off the schema", &["g"], "vieww", 1, false);
    off["request"]["context"] = json!({"x": 1});
    let dir =
        with_cases(&json!([case("staff view", &["g"], "view", 3, true), case(name, &["g"], "view", 4, true), off]));
    let report = dir.join("junit.xml");
    let (code, said, refused) = sop(&["policy", "test", at(&dir), "--junit", report.to_str().unwrap()]).await;
    let file = format!("{}/tests/a.json", at(&dir));
    assert_eq!((code, refused.as_str()), (1, "sop: 1 of 3 cases do not come out as they must\n"));
    let lines: Vec<&str> = said.lines().collect();
    let why = "no policy permits it; view would, but for when { resource.level <= 3 }";
    assert_eq!(lines[0], format!("{file}: FAIL {name}: expected permit, decided deny: {why}"));
    assert!(lines[1].starts_with(&format!("{file}: warning: off the schema: ")), "{said}");
    assert_eq!(lines[lines.len() - 2..], ["2 passed, 1 failed", "1 of 1 policies covered"]);
    let xml = tags(&std::fs::read_to_string(&report).unwrap());
    let value =
        |tag: &(String, Vec<(String, String)>), key: &str| tag.1.iter().find(|(k, _)| k == key).unwrap().1.clone();
    assert_eq!(
        (xml[0].0.as_str(), value(&xml[0], "tests"), value(&xml[0], "failures")),
        ("testsuites", "3".into(), "1".into())
    );
    let cases: Vec<String> = xml.iter().filter(|t| t.0 == "testcase").map(|t| value(t, "name")).collect();
    assert_eq!(cases, ["staff view", &name.replace('\u{fffe}', "\u{fffd}"), "off the schema"]);
    let failure = xml.iter().find(|t| t.0 == "failure").unwrap();
    assert!(value(failure, "message").ends_with(why));
    // As JSON, and a part of them.
    let (code, said, _) = sop(&["policy", "test", at(&dir), "--json", "--filter", "staff"]).await;
    let whole: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &whole["cases"], &whole["results"][0]["file"]), (0, &json!(1), &json!(file)), "{said}");
    let (code, _, refused) = sop(&["policy", "test", at(&dir), "--filter", "off", "--strict"]).await;
    assert!(code == 1 && refused.contains("warnings"), "{refused}");
    let (code, _, refused) = sop(&["policy", "test", at(&dir), "--filter", "off", "--min-coverage", "50"]).await;
    assert!(code == 1 && refused.contains("0.0 % of the policies are covered"), "{refused}");
    for wrong in [
        vec!["policy", "test", "/nowhere"],
        vec!["policy", "test", at(&dir), "--filter", "no such case"],
        vec!["policy", "test", at(&dir), "--min-coverage", "101"],
        vec!["policy", "test", at(&dir), "--schema", "/nowhere"],
        vec!["policy", "test"],
        vec!["policy", "lint", "/nowhere"],
    ] {
        assert_eq!(sop(&wrong).await.0, 2, "{wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_are_told_by_file_line_and_column() {
    let second =
        "// one\n@id(\"b\")\npermit (principal, action == Action::\"view\", resource)\n when { resource.levl == 1 };";
    let dir = folder(&[("a.cedar", VIEW), ("b.cedar", second), ("c.cedar", "\n"), ("s.cedarschema", SCHEMA)]);
    let b = format!("{}/b.cedar", at(&dir));
    for command in ["lint", "test"] {
        let args: &[&str] =
            if command == "lint" { &["policy", "lint", at(&dir)] } else { &["policy", "test", at(&dir)] };
        let (code, said, _) = sop(args).await;
        assert!(code == 1 && said.starts_with(&format!("{b}:4:9: error: for policy `b`, ")), "{command}: {said}");
    }
    // One that is not finished is told where it is, and not in the file that comes after it.
    let dir = folder(&[("a.cedar", "permit (principal, action, resource)"), ("b.cedar", "when { true };")]);
    let (_, said, _) = sop(&["policy", "lint", at(&dir)]).await;
    assert!(said.contains("a.cedar:1:37: error: ") && said.contains("b.cedar:1:6: error: "), "{said}");
    // Twice the same name, in two files.
    let dir = folder(&[("a.cedar", VIEW), ("b.cedar", &format!("\n{VIEW}"))]);
    let (_, said, _) = sop(&["policy", "lint", at(&dir)]).await;
    assert!(said.contains("b.cedar:2:1: error: two policies are called \"view\""), "{said}");
    let dir = folder(&[("a.cedar", VIEW), ("s.cedarschema", "entity user {"), ("x_test.json", "{\"name\": 3}")]);
    let (code, said, _) = sop(&["policy", "test", at(&dir), "--junit", dir.join("j.xml").to_str().unwrap()]).await;
    assert!(code == 1 && said.contains("x_test.json: error: /name: "), "{said}");
    assert_eq!(tags(&std::fs::read_to_string(dir.join("j.xml")).unwrap()).iter().filter(|t| t.0 == "error").count(), 1);
    std::fs::remove_file(dir.join("x_test.json")).unwrap();
    let (_, said, _) = sop(&["policy", "lint", at(&dir), "--json"]).await;
    let found: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&found["findings"][0]["line"], &found["findings"][0]["column"]), (&json!(1), &json!(14)), "{said}");
    assert!(found["findings"][0]["file"].as_str().unwrap().ends_with("/s.cedarschema"));
    // What is no text; two schemas; a ring of entities.
    std::fs::write(dir.join("a.cedar"), b"permit\xff").unwrap();
    let (code, said, _) = sop(&["policy", "lint", at(&dir)]).await;
    assert!(code == 1 && said.contains("a.cedar: error: it is not UTF-8: the first bad byte is at 6"), "{said}");
    std::fs::write(dir.join("schema.json"), "{}").unwrap();
    let (code, _, refused) = sop(&["policy", "lint", at(&dir)]).await;
    assert!(code == 2 && refused.contains("more than one schema"), "{refused}");
    let mut ring = case("ring", &["g"], "view", 1, true);
    ring["entities"][0]["parents"][0] = json!({"type": "user", "id": "ann"});
    let (code, said, _) = sop(&["policy", "test", at(&with_cases(&json!([ring])))]).await;
    assert!(code == 1 && said.contains("/0/entities/0/parents: user::\"ann\" would be its own ancestor"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lint_finds_what_no_compiler_knows() {
    let text = r#"@id("all") permit (principal, action, resource);
permit (principal, action == Action::"view", resource);
@id("twice") permit (principal, action == Action::"view",
    resource);
@id("eyes") @approvals("two") @within("3 days") forbid (principal, action, resource) when { false };
@id("idle") @approvals("2") permit (principal in group::"g", action, resource);"#;
    let dir = folder(&[
        ("a.cedar", text),
        ("s.cedarschema", SCHEMA),
        ("a_test.json", &case("n", &["g"], "edit", 1, true).to_string()),
    ]);
    let (code, said, refused) = sop(&["policy", "lint", at(&dir)]).await;
    let file = format!("{}/a.cedar", at(&dir));
    let told: Vec<&str> = said.lines().map(|l| l.strip_prefix(&file).unwrap_or(l)).collect();
    for wanted in [
        ":1:1: warning: all permits everything to everybody [unconditional]",
        ":2:1: warning: policy1 has no @id: it is called by its place, which changes when another is put before it [no-id]",
        ":3:1: warning: twice says the same as policy1 [duplicate]",
        ":5:1: error: eyes: @approvals is a number from 1, not \"two\" [annotation]",
        ":5:1: error: eyes: @within is a time such as 90s, 15m, 72h or 7d, not \"3 days\" [annotation]",
        ":6:1: error: idle: @approvals does nothing on a permit: only what is forbidden can wait for others [annotation]",
        ":2:1: warning: no case covers policy1 [uncovered]",
    ] {
        assert!(told.contains(&wanted), "{wanted} is not in\n{said}");
    }
    assert!(!said.contains("no case covers all") && said.contains("eyes") && said.contains("[cedar]"), "{said}");
    assert_eq!((code, refused.as_str()), (1, "sop: 3 errors\n"));
    let warned = folder(&[("a.cedar", "permit (principal, action, resource);")]);
    assert_eq!(sop(&["policy", "lint", at(&warned)]).await.0, 0);
    assert_eq!(sop(&["policy", "lint", at(&warned), "--strict"]).await.0, 1);
    let alone = format!("{}/a.cedar", at(&warned));
    assert_eq!(sop(&["policy", "lint", &alone, "--strict"]).await.0, 1, "a file as well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_goes_to_a_daemon_which_agrees_with_the_command_line() {
    let (db, daemon, admin, _) = start().await;
    let run = async |args: &[&str]| daemon.launch.run(args).await;
    let (fine, said) = run(&["policy", "draft", EXAMPLE, "--note", "docs"]).await;
    assert!(fine && said.ends_with(" draft: 6 policies\n"), "{said}");
    let id = said.split(' ').next().unwrap();
    let (_, made) = admin.get(&format!("/v1/governance/bundles/{id}")).await;
    assert_eq!(made["tests"].as_array().unwrap().len(), 13);
    let (fine, said) = run(&["policy", "validate", id]).await;
    assert_eq!(
        (fine, said),
        (true, format!("{id} validated: held to its schema; 13 cases passed, 6 of 6 policies covered\n"))
    );
    let (_, there) = run(&["policy", "validate", id, "--json"]).await;
    let (_, here, _) = sop(&["policy", "test", EXAMPLE, "--json"]).await;
    let (there, mut here): (Value, Value) =
        (serde_json::from_str(&there).unwrap(), serde_json::from_str(&here).unwrap());
    for result in here["results"].as_array_mut().unwrap() {
        result.as_object_mut().unwrap().remove("file");
    }
    assert_eq!((&there["results"], &there["coverage"]), (&here["results"], &here["coverage"]));
    // What differs, from the daemon or from the disk.
    assert_eq!(
        run(&["policy", "diff", EXAMPLE, id]).await,
        (true, format!("--- {EXAMPLE}\n+++ {id}\n0 added, 0 removed, 0 changed\n"))
    );
    let (fine, said) = run(&["policy", "diff", "active", id, "--json"]).await;
    let whole: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert!(!fine && whole["added"].as_array().unwrap().len() == 6 && whole["schema_changed"] == true, "{said}");
    let (fine, said) = run(&["policy", "diff", "nothing", id]).await;
    assert!(!fine && said.contains("404"), "{said}");
    // A bundle that a daemon refuses is told by file; one that fails its cases, by case.
    let broken = folder(&[("a.cedar", VIEW), ("b.cedar", "\npermit (nobody, action, resource);")]);
    let (fine, said) = run(&["policy", "draft", at(&broken)]).await;
    assert!(!fine && said.contains("/b.cedar:2:9: error: ") && said.contains("(422)"), "{said}");
    let failing = with_cases(&json!([case("a slip", &["g"], "view", 4, true)]));
    let (_, said) = run(&["policy", "draft", at(&failing)]).await;
    let (fine, said) = run(&["policy", "validate", said.split(' ').next().unwrap()]).await;
    assert!(!fine && said.contains("at \"/tests/0\": a slip: expected permit, decided deny"), "{said}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_difference_is_of_what_policies_say_and_not_of_how() {
    let spaced = VIEW.replace("permit (", "permit\n  // as before\n  (");
    let (a, same) = (folder(&[("a.cedar", VIEW)]), folder(&[("x.cedar", &spaced)]));
    assert_eq!(sop(&["policy", "diff", at(&a), at(&same)]).await.0, 0);
    let more = format!("{}\n@id(\"more\")\nforbid (principal, action, resource);", VIEW.replace("<= 3", "<= 5"));
    let b = folder(&[("x.cedar", &more), ("s.cedarschema", SCHEMA)]);
    let (code, said, _) = sop(&["policy", "diff", at(&a), at(&b)]).await;
    let body: Vec<&str> = said.lines().skip(2).collect();
    assert_eq!(code, 1);
    assert_eq!(
        body[..7],
        [
            "added: forbid more",
            "+@id(\"more\")",
            "+forbid (principal, action, resource);",
            "changed: permit view",
            " @id(\"view\") permit (principal in group::\"g\", action == Action::\"view\", resource)",
            "-when { resource.level <= 3 };",
            "+when { resource.level <= 5 };",
        ]
    );
    assert!(said.contains("changed: the schema") && said.ends_with("1 added, 0 removed, 1 changed\n"), "{said}");
    let forbids = folder(&[("x.cedar", &VIEW.replace("permit", "forbid"))]);
    let (_, said, _) = sop(&["policy", "diff", at(&a), at(&forbids)]).await;
    assert!(said.contains("changed: permit -> forbid view"), "{said}");
    let (_, said, _) = sop(&["policy", "diff", at(&b), at(&a), "--json"]).await;
    let whole: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&whole["removed"][0]["id"], &whole["removed"][0]["effect"]),
        (&json!("more"), &json!("forbid")),
        "{said}"
    );
}
