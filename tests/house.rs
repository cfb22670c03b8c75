//! Reads the source and keeps the house in order. Each check says what to write instead, and is shown to bite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;

/// Lower first. `token` and `state` stand side by side.
const FLOORS: [(&str, u8); 15] = [
    ("config", 0),
    ("telemetry", 1),
    ("kernel", 2),
    ("store", 3),
    ("ledger", 4),
    ("audit", 5),
    ("governance", 6),
    ("token", 7),
    ("state", 7),
    ("nexus", 8),
    ("health", 9),
    ("api", 10),
    ("boot", 11),
    ("cli", 12),
    ("main", 13),
];

type Source = (String, String);
type Check = fn(&[Source]) -> Vec<String>;

fn floor(name: &str) -> Option<u8> {
    FLOORS.iter().find(|(floor, _)| *floor == name).map(|(_, height)| *height)
}

fn home(path: &str) -> &str {
    path.strip_prefix("src/").unwrap_or("").split('/').next().unwrap_or("").trim_end_matches(".rs")
}

/// Without comment lines and without what follows `#[cfg(test)]` (test modules close a file).
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().take_while(|(_, line)| !line.starts_with("#[cfg(test)]"));
    lines.filter(|(_, line)| !line.trim_start().starts_with("//")).map(|(at, line)| (at + 1, line))
}

fn floors(sources: &[Source]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, text) in sources {
        let here = home(path);
        let Some(height) = floor(here) else { continue };
        for (at, line) in code(text) {
            for part in line.split("crate::").skip(1) {
                let there: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if there != here && floor(&there).is_some_and(|other| other >= height) {
                    wrong.push(format!("{path}:{at}: `{here}` may not use `{there}`: import only from floors below; say it upward as an entry"));
                }
            }
        }
    }
    wrong
}

fn only_in(sources: &[Source], words: &[&str], allowed: fn(&str) -> bool, instead: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, text) in sources.iter().filter(|(path, _)| path.starts_with("src/") && !allowed(path)) {
        for (at, line) in code(text) {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                wrong.push(format!("{path}:{at}: `{word}` here: {instead}"));
            }
        }
    }
    wrong
}

const SQL: [&str; 9] = [
    "sqlx::query",
    "\"SELECT ",
    "\"INSERT INTO ",
    "\"UPDATE ",
    "\"DELETE FROM ",
    "\"WITH ",
    "\"CREATE TABLE ",
    "AssertSqlSafe",
    "\"LISTEN ",
];

fn sql(sources: &[Source]) -> Vec<String> {
    let allowed =
        |path: &str| !path.starts_with("src/kernel/") && (path.ends_with("/store.rs") || path.contains("/store/"));
    only_in(sources, &SQL, allowed, "move the SQL into the room's store.rs")
}

fn spawn(sources: &[Source]) -> Vec<String> {
    let allowed = |path: &str| path == "src/kernel/supervisor.rs";
    only_in(
        sources,
        &["tokio::spawn", "task::spawn("],
        allowed,
        "hand a Task to kernel::supervisor, or use supervisor::detach",
    )
}

fn clock(sources: &[Source]) -> Vec<String> {
    let words = ["SystemTime::now", "Instant::now", "now_utc"];
    only_in(sources, &words, |path| path == "src/kernel/clock.rs", "take a kernel::Clock and ask it")
}

fn environment(sources: &[Source]) -> Vec<String> {
    let allowed = |path: &str| path == "src/config.rs" || path.starts_with("src/config/");
    only_in(sources, &["std::env", "env::var"], allowed, "add a key to config and read it there")
}

fn shape(sources: &[Source]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, text) in sources {
        let lines = text.lines().count();
        if lines > 500 {
            wrong.push(format!("{path}: {lines} lines: give an organ a file of its own (500 at most)"));
        }
        for (at, line) in text.lines().enumerate().filter(|(_, line)| line.ends_with([' ', '\t'])) {
            wrong.push(format!("{path}:{}: ends in white space: `{}`; take it away", at + 1, line.trim()));
        }
        let all: Vec<(usize, &str)> = code(text).collect();
        for (n, (at, line)) in all.iter().enumerate().filter(|_| path.starts_with("src/")) {
            let head = line.trim_start();
            if !(head.starts_with("fn ") || head.contains(" fn ")) || head.starts_with('"') {
                continue;
            }
            // rustfmt closes a function at the indentation it began at.
            let close = format!("{}}}", &line[..line.len() - head.len()]);
            let end = all[n..].iter().find(|(_, line)| *line == close).map_or(*at, |(end, _)| *end);
            if !head.ends_with(['}', ';']) && end - at + 1 > 70 {
                wrong.push(format!("{path}:{at}: a function of {} lines: name its parts (70 at most)", end - at + 1));
            }
        }
    }
    wrong
}

fn stubs(sources: &[Source]) -> Vec<String> {
    only_in(sources, &["todo!(", "unimplemented!("], |_| false, "leave the route out until it works")
}

