//! What is kept of a block of entries: an outline for filters and counts, names for what they alone tell, and tokens to find the
//! block by.

use serde::{Deserialize, Serialize};

use crate::audit::model::Filter;
use crate::audit::store::search::Kept;

use super::BLOCK;
use super::read::{self, Text};
use super::tokens::{Gathered, Token};

/// Actor, room, action and outcome.
pub(in crate::audit) type Kind = [String; 4];

/// Of which kind each entry is. As it is stored: JSON.
#[derive(Default, Serialize, Deserialize)]
struct Outline {
    kinds: Vec<Kind>,
    /// Of each entry, which of the kinds.
    of: Vec<u16>,
    /// Where in the block each stands; empty where none is missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    at: Vec<u8>,
}

/// What is seldom alike in two entries. As it is stored: JSON.
#[derive(Default, Serialize, Deserialize)]
struct Names<'a> {
    #[serde(borrow)]
    resources: Vec<Text<'a>>,
    #[serde(borrow)]
    requests: Vec<Text<'a>>,
    #[serde(borrow)]
    traces: Vec<Text<'a>>,
}

/// A block that is made.
pub(in crate::audit) struct Block {
    /// Entries 256 times this and following.
    pub number: i64,
    pub outline: Vec<u8>,
    pub names: Vec<u8>,
    pub tokens: Vec<Token>,
}

impl Block {
    /// Of the entries there are, in order: index, leaf, details.
    pub fn of<'a>(number: i64, entries: impl Iterator<Item = (i64, &'a [u8], Option<&'a [u8]>)>) -> Self {
        let (mut outline, mut names, mut tokens) = (Outline::default(), Names::default(), Gathered::default());
        for (index, leaf, details) in entries {
            let entry = read::entry(leaf, details, &mut |text| tokens.text(text));
            let said = &entry.said;
            let kind = [&*said.actor, &*entry.leaf.room, &*entry.leaf.action, &*entry.leaf.outcome];
            let known = outline.kinds.iter().position(|k| k.iter().zip(kind).all(|(a, b)| a == b));
            let of = known.unwrap_or_else(|| {
                tokens.kind(kind);
                outline.kinds.push(kind.map(str::to_owned));
                outline.kinds.len() - 1
            });
            outline.of.push(u16::try_from(of).unwrap_or(u16::MAX));
            outline.at.push(u8::try_from(index - number * BLOCK).unwrap_or(u8::MAX));
            tokens.names(said);
            names.resources.push(Text(entry.said.resource));
            names.requests.push(Text(entry.said.request_id));
            names.traces.push(Text(entry.said.trace_id));
        }
        if outline.of.len() as i64 == BLOCK {
            outline.at.clear();
        }
        for some in [&mut names.requests, &mut names.traces] {
            if some.iter().all(|text| text.0.is_empty()) {
                some.clear();
            }
        }
        let json = |done: serde_json::Result<Vec<u8>>| done.unwrap_or_default();
        Self {
            number,
            outline: json(serde_json::to_vec(&outline)),
            names: json(serde_json::to_vec(&names)),
            tokens: tokens.finish(),
        }
    }
}

/// Whether this filter asks for what is in the names.
pub(super) fn asks_names(filter: &Filter) -> bool {
    filter.resource.is_some() || filter.request_id.is_some() || filter.trace_id.is_some()
}

/// A block that was read.
pub(super) struct Read {
    number: i64,
    outline: Outline,
}

fn read<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, sqlx::Error> {
    serde_json::from_slice(bytes).map_err(|e| sqlx::Error::Decode(e.into()))
}

impl Read {
    pub fn new(kept: &Kept) -> Result<Self, sqlx::Error> {
        Ok(Self { number: kept.block, outline: read(&kept.outline)? })
    }

    fn index(&self, n: usize) -> i64 {
        self.number * BLOCK + self.outline.at.get(n).map_or(n as i64, |at| i64::from(*at))
    }

