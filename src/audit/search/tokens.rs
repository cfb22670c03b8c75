//! What an entry can be found by, as tokens of its block, and what a search asks of them.
//!
//! A token is a letter and a value. Actor, outcome and action are also joined, in the orders in which a search can give some
//! of them and leave the rest open, so that two that are common each, and rare together, are found by being together.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashSet};

use serde::Deserialize;
use serde_json::Value;

use crate::audit::model::{Filter, Found, Stored};

/// Between the parts of a joined token: no name has it.
const JOINT: char = '\u{1f}';
/// The longest token, in bytes; longer ones are cut, and so is what is looked for.
const LONGEST: usize = 512;
/// The longest word, in characters.
const WORD: usize = 64;
/// Words of one entry, and bytes of all tokens of a block; past it the block says that it may hold anything.
const WORDS: usize = 256;
const BYTES: usize = 600_000;
/// May hold anything.
const ANYTHING: &str = "*";

/// The words of a text: runs of letters and digits, in lower case.
pub(in crate::audit) fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(|w| w.chars().take(WORD).flat_map(char::to_lowercase).collect())
}

/// What of the details is text: the decision and the ids of request and trace are not.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Texts<'a> {
    #[serde(borrow)]
    actor: Cow<'a, str>,
    #[serde(borrow)]
    resource: Cow<'a, str>,
    #[serde(borrow)]
    reason: Cow<'a, str>,
    change: Value,
    signal: Value,
}

fn leaves(value: &Value, each: &mut impl FnMut(String)) {
    match value {
        Value::String(text) => words(text).for_each(each),
        Value::Array(all) => all.iter().for_each(|v| leaves(v, each)),
        Value::Object(all) => all.values().for_each(|v| leaves(v, each)),
        Value::Number(n) => each(n.to_string()),
        Value::Null | Value::Bool(_) => {}
    }
}

/// Each word of an entry's details, some more than once.
fn each_word(details: &[u8], each: &mut impl FnMut(String)) {
    let texts: Texts<'_> = serde_json::from_slice(details).unwrap_or_default();
    for text in [&texts.actor, &texts.resource, &texts.reason] {
        words(text).for_each(&mut *each);
    }
    leaves(&texts.change, each);
    leaves(&texts.signal, each);
}

/// The words of an entry's details.
pub(in crate::audit) fn words_of(details: &[u8]) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    each_word(details, &mut |word| {
        out.insert(word);
    });
    out
}

fn token(letter: char, parts: &[&str]) -> String {
    let mut out = String::with_capacity(1 + parts.iter().map(|p| p.len() + 1).sum::<usize>());
    out.push(letter);
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            out.push(JOINT);
        }
        out.push_str(part);
    }
    cut(out)
}

fn cut(mut token: String) -> String {
    // A NUL cannot be stored as text; in names it does not occur, and what others wrote is found by its words.
    if token.contains('\0') {
        token.retain(|c| c != '\0');
    }
    token.truncate(token.floor_char_boundary(LONGEST));
    token
}

/// The tokens of a block's entries, in order.
pub(in crate::audit) fn of_block<'a>(entries: impl IntoIterator<Item = (&'a Stored, &'a Found)>) -> Vec<String> {
    let (mut all, mut words, mut met) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (stored, f) in entries {
        // Most entries of a block are alike in these.
        if met.insert((f.action.as_str(), f.outcome.as_str(), f.actor.as_str())) {
            all.insert(token('a', &[&f.action]));
            all.insert(token('o', &[&f.outcome, &f.action]));
            all.insert(token('p', &[&f.actor, &f.action]));
            all.insert(token('q', &[&f.actor, &f.outcome, &f.action]));
        }
        all.insert(token('r', &[&f.resource]));
        for (letter, id) in [('i', &f.request_id), ('t', &f.trace_id)] {
            if !id.is_empty() {
                all.insert(token(letter, &[id]));
            }
        }
        let Some(details) = stored.details.as_deref() else { continue };
        let mut mine = Vec::new();
        each_word(details, &mut |word| mine.push(word));
        if mine.len() > WORDS {
            mine.sort_unstable();
            mine.dedup();
            if mine.len() > WORDS {
                all.insert(ANYTHING.to_owned());
                mine.truncate(WORDS);
            }
        }
        words.extend(mine);
    }
    all.extend(words.into_iter().map(|w| token('w', &[&w])));
    if all.iter().map(|t| t.len() + 8).sum::<usize>() > BYTES {
        return vec![ANYTHING.to_owned()];
    }
    let mut all: Vec<String> = all.into_iter().collect();
    all.sort_unstable();
    all
}

/// One term of a search: a token, or how one begins.
fn term(token: &str, begins: bool) -> String {
    let quoted = token.replace('\\', "\\\\").replace('\'', "''");
    format!("'{quoted}'{}", if begins { ":*" } else { "" })
}

