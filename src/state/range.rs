//! Reads of keys in a row: of the present or as of an index, in any order, and how many there are.

use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::model::Item;
use super::span::Span;
use super::store::{self, ranges};
use super::{State, not_compacted};

/// What keys are put in order by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Key,
    Version,
    Created,
    Index,
    Value,
}

/// What is read.
#[derive(Clone, Debug)]
pub(super) struct Range {
    pub keys: Span,
    /// As of this index; otherwise the present.
    pub at: Option<i64>,
    /// Keys at most.
    pub limit: i64,
    /// With their values; without, these are empty.
    pub values: bool,
    /// Whether all keys there are are counted.
    pub counted: bool,
    pub by: By,
    pub descending: bool,
    /// Only keys whose index is from the one to the other.
    pub changed: (i64, i64),
    /// The same of their creation.
    pub created: (i64, i64),
}

impl Range {
    /// All of these keys, with their values, in order of the key.
    pub fn of(keys: Span) -> Self {
        let any = (0, i64::MAX);
        let (limit, by) = (i64::MAX - 1, By::Key);
        let (at, values, counted, descending) = (None, true, false, false);
        Self { keys, at, limit, values, counted, by, descending, changed: any, created: any }
    }

    /// Whether the first keys of the row are those that are given.
    pub fn plain(&self) -> bool {
        self.by == By::Key && !self.descending && self.changed == (0, i64::MAX) && self.created == (0, i64::MAX)
    }

    fn wants(&self, item: &Item) -> bool {
        let within = |(least, most): (i64, i64), n| (least..=most).contains(&n);
        within(self.changed, item.index) && within(self.created, item.created_index)
    }
}

/// What was read.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// The head's index.
    pub head: i64,
    /// Below this index history is incomplete.
    pub mark: i64,
    pub items: Vec<Item>,
    /// How many keys there are, whatever was wanted of them, if they were counted.
    pub total: i64,
    /// Whether more than the limit fits.
    pub more: bool,
    /// Whether values were left out because there are too many.
    pub cut: bool,
}

impl State {
    /// Reads keys, of one moment.
    ///
    /// # Errors
    /// 400 beyond the head, 410 before the compaction mark.
    pub(super) async fn range(&self, caller: &Caller, range: &Range) -> Result<Found, Refusal> {
        let ask = range.keys.ask("state:get", "state:list");
        self.ledger.permit(caller, &[ask]).await?;
        let head = self.ledger.index();
        if let (Some(key), None) = (range.keys.single(), range.at) {
            self.metrics.count("get");
            let item = self.present(key).await?;
            return Ok(alone(range, head, item.as_deref()));
        }
        self.metrics.count("list");
        if let Some(at) = range.at {
            self.in_history(at, head)?;
        }
        let mut conn = self.connection().await?;
        let found = ranges::read(&mut conn, range, store::PAGE_BYTES).await.map_err(|e| self.store.refusal(e))?;
        not_compacted(range.at.unwrap_or(found.mark), found.mark)?;
        Ok(found)
    }
}

/// What is found where one key of the present is wanted.
pub(super) fn alone(range: &Range, head: i64, item: Option<&Item>) -> Found {
    // The row may be newer than the index this daemon reflects.
    let head = item.map_or(head, |item| head.max(item.index));
    let wanted = item
        .filter(|item| range.limit > 0 && range.wants(item))
        .map(|item| if range.values { item.clone() } else { Item { value: Vec::new(), ..item.clone() } });
    Found { head, items: wanted.into_iter().collect(), total: i64::from(item.is_some()), ..Found::default() }
}

/// Refuses what lies ahead of the head, or before the mark, where it is read beside something else.
pub(super) fn reachable(at: i64, head: i64, mark: i64) -> Result<(), Refusal> {
    if at > head {
        return Err(Refusal::new(&problem::BEYOND_HEAD, format!("index {at} is beyond the head, which is {head}")));
    }
    not_compacted(at, mark)
}