fn openings(sources: &[Source]) -> Vec<String> {
    let floors = sources.iter().filter(|(path, _)| path.ends_with("/mod.rs") && path.matches('/').count() == 2);
    let mut wrong = Vec::new();
    for (path, text) in floors.filter(|(path, _)| path.starts_with("src/")) {
        let head: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
        for words in ["**Invariants.**", "**Not here.**", "**Why this way.**"] {
            if !head.contains(words) {
                wrong.push(format!("{path}: open with a short paragraph {words}"));
            }
        }
    }
    wrong
}

fn furniture(sources: &[Source]) -> Vec<String> {
    let has = |fits: &dyn Fn(&str, &str) -> bool| sources.iter().any(|(path, text)| fits(path, text));
    let mut wrong = Vec::new();
    for room in ["audit", "governance", "token", "state", "nexus", "health"] {
        if !has(&|path, _| path == format!("src/{room}/http.rs")) {
            continue;
        }
        let wanted = [
            (format!("tests/suite/{room}.rs"), has(&|path, _| path == format!("tests/suite/{room}.rs"))),
            (
                format!("migrations/*_{room}.sql"),
                has(&|path, _| path.starts_with("migrations/") && path.ends_with(&format!("_{room}.sql"))),
            ),
            (format!("docs/{room}.md"), has(&|path, _| path == format!("docs/{room}.md"))),
            (
                format!("[{room}] in config/sop.toml"),
                has(&|path, text| path == "config/sop.toml" && text.contains(&format!("[{room}"))),
            ),
            (
                format!("a metric sop_{room}_*"),
                has(&|path, text| path.starts_with("src/") && text.contains(&format!("\"sop_{room}_"))),
            ),
        ];
        wrong.extend(
            wanted.iter().filter(|(_, there)| !there).map(|(what, _)| format!("src/{room} has routes: add {what}")),
        );
    }
    wrong
}

/// Tests that the threat model names are there: `` `file::test` `` in tests/suite, `` `room::file` `` after "unit" in src.
fn promises(sources: &[Source]) -> Vec<String> {
    let mut wrong = Vec::new();
    let there = |path: &str| sources.iter().find(|(p, _)| p == path).map(|(_, text)| text);
    for (path, text) in sources.iter().filter(|(path, _)| path.ends_with("docs/threat-model.md")) {
        let mut parts = text.split('`');
        let mut before = parts.next().unwrap_or_default();
        while let (Some(name), after) = (parts.next(), parts.next().unwrap_or_default()) {
            if let Some((file, test)) = name.split_once("::") {
                let found = if before.ends_with("unit ") {
                    there(&format!("src/{file}/{test}.rs")).is_some_and(|text| text.contains("#[test]"))
                } else {
                    let text = there(&format!("tests/suite/{file}.rs"));
                    text.is_some_and(|text| test == "*" || text.contains(&format!("fn {test}(")))
                };
                if !found {
                    wrong.push(format!("{path}: there is no test `{name}`: name the one that shows it"));
                }
            }
            before = after;
        }
    }
    wrong
}

fn read(dir: &Path, root: &Path, into: &mut Vec<Source>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            read(&path, root, into);
        } else if let Ok(text) = fs::read_to_string(&path) {
            into.push((path.strip_prefix(root).unwrap().to_string_lossy().into_owned(), text));
        }
    }
}

const CHECKS: [Check; 10] = [floors, sql, spawn, clock, environment, shape, stubs, openings, furniture, promises];

#[test]
fn the_house_is_in_order() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    for dir in ["src", "tests", "migrations", "config", "docs"] {
        read(&root.join(dir), root, &mut sources);
    }
    assert!(sources.len() > 10, "the source was not found");
    let wrong: Vec<String> = CHECKS.iter().flat_map(|check| check(&sources)).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_check_bites() {
    let long = format!("fn f() {{\n{}}}\n", "    x();\n".repeat(70));
    let samples: [(Check, &str, &str); 13] = [
        (promises, "docs/threat-model.md", "| x | `audit::nothing_of_the_kind` |\n"),
        (floors, "src/kernel/a.rs", "use crate::ledger::Entry;\n"),
        (floors, "src/token/a.rs", "use crate::state::kv;\n"),
        (sql, "src/state/mod.rs", "let q = \"SELECT 1\";\n"),
        (sql, "src/kernel/store.rs", "sqlx::query(Q)\n"),
        (spawn, "src/state/mod.rs", "tokio::spawn(x);\n"),
        (clock, "src/state/mod.rs", "let t = Instant::now();\n"),
        (environment, "src/state/mod.rs", "std::env::var(x)\n"),
        (shape, "src/state/mod.rs", &long),
        (shape, "docs/a.md", "word \n"),
        (stubs, "src/state/mod.rs", "todo!()\n"),
        (openings, "src/state/mod.rs", "//! **Invariants.**\n"),
        (furniture, "src/state/http.rs", ""),
    ];
    for (check, path, text) in samples {
        assert!(!check(&[(path.to_owned(), text.to_owned())]).is_empty(), "no check minds {path}: {text}");
    }
    assert!(floors(&[("src/state/a.rs".into(), "use crate::ledger::Entry;\n".into())]).is_empty());
}
