//! `sop policy diff`: what differs between two bundles, policy by policy.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{bail, ensure};
use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};

use crate::cli::client::Client;
use crate::cli::{Global, say};
use crate::governance::workbench::{self, Policy};

use super::folder::Folder;

#[derive(Args)]
pub(crate) struct DiffArgs {
    /// A folder, a file, the id of a bundle, or `active`
    a: String,
    /// The same
    b: String,
}

/// One of the two.
struct Side {
    name: String,
    policies: BTreeMap<String, Policy>,
    schema: String,
}

impl Side {
    fn new(name: &str, policies: &str, schema: Option<&str>) -> anyhow::Result<Self> {
        let read = match workbench::policies(policies) {
            Ok(read) => read,
            Err(faults) => {
                let first = faults.first().map(|f| f.detail.as_str()).unwrap_or_default();
                bail!("the policies of {name} cannot be read: {first}")
            }
        };
        let policies = read.into_iter().map(|p| (p.id.clone(), p)).collect();
        Ok(Self { name: name.to_owned(), policies, schema: schema.unwrap_or_default().to_owned() })
    }

    async fn read(global: &Global, name: &str) -> anyhow::Result<Self> {
        let path = Path::new(name);
        if name != "active" && path.exists() {
            return match Folder::read(path, None, false)? {
                Ok(folder) => {
                    let source = folder.source();
                    Self::new(name, &source.policies, source.schema.as_deref())
                }
                Err(complaints) => {
                    super::complain(global, &complaints);
                    bail!("{name} cannot be read")
                }
            };
        }
        let client = Client::find(global).await?;
        let get = async |path: &str| client.json(client.request(Method::GET, path)).await;
        let mut id = name.to_owned();
        if name == "active" {
            let now = get("/v1/governance/active").await?;
            let Some(active) = now["application"].as_str() else { return Self::new("active (none)", "", None) };
            id = active.to_owned();
        }
        let bundle = get(&format!("/v1/governance/bundles/{}", super::encoded(&id))).await?;
        Self::new(&id, bundle["policies"].as_str().unwrap_or_default(), bundle["schema"].as_str())
    }
}

pub(crate) async fn run(global: &Global, args: &DiffArgs) -> anyhow::Result<()> {
    let (a, b) = (Side::read(global, &args.a).await?, Side::read(global, &args.b).await?);
    let added: Vec<&Policy> = b.policies.values().filter(|p| !a.policies.contains_key(&p.id)).collect();
    let removed: Vec<&Policy> = a.policies.values().filter(|p| !b.policies.contains_key(&p.id)).collect();
    // However it is written: white space and comments are no change.
    let both = a.policies.values().filter_map(|p| Some((p, b.policies.get(&p.id)?)));
    let changed: Vec<(&Policy, &Policy)> = both.filter(|(before, after)| before.says != after.says).collect();
    let schema = a.schema.trim() != b.schema.trim();
    if global.json {
        let whole = |p: &&Policy| json!({"id": p.id, "effect": p.effect, "text": p.text});
        let pair = |(p, q): &(&Policy, &Policy)| json!({"id": p.id, "effect_before": p.effect, "effect_after": q.effect, "before": p.text, "after": q.text});
        say(json!({
            "a": a.name, "b": b.name, "schema_changed": schema,
            "added": added.iter().map(whole).collect::<Vec<Value>>(),
            "removed": removed.iter().map(whole).collect::<Vec<Value>>(),
            "changed": changed.iter().map(pair).collect::<Vec<Value>>(),
        }));
    } else {
        say(format!("--- {}\n+++ {}", a.name, b.name));
        removed.iter().for_each(|p| told(&format!("removed: {} {}", p.effect, p.id), &p.text, ""));
        added.iter().for_each(|p| told(&format!("added: {} {}", p.effect, p.id), "", &p.text));
        for (p, q) in &changed {
            let effect =
                if p.effect == q.effect { p.effect.to_owned() } else { format!("{} -> {}", p.effect, q.effect) };
            told(&format!("changed: {effect} {}", p.id), &p.text, &q.text);
        }
        if schema {
            told("changed: the schema", a.schema.trim(), b.schema.trim());
        }
        say(format!("{} added, {} removed, {} changed", added.len(), removed.len(), changed.len()));
    }
    let same = added.is_empty() && removed.is_empty() && changed.is_empty() && !schema;
    ensure!(same, "they differ");
    Ok(())
}

