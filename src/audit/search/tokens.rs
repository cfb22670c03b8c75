//! What an entry can be found by, as tokens of its block, and what a search asks of them.
//!
//! A token is a hash of what it stands for: two that collide cost a search a look at one block more, never an answer. Actor,
//! outcome, room and action are also joined, in all ways in which a search can give some of them and leave the rest open, so
//! that two that are common each, and rare together, are found by being together. Resources are asked for by how they begin,
//! so their beginnings are tokens.

use std::collections::BTreeSet;
use std::hash::Hasher as _;

use fnv::FnvHasher;

use crate::audit::model::Filter;

use super::read::{self, Said};

/// A hash of what entries can be found by. Stored: it never changes.
pub(in crate::audit) type Token = u32;

/// Stands alone for a block that has more tokens than are kept: it may hold anything.
pub(in crate::audit) const ANYTHING: Token = Token::MAX;
/// Tokens of a block at most.
const MOST: usize = 65_536;
/// The longest word, in characters.
const WORD: usize = 64;
/// Beginnings of resources that are tokens, in bytes, and the letter they are told apart by.
const BEGINNINGS: [usize; 29] = [
    4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64, 80, 96, 128, 192, 256, 512,
];
/// The parts of a joined token: each is in it, or left open.
const ACTOR: u8 = 1;
const OUTCOME: u8 = 2;
const ROOM: u8 = 4;
const ACTION: u8 = 8;
/// All ways to join them that a search may need: a room and an action together are the action.
const JOINED: [u8; 11] = [
    ACTOR,
    OUTCOME,
    ACTOR | OUTCOME,
    ROOM,
    ROOM | ACTOR,
    ROOM | OUTCOME,
    ROOM | ACTOR | OUTCOME,
    ACTION,
    ACTION | ACTOR,
    ACTION | OUTCOME,
    ACTION | ACTOR | OUTCOME,
];
/// Letters of the tokens that are not joined.
const RESOURCE: u8 = b'r';
const REQUEST: u8 = b'i';
const TRACE: u8 = b't';
const SAID: u8 = b'w';

/// One word in lower case, cut; `into` is made new.
fn lower(word: &str, into: &mut String) {
    into.clear();
    if word.is_ascii() {
        into.push_str(&word[..word.len().min(WORD)]);
        into.make_ascii_lowercase();
    } else {
        into.extend(word.chars().take(WORD).flat_map(char::to_lowercase));
    }
}

fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty())
}

/// The words of a text: runs of letters and digits, in lower case.
pub(in crate::audit) fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    split(text).map(|word| {
        let mut out = String::with_capacity(word.len());
        lower(word, &mut out);
        out
    })
}

/// The words of an entry's details.
pub(in crate::audit) fn words_of(details: &[u8]) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    let said = read::details(details, &mut |text| out.extend(words(text)));
    for text in [&said.actor, &said.resource, &said.reason] {
        out.extend(words(text));
    }
    out
}

/// FNV-1a, mixed so that every bit of it can be used alone.
fn token(letter: u8, parts: &[&str]) -> Token {
    let mut hasher = FnvHasher::default();
    hasher.write_u8(letter);
    for part in parts {
        hasher.write(part.as_bytes());
        // No text has this byte, so that where one part ends is in the hash.
        hasher.write_u8(0xff);
    }
    mixed(hasher.finish())
}