/// What a block must hold for an entry of it to fit, as a `tsquery`. `None`: any block may.
pub(in crate::audit) fn wanted(filter: &Filter) -> Option<String> {
    let mut terms = Vec::new();
    let room = filter.room.as_ref().map(|r| format!("{r}:"));
    let (action, open) = match (&filter.action, &room) {
        (Some(action), _) => (action.as_str(), false),
        (None, Some(room)) => (room.as_str(), true),
        (None, None) => ("", true),
    };
    match (&filter.actor, &filter.outcome) {
        (Some(actor), Some(outcome)) => terms.push(term(&token('q', &[actor, outcome, action]), open)),
        (Some(actor), None) => terms.push(term(&token('p', &[actor, action]), open)),
        (None, Some(outcome)) => terms.push(term(&token('o', &[outcome, action]), open)),
        (None, None) if !action.is_empty() => terms.push(term(&token('a', &[action]), open)),
        (None, None) => {}
    }
    if let Some(resource) = &filter.resource {
        terms.push(term(&token('r', &[resource]), true));
    }
    for (letter, id) in [('i', &filter.request_id), ('t', &filter.trace_id)] {
        terms.extend(id.as_ref().map(|id| term(&token(letter, &[id]), false)));
    }
    terms.extend(filter.words.iter().map(|w| term(&token('w', &[w]), false)));
    (!terms.is_empty()).then(|| format!("({}) | '{ANYTHING}'", terms.join(" & ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(actor: &str, action: &str, outcome: &str, resource: &str, reason: &str) -> (Stored, Found) {
        let leaf = serde_json::json!({"action": action, "outcome": outcome, "room": action.split(':').next(),
            "time": "2026-01-31T12:00:00.000Z", "v": 1, "body": ""});
        let details = serde_json::json!({"actor": actor, "resource": resource, "reason": reason, "request_id": "r-1",
            "change": {"n": [7, {"name": "Größe"}]}});
        let stored = Stored {
            index: 0,
            leaf: leaf.to_string().into_bytes(),
            salt: None,
            details: Some(details.to_string().into_bytes()),
            segment: None,
        };
        let found = stored.found();
        (stored, found)
    }

    /// Whether tokens hold what a query asks, as `tsquery` would say: terms joined by `&`, or anything.
    fn holds(tokens: &[String], query: &str) -> bool {
        let inner = query.strip_prefix('(').and_then(|q| q.strip_suffix(") | '*'")).unwrap();
        tokens.iter().any(|t| t == ANYTHING)
            || inner.split(" & ").all(|term| {
                let begins = term.ends_with(":*");
                let value = term.trim_end_matches(":*").trim_matches('\'').replace("''", "'").replace("\\\\", "\\");
                tokens.iter().any(|t| if begins { t.starts_with(&value) } else { *t == value })
            })
    }

    #[test]
    fn words_are_those_of_what_was_said() {
        let (stored, _) = entry("arp", "state:put", "ok", "key/arp/Plan-7", "Replaced by O'Hara");
        let words: Vec<String> = words_of(stored.details.as_deref().unwrap()).into_iter().collect();
        assert_eq!(words, ["7", "arp", "by", "größe", "hara", "key", "o", "plan", "replaced"]);
    }

    #[test]
    fn a_block_too_full_to_list_may_hold_anything() {
        let many: String = (0..400).map(|i| format!("w{i} ")).collect();
        let (stored, found) = entry("a", "state:put", "ok", "key/k", &many);
        assert!(of_block([(&stored, &found)]).contains(&ANYTHING.to_owned()));
        let other = |i: usize| (0..250).map(|w| format!("word{i}and{w} ")).collect::<String>();
        let long: Vec<(Stored, Found)> = (0..256).map(|i| entry("a", "a:b", "ok", "key/k", &other(i))).collect();
        assert_eq!(of_block(long.iter().map(|(s, f)| (s, f))), [ANYTHING]);
    }

    proptest! {
        /// No filter that an entry fits passes its block by.
        #[test]
        fn a_block_holds_what_its_entries_fit(
            actor in "[a-c' \\\\]{1,3}", outcome in "ok|denied", action in "state:put|state:get|token:use",
            resource in "key/[a-b/']{0,4}", reason in "[a-c ]{0,6}",
            given in proptest::collection::vec(any::<bool>(), 7), cut in 0usize..8,
        ) {
            let (stored, found) = entry(&actor, &action, &outcome, &resource, &reason);
            let some = |i: usize, v: &str| given[i].then(|| v.to_owned());
            let filter = Filter {
                actor: some(0, &actor),
                outcome: some(1, &outcome),
                action: some(2, &action),
                room: some(3, &found.room),
                resource: some(4, &resource[..cut.min(resource.len())]),
                request_id: some(5, "r-1"),
                words: if given[6] { words(&reason).collect() } else { Vec::new() },
                ..Filter::default()
            };
            prop_assert!(filter.fits(&found) && filter.says(stored.details.as_deref()));
            if let Some(query) = wanted(&filter) {
                prop_assert!(holds(&of_block([(&stored, &found)]), &query), "{query}");
            }
        }
    }
}
