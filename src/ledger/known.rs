//! The facts that the writer holds in memory, and what a turn makes of them before it has committed.
//!
//! Not in memory means unknown, never absent: that a key is absent is a fact of its own (`None`), and known only because it
//! was read or decided (rule 9).

use std::collections::HashMap;
use std::sync::Arc;

use super::hot::{Fact, Hot};
use super::present::Present;
use super::touch::{Touch, What};

/// Facts of one kind: what each key is, or that there is none.
type Kind = HashMap<Vec<u8>, Option<Fact>>;

/// Facts by kind. There are half a dozen kinds, so they are looked through.
#[derive(Default)]
struct Kinds(Vec<(&'static str, Kind)>);

impl Kinds {
    fn get(&self, kind: &str) -> Option<&Kind> {
        self.0.iter().find(|(k, _)| *k == kind).map(|(_, facts)| facts)
    }

    fn get_mut(&mut self, kind: &str) -> Option<&mut Kind> {
        self.0.iter_mut().find(|(k, _)| *k == kind).map(|(_, facts)| facts)
    }

    /// Sets a fact; whether nothing was known of it.
    fn set(&mut self, kind: &'static str, key: Vec<u8>, fact: Option<Fact>) -> bool {
        match self.get_mut(kind) {
            Some(facts) => facts.insert(key, fact).is_none(),
            None => {
                self.0.push((kind, Kind::from([(key, fact)])));
                true
            }
        }
    }

    fn forget(&mut self, touched: &Touch) {
        let Some(facts) = self.get_mut(&touched.kind) else { return };
        match &touched.what {
            What::Key(key) => {
                facts.remove(key);
            }
            What::Prefix(prefix) => facts.retain(|key, _| !key.starts_with(prefix)),
            What::All => facts.clear(),
        }
    }
}

/// How many facts a generation takes. Two are held, so at most twice as many.
const GENERATION: usize = 65_536;

/// The facts as of the writer's place in the record.
pub(super) struct Known {
    present: Arc<Present>,
    /// What was used last.
    young: Kinds,
    /// What was used before the young ones filled a generation; forgotten when they do so again.
    old: Kinds,
    count: usize,
}

impl Known {
    /// Nothing, at a place that the writer has just found.
    pub fn nothing(present: Arc<Present>) -> Self {
        present.begin();
        Self { present, young: Kinds::default(), old: Kinds::default(), count: 0 }
    }

    /// Takes note of what an entry of the record touched: there may be a fact now that was not there before.
    pub fn heard(&self, touched: &Touch) {
        self.present.touched(touched);
    }

    /// How often it forgot what it had heard.
    pub fn begun(&self) -> u64 {
        self.present.begun()
    }

    fn get(&self, kind: &'static str, key: &[u8]) -> Option<&Option<Fact>> {
        self.young.get(kind).and_then(|k| k.get(key)).or_else(|| self.old.get(kind).and_then(|k| k.get(key)))
    }

    fn set(&mut self, kind: &'static str, key: Vec<u8>, fact: Option<Fact>) {
        if self.young.set(kind, key, fact) {
            self.count += 1;
        }
        if self.count >= GENERATION {
            self.old = std::mem::take(&mut self.young);
            self.count = 0;
        }
    }

    /// Forgets what somebody else changed.
    pub fn drop(&mut self, touched: &Touch) {
        for generation in [&mut self.young, &mut self.old] {
            generation.forget(touched);
        }
    }
}

/// What a turn read and decided: merged when it committed, thrown away when it did not (rule 4).
#[derive(Default)]
pub(super) struct Overlay {
    changed: Kinds,
    /// What an `apply` of this turn touched: what was known of it is known no more (rule 5).
    dropped: Vec<Touch>,
}

impl Overlay {
    /// What is known of a key: `None` if nothing, `Some(None)` that there is none.
    pub fn get<'a>(&'a self, known: &'a Known, kind: &'static str, key: &[u8]) -> Option<&'a Option<Fact>> {
        if let Some(fact) = self.changed.get(kind).and_then(|k| k.get(key)) {
            return Some(fact);
        }
        if self.dropped.iter().any(|t| t.covers(kind, key)) {
            return None;
        }
        known.get(kind, key)
    }

    /// Whether a fact is certainly not there, so that it need not be read: not if SQL of this turn may have made it.
    pub fn lacks(&self, known: &Known, kind: &'static str, key: &[u8]) -> bool {
        !self.dropped.iter().any(|t| t.covers(kind, key)) && known.present.lacks(kind, key)
    }

    /// Takes note of what was read or decided.
    pub fn set(&mut self, kind: &'static dyn Hot, key: Vec<u8>, fact: Option<Fact>) {
        self.changed.set(kind.name(), key, fact);
    }

    /// Takes note of what was changed by SQL.
    pub fn drop(&mut self, touched: Vec<Touch>) {
        touched.iter().for_each(|t| self.changed.forget(t));
        self.dropped.extend(touched);
    }

    /// The turn committed: what it knew is known.
    pub fn merge(self, known: &mut Known) {
        self.dropped.iter().for_each(|t| known.drop(t));
        for (kind, facts) in self.changed.0 {
            for (key, fact) in facts {
                known.set(kind, key, fact);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hot::ENTRIES;
    use super::*;

    const KIND: &str = "entry";

    fn nothing() -> Known {
        Known::nothing(Arc::new(Present::new(&ENTRIES, prometheus::IntCounter::new("spared", "in this test").unwrap())))
    }

    fn fact(n: i64) -> Option<Fact> {
        Some(Arc::new(n))
    }

    fn seen(overlay: &Overlay, known: &Known, key: &str) -> Option<Option<i64>> {
        let fact = overlay.get(known, KIND, key.as_bytes())?;
        Some(fact.as_ref().map(|f| *f.downcast_ref::<i64>().unwrap()))
    }

    #[test]
    fn absent_is_not_unknown() {
        let mut known = nothing();
        let mut turn = Overlay::default();
        assert_eq!(seen(&turn, &known, "a"), None, "unknown");
        turn.set(&ENTRIES, b"a".to_vec(), None);
        assert_eq!(seen(&turn, &known, "a"), Some(None), "known to be absent");
        turn.merge(&mut known);
        assert_eq!(seen(&Overlay::default(), &known, "a"), Some(None));
    }

    #[test]
    fn a_turn_that_fails_leaves_nothing_and_one_that_commits_its_last_word() {
        let mut known = nothing();
        let mut first = Overlay::default();
        first.set(&ENTRIES, b"a".to_vec(), fact(1));
        first.merge(&mut known);
        let mut failed = Overlay::default();
        failed.set(&ENTRIES, b"a".to_vec(), fact(2));
        std::mem::drop(failed);
        assert_eq!(seen(&Overlay::default(), &known, "a"), Some(Some(1)));
        let mut turn = Overlay::default();
        turn.set(&ENTRIES, b"a".to_vec(), fact(3));
        turn.drop(vec![Touch::prefix(KIND, "a")]);
        assert_eq!(seen(&turn, &known, "a"), None, "SQL may have changed it");
        turn.set(&ENTRIES, b"a".to_vec(), fact(4));
        turn.merge(&mut known);
        assert_eq!(seen(&Overlay::default(), &known, "a"), Some(Some(4)));
    }

    #[test]
    fn what_others_touched_is_forgotten_in_both_generations() {
        let mut known = nothing();
        for n in 0..GENERATION {
            known.set(KIND, format!("k/{n}").into_bytes(), fact(0));
        }
        known.set(KIND, b"k/0".to_vec(), fact(1));
        known.set(KIND, b"j".to_vec(), fact(2));
        let turn = Overlay::default();
        assert_eq!((seen(&turn, &known, "k/0"), seen(&turn, &known, "k/1")), (Some(Some(1)), Some(Some(0))));
        known.drop(&Touch::key(KIND, "k/0"));
        assert_eq!(seen(&turn, &known, "k/0"), None, "not the older word either");
        known.drop(&Touch::prefix(KIND, "k/"));
        assert_eq!((seen(&turn, &known, "k/1"), seen(&turn, &known, "j")), (None, Some(Some(2))));
        known.drop(&Touch::all(KIND));
        assert_eq!(seen(&turn, &known, "j"), None);
        assert!(known.old.0.iter().chain(&known.young.0).all(|(_, facts)| facts.is_empty()));
    }
}