fn mixed(hash: u64) -> Token {
    let hash = (hash ^ hash >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    Token::try_from(hash >> 32).unwrap_or_default()
}

fn joined(which: u8, parts: [&str; 4]) -> Token {
    let [actor, outcome, room, action] = parts;
    let given = |bit: u8, part| if which & bit == 0 { "" } else { part };
    token(which, &[given(ACTOR, actor), given(OUTCOME, outcome), given(ROOM, room), given(ACTION, action)])
}

/// The beginnings of a resource that are tokens, the shortest first.
fn beginnings(resource: &str, mut each: impl FnMut(Token)) {
    let mut hasher = FnvHasher::default();
    hasher.write_u8(RESOURCE);
    let mut at = 0;
    for end in BEGINNINGS {
        let Some(part) = resource.as_bytes().get(at..end) else { return };
        hasher.write(part);
        each(mixed(hasher.finish()));
        at = end;
    }
}

/// The tokens of a block, gathered entry by entry.
#[derive(Default)]
pub(super) struct Gathered {
    tokens: Vec<Token>,
    word: String,
}

impl Gathered {
    /// A kind of entry that was not met in the block before: actor, room, action, outcome.
    pub fn kind(&mut self, [actor, room, action, outcome]: [&str; 4]) {
        self.tokens.extend(JOINED.map(|which| joined(which, [actor, outcome, room, action])));
    }

    /// What an entry says of itself.
    pub fn names(&mut self, said: &Said<'_>) {
        beginnings(&said.resource, |t| self.tokens.push(t));
        for (letter, id) in [(REQUEST, &said.request_id), (TRACE, &said.trace_id)] {
            if !id.is_empty() {
                self.tokens.push(token(letter, &[id]));
            }
        }
        for text in [&said.actor, &said.resource, &said.reason] {
            self.text(text);
        }
    }

    /// A text of its details.
    pub fn text(&mut self, text: &str) {
        for word in split(text) {
            lower(word, &mut self.word);
            self.tokens.push(token(SAID, &[&self.word]));
        }
    }

    /// All of them, each once, in order.
    pub fn finish(mut self) -> Vec<Token> {
        self.tokens.sort_unstable();
        self.tokens.dedup();
        if self.tokens.len() > MOST { vec![ANYTHING] } else { self.tokens }
    }
}

/// Whether a block's tokens have all that is wanted.
pub(super) fn holds(tokens: &[Token], wanted: &[Token]) -> bool {
    tokens == [ANYTHING] || wanted.iter().all(|t| tokens.binary_search(t).is_ok())
}

/// What a block must hold for an entry of it to fit, all of it. Empty: any block may.
pub(in crate::audit) fn wanted(filter: &Filter) -> Vec<Token> {
    let mut all = Vec::new();
    // The action decides: of another room there is none that fits.
    let room = if filter.action.is_some() { &None } else { &filter.room };
    let given = [(ACTOR, &filter.actor), (OUTCOME, &filter.outcome), (ROOM, room), (ACTION, &filter.action)];
    let which = given.iter().filter(|(_, v)| v.is_some()).fold(0, |which, (bit, _)| which | bit);
    if which != 0 {
        all.push(joined(which, given.map(|(_, value)| value.as_deref().unwrap_or_default())));
    }
    if let Some(resource) = &filter.resource {
        let mut longest = None;
        beginnings(resource, |t| longest = Some(t));
        all.extend(longest);
    }
    for (letter, id) in [(REQUEST, &filter.request_id), (TRACE, &filter.trace_id)] {
        all.extend(id.as_ref().map(|id| token(letter, &[id])));
    }
    all.extend(filter.words.iter().map(|w| token(SAID, &[w])));
    all
}

#[cfg(test)]
mod tests {
    use super::super::block;
    use super::*;
    use crate::audit::model::{Found, Stored};
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

    #[test]
    fn words_are_those_of_what_was_said() {
        let (stored, _) = entry("arp", "state:put", "ok", "key/arp/Plan-7", "Replaced by O'Hara");
        let words: Vec<String> = words_of(stored.details.as_deref().unwrap()).into_iter().collect();
        assert_eq!(words, ["7", "arp", "by", "größe", "hara", "key", "o", "plan", "replaced"]);
    }

    #[test]
    fn tokens_are_the_same_for_ever() {
        assert_eq!(token(SAID, &["plan"]), 1_635_231_865);
        assert_eq!(joined(ACTOR | ACTION, ["root", "ok", "state", "state:put"]), 2_404_792_776);
        let mut all = Vec::new();
        beginnings("key/arp/3", |t| all.push(t));
        assert_eq!(all, [813_760_847, 992_980_129, 2_715_485_153]);
    }

    #[test]
    fn a_block_too_full_to_list_may_hold_anything() {
        let many: String = (0..MOST).map(|i| format!("w{i} ")).collect();
        let (stored, _) = entry("a", "state:put", "ok", "key/k", &many);
        let made = block::Block::of(0, [stored.parts()].into_iter());
        assert_eq!(made.tokens, [ANYTHING]);
        assert!(holds(&made.tokens, &[1, 2]));
    }

    proptest! {
        /// No filter that an entry fits passes its block by.
        #[test]
        fn a_block_holds_what_its_entries_fit(
            actor in "[a-c' \\\\]{1,3}", outcome in "ok|denied", action in "state:put|state:get|token:use",
            resource in "key/[a-bé/']{0,40}", reason in "[a-cÄ ]{0,6}",
            given in proptest::collection::vec(any::<bool>(), 7), cut in 0usize..44,
        ) {
            let (stored, found) = entry(&actor, &action, &outcome, &resource, &reason);
            let some = |i: usize, v: &str| given[i].then(|| v.to_owned());
            let filter = Filter {
                actor: some(0, &actor),
                outcome: some(1, &outcome),
                action: some(2, &action),
                room: some(3, &found.room),
                resource: some(4, &resource[..resource.floor_char_boundary(cut)]),
                request_id: some(5, "r-1"),
                words: if given[6] { words(&reason).collect() } else { Vec::new() },
                ..Filter::default()
            };
            prop_assert!(filter.fits(&found) && filter.says(stored.details.as_deref()));
            let made = block::Block::of(0, [stored.parts()].into_iter());
            prop_assert!(holds(&made.tokens, &wanted(&filter)));
        }
    }
}