    /// Its kinds.
    pub fn into_kinds(self) -> Vec<Kind> {
        self.outline.kinds
    }

    /// The indexes from `from` to `to` that fit but for words and time, in order, and which of the kinds each is.
    pub fn fitting(
        &self,
        filter: &Filter,
        names: Option<&[u8]>,
        (from, to): (i64, i64),
    ) -> Result<Vec<(i64, usize)>, sqlx::Error> {
        let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|w| w == value);
        let fits = |[actor, room, action, outcome]: &Kind| {
            is(&filter.actor, actor)
                && is(&filter.room, room)
                && is(&filter.action, action)
                && is(&filter.outcome, outcome)
        };
        let kinds: Vec<bool> = self.outline.kinds.iter().map(fits).collect();
        let names: Names<'_> = names.map(read).transpose()?.unwrap_or_default();
        let name = |of: &'_ [Text<'_>], n: usize, fits: &dyn Fn(&str) -> bool| fits(of.get(n).map_or("", |t| &*t.0));
        let named = |n: usize| {
            filter.resource.as_ref().is_none_or(|r| name(&names.resources, n, &|v| v.starts_with(r.as_str())))
                && filter.request_id.as_ref().is_none_or(|id| name(&names.requests, n, &|v| v == id))
                && filter.trace_id.as_ref().is_none_or(|id| name(&names.traces, n, &|v| v == id))
        };
        let found = self.outline.of.iter().enumerate().filter_map(|(n, of)| {
            let (index, of) = (self.index(n), usize::from(*of));
            let fits = (from..=to).contains(&index) && kinds.get(of) == Some(&true) && named(n);
            fits.then_some((index, of))
        });
        Ok(found.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::model::Stored;

    fn entry(index: i64, actor: &str, resource: &str) -> Stored {
        let leaf = serde_json::json!({"action": "state:put", "outcome": "ok", "room": "state",
            "time": "2026-01-31T12:00:00.000Z"});
        let details = serde_json::json!({"actor": actor, "resource": resource, "request_id": format!("r-{index}")});
        Stored {
            index,
            leaf: leaf.to_string().into_bytes(),
            salt: None,
            details: Some(details.to_string().into_bytes()),
            segment: None,
        }
    }

    fn fitting(entries: &[Stored], filter: &Filter) -> Vec<i64> {
        let made = Block::of(1, entries.iter().map(Stored::parts));
        let kept = Kept { block: 1, outline: made.outline, names: Some(made.names) };
        let read = Read::new(&kept).unwrap();
        read.fitting(filter, kept.names.as_deref(), (0, 1000)).unwrap().into_iter().map(|(index, _)| index).collect()
    }

    #[test]
    fn what_is_kept_of_a_block_filters_as_its_entries_do() {
        let entries: Vec<Stored> = (256..512)
            .map(|i| entry(i, if i % 2 == 0 { "a" } else { "b\"" }, &format!("key/{}/ü\"{i}", i % 3)))
            .collect();
        let some = |v: &str| Some(v.to_owned());
        for filter in [
            Filter::default(),
            Filter { actor: some("a"), ..Filter::default() },
            Filter { actor: some("b\""), resource: some("key/1/ü\""), ..Filter::default() },
            Filter { request_id: some("r-300"), ..Filter::default() },
            Filter { trace_id: some("none"), ..Filter::default() },
            Filter { outcome: some("denied"), ..Filter::default() },
        ] {
            let plain: Vec<i64> = entries.iter().filter(|e| filter.fits(&e.found())).map(|e| e.index).collect();
            assert_eq!(fitting(&entries, &filter), plain, "{filter:?}");
            let some_missing: Vec<Stored> = entries.iter().filter(|e| e.index % 5 != 0).cloned().collect();
            let plain: Vec<i64> = plain.into_iter().filter(|i| i % 5 != 0).collect();
            assert_eq!(fitting(&some_missing, &filter), plain, "{filter:?}");
        }
    }
}