/// Lines kept around a difference.
const AROUND: usize = 3;
/// Beyond so many pairs of lines the longest common part is not looked for.
const PAIRS: usize = 4_000_000;

fn told(head: &str, before: &str, after: &str) {
    say(head);
    lines(&before.lines().collect::<Vec<_>>(), &after.lines().collect::<Vec<_>>()).iter().for_each(say);
}

/// The lines of both: those that only the first has after `-`, those that only the second has after `+`; far from any, left out.
fn lines(before: &[&str], after: &[&str]) -> Vec<String> {
    let all = compared(before, after);
    let near = |at: usize| {
        let around = all.get(at.saturating_sub(AROUND)..all.len().min(at + AROUND + 1)).unwrap_or_default();
        around.iter().any(|(mark, _)| *mark != ' ')
    };
    let mut out = Vec::new();
    let mut gap = false;
    for (at, (mark, line)) in all.iter().enumerate() {
        if near(at) {
            out.push(format!("{mark}{line}"));
        } else if !gap {
            out.push("...".to_owned());
        }
        gap = !near(at);
    }
    out
}

/// Both, line by line, with as much as can be in common.
fn compared<'t>(before: &[&'t str], after: &[&'t str]) -> Vec<(char, &'t str)> {
    let start = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    let (old, new) = (before.get(start..).unwrap_or_default(), after.get(start..).unwrap_or_default());
    let end = old.iter().rev().zip(new.iter().rev()).take_while(|(a, b)| a == b).count();
    let same = |lines: &[&'t str]| lines.iter().map(|line| (' ', *line)).collect::<Vec<_>>();
    let (middle_old, tail) = old.split_at(old.len() - end);
    let (middle_new, _) = new.split_at(new.len() - end);
    let mut out = same(before.get(..start).unwrap_or_default());
    out.extend(middle(middle_old, middle_new));
    out.extend(same(tail));
    out
}

/// What is between the common beginning and the common end.
fn middle<'t>(old: &[&'t str], new: &[&'t str]) -> Vec<(char, &'t str)> {
    if old.len().saturating_mul(new.len()) > PAIRS {
        return old.iter().map(|line| ('-', *line)).chain(new.iter().map(|line| ('+', *line))).collect();
    }
    // The length of the longest common part of what begins at each pair of lines.
    let width = new.len() + 1;
    let mut longest = vec![0_u32; (old.len() + 1) * width];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            longest[i * width + j] = if old[i] == new[j] {
                longest[(i + 1) * width + j + 1] + 1
            } else {
                longest[(i + 1) * width + j].max(longest[i * width + j + 1])
            };
        }
    }
    let (mut i, mut j, mut out) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            out.push((' ', old[i]));
            (i, j) = (i + 1, j + 1);
        } else if i < old.len() && (j == new.len() || longest[(i + 1) * width + j] >= longest[i * width + j + 1]) {
            out.push(('-', old[i]));
            i += 1;
        } else {
            out.push(('+', new[j]));
            j += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_far_from_a_difference_is_left_out() {
        let text = |s: &str| s.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let (a, b) = (text("a b c d e f g h i"), text("a b c d e f X h i j"));
        let said =
            lines(&a.iter().map(String::as_str).collect::<Vec<_>>(), &b.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(said, ["...", " d", " e", " f", "-g", "+X", " h", " i", "+j"]);
        assert_eq!(lines(&["a", "b"], &["a", "b"]), ["..."]);
        assert_eq!(lines(&[], &["a"]), ["+a"]);
    }
}
