//! What is found: entries page by page, and how many there are of each kind.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::PgConnection;

use crate::audit::model::{Filter, Stored};
use crate::audit::{Audit, store as entries};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Clock, Refusal};
use crate::ledger::Entry;

use super::store::{self, Combined};
use super::{BLOCK, tokens};

/// How long a page may look for what is rare before it answers with what it has, and how to go on.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long counting may take.
const COUNTING: Duration = Duration::from_secs(3);
/// Entries that one statement looks through when it counts.
const SPAN: i64 = 1024 * BLOCK;
/// Blocks read at a time, at most.
const BLOCKS: i64 = 256;
/// Values of a facet that are shown, the most frequent first.
const SHOWN: usize = 100;

/// A page of entries.
pub struct Page {
    /// The index whose moment all pages are of.
    pub upto: i64,
    /// What was found.
    pub entries: Vec<Stored>,
    /// Where the next page begins after; `None`: this was the last.
    pub next: Option<i64>,
}

/// How many there are of each kind.
pub struct Counted {
    /// The index whose moment this is of.
    pub upto: i64,
    /// The oldest index that was looked at; not the beginning if time ran out.
    pub from: i64,
    /// Whether all of it was looked at.
    pub complete: bool,
    /// How many fit.
    pub entries: i64,
    /// Facet, then its values with their numbers, the most frequent first.
    pub facets: Vec<(&'static str, Vec<(String, i64)>)>,
}

/// The part of the record a search is about: from the oldest index to the newest.
#[derive(Clone, Copy)]
struct Range {
    from: i64,
    to: i64,
}

/// What is still to be looked at.
struct Search<'a> {
    conn: &'a mut PgConnection,
    filter: &'a Filter,
    query: Option<String>,
    range: Range,
    /// Blocks below this one are whole, and have tokens.
    whole: i64,
}

impl Audit {
    /// Entries that fit, of one moment; recorded.
    ///
    /// # Errors
    /// 503 when the search does not reach that moment in time.
    pub async fn list(
        &self,
        caller: &Caller,
        filter: &Filter,
        upto: Option<i64>,
        after: Option<i64>,
        limit: usize,
    ) -> Result<Page, Refusal> {
        let permit = self.ledger.permit(caller, &[Ask::new("audit:read", "Entry", "")]).await?;
        let upto = self.searched(upto).await?;
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let mut search = Search::new(&mut conn, filter, upto, after).await.map_err(refusal)?;
        let (mut found, next) = search.page(limit, &self.clock).await.map_err(refusal)?;
        let mut entries = entries::entries(&mut conn, &found).await.map_err(refusal)?;
        found.clear();
        entries.sort_by_key(|e| if filter.ascending { e.index } else { -e.index });
        drop(conn);
        let entry = Entry::ok("audit:read", "entry").change("found", entries.len()).change("upto", upto);
        self.ledger.record(caller, permit, entry).await?;
        Ok(Page { upto, entries, next })
    }

    /// How many entries fit, by actor, room, action and outcome; recorded.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub async fn facets(&self, caller: &Caller, filter: &Filter) -> Result<Counted, Refusal> {
        let permit = self.ledger.permit(caller, &[Ask::new("audit:read", "Entry", "")]).await?;
        let upto = self.searched(None).await?;
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let mut search = Search::new(&mut conn, filter, upto, None).await.map_err(refusal)?;
        let counted = search.count(&self.clock).await.map_err(refusal)?;
        drop(conn);
        let entry = Entry::ok("audit:read", "entry").change("counted", counted.entries).change("upto", upto);
        self.ledger.record(caller, permit, entry).await?;
        Ok(Counted { upto, ..counted })
    }

    /// Waits until the search reflects `upto`, or this moment.
    async fn searched(&self, upto: Option<i64>) -> Result<i64, Refusal> {
        let upto = upto.unwrap_or_else(|| self.ledger.index());
        let mut indexed = self.indexed.clone();
        if *indexed.borrow() < upto {
            self.hurry.notify_one();
        }
        let waited = tokio::time::timeout(Duration::from_secs(5), indexed.wait_for(|i| *i >= upto)).await.is_ok();
        if waited {
            Ok(upto)
        } else {
            Err(Refusal::unavailable(format!("the search has not reached index {upto} yet")))
        }
    }
}

impl<'a> Search<'a> {
    async fn new(
        conn: &'a mut PgConnection,
        filter: &'a Filter,
        upto: i64,
        after: Option<i64>,
    ) -> Result<Self, sqlx::Error> {
        let mut range = Range { from: 0, to: upto };
        if let Some(time) = filter.since {
            range.from = store::not_before(conn, time).await?;
        }
        if let Some(time) = filter.until {
            range.to = range.to.min(store::not_before(conn, time).await? - 1);
        }
        match after {
            Some(after) if filter.ascending => range.from = range.from.max(after.saturating_add(1)),
            Some(after) => range.to = range.to.min(after.saturating_sub(1)),
            None => {}
        }
        let query = tokens::wanted(filter);
        let whole = if query.is_some() { store::whole_blocks(conn).await? } else { 0 };
        Ok(Self { conn, filter, query, range, whole })
    }

    /// Up to `limit` indexes in the filter's order, and where to go on.
    async fn page(&mut self, limit: usize, clock: &Clock) -> Result<(Vec<i64>, Option<i64>), sqlx::Error> {
        let began = clock.elapsed();
        let mut found = Vec::new();
        let mut ranges = self.ranges(1).await?;
        while let Some(range) = ranges.pop() {
            self.fitting(range, limit + 1, &mut found).await?;
            if found.len() > limit {
                found.truncate(limit);
                return Ok((found.clone(), found.last().copied()));
            }
            let late = clock.elapsed().saturating_sub(began) > PATIENCE;
            if ranges.is_empty() && self.range.from <= self.range.to {
                ranges = self.ranges(BLOCKS).await?;
            }
            if late && !(ranges.is_empty() && self.range.from > self.range.to) {
                return Ok((found, Some(if self.filter.ascending { range.to } else { range.from })));
            }
        }
        Ok((found, None))
    }

    /// The next stretches that may hold what fits, the first to look at last, and moves past them.
    async fn ranges(&mut self, blocks: i64) -> Result<Vec<Range>, sqlx::Error> {
        let Range { from, to } = self.range;
        if from > to {
            return Ok(Vec::new());
        }
        let up = self.filter.ascending;
        let Some(query) = &self.query else {
            self.range = Range { from: 1, to: 0 };
            return Ok(vec![Range { from, to }]);
        };
        // The newest entries are in no whole block yet.
        let tail = self.whole * BLOCK;
        if to >= tail && (!up || from >= tail) {
            let start = from.max(tail);
            self.range = if up { Range { from: 1, to: 0 } } else { Range { from, to: start - 1 } };
            return Ok(vec![Range { from: start, to }]);
        }
        let (first, last) = (from / BLOCK, to.min(tail - 1) / BLOCK);
        let found = store::blocks(self.conn, query, first, last, up, blocks).await?;
        let full = found.len() as i64 == blocks;
        self.range = match (full.then(|| found.last()).flatten(), up) {
            (Some(last), true) => Range { from: (last + 1) * BLOCK, to },
            (Some(last), false) => Range { from, to: last * BLOCK - 1 },
            (None, true) if to >= tail => Range { from: tail, to },
            (None, _) => Range { from: 1, to: 0 },
        };
        if found.is_empty() && self.range.from <= self.range.to {
            return Box::pin(self.ranges(blocks)).await;
        }
        let within = |block: &i64| Range { from: from.max(block * BLOCK), to: to.min(block * BLOCK + BLOCK - 1) };
        Ok(join(found.iter().map(within)).into_iter().rev().collect())
    }

    /// Adds what fits in a stretch, until there are `most`.
    async fn fitting(&mut self, range: Range, most: usize, found: &mut Vec<i64>) -> Result<(), sqlx::Error> {
        let up = self.filter.ascending;
        let Range { mut from, mut to } = range;
        loop {
            let want = if self.filter.words.is_empty() { most - found.len() } else { BLOCK as usize };
            let page = store::matching(self.conn, self.filter, from, to, up, want as i64).await?;
            let full = page.len() == want;
            match page.last() {
                Some(last) if up => from = last + 1,
                Some(last) => to = last - 1,
                None => return Ok(()),
            }
            found.extend(self.saying(page).await?);
            if !full || found.len() >= most {
                return Ok(());
            }
        }
    }

    /// Of these, those whose details have all the words.
    async fn saying(&mut self, page: Vec<i64>) -> Result<Vec<i64>, sqlx::Error> {
        if self.filter.words.is_empty() {
            return Ok(page);
        }
        let details: HashMap<i64, Vec<u8>> = entries::details(self.conn, &page).await?.into_iter().collect();
        Ok(page.into_iter().filter(|i| self.filter.says(details.get(i).map(Vec::as_slice))).collect())
    }

    async fn count(&mut self, clock: &Clock) -> Result<Counted, sqlx::Error> {
        let began = clock.elapsed();
        let mut sums: HashMap<Combined, i64> = HashMap::new();
        let Range { from: oldest, to: mut end } = self.range;
        let mut complete = true;
        while end >= oldest {
            let start = oldest.max(end / SPAN * SPAN);
            self.range = Range { from: start, to: end };
            loop {
                let ranges = self.ranges(BLOCKS).await?;
                if ranges.is_empty() {
                    break;
                }
                for range in ranges {
                    self.add(range, &mut sums).await?;
                }
            }
            end = start - 1;
            if end >= oldest && clock.elapsed().saturating_sub(began) > COUNTING {
                complete = false;
                break;
            }
        }
        let facets = ["actor", "room", "action", "outcome"].map(|name| (name, facet(name, &sums)));
        Ok(Counted {
            upto: 0,
            from: (end + 1).max(oldest),
            complete,
            entries: sums.values().sum(),
            facets: facets.into(),
        })
    }

    async fn add(&mut self, range: Range, sums: &mut HashMap<Combined, i64>) -> Result<(), sqlx::Error> {
        let only = if self.filter.words.is_empty() {
            None
        } else {
            let mut found = Vec::new();
            self.fitting(range, usize::MAX, &mut found).await?;
            Some(found)
        };
        for (combined, n) in store::combined(self.conn, self.filter, range.from, range.to, only).await? {
            *sums.entry(combined).or_default() += n;
        }
        Ok(())
    }
}

/// Stretches that follow each other without a gap, as one.
fn join(ranges: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut out: Vec<Range> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.to + 1 == range.from => last.to = range.to,
            Some(last) if range.to + 1 == last.from => last.from = range.from,
            _ => out.push(range),
        }
    }
    out
}

fn facet(name: &str, sums: &HashMap<Combined, i64>) -> Vec<(String, i64)> {
    let mut by: HashMap<&str, i64> = HashMap::new();
    for (combined, n) in sums {
        *by.entry(combined.of(name)).or_default() += n;
    }
    let mut all: Vec<(String, i64)> = by.into_iter().map(|(v, n)| (v.to_owned(), n)).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    all.truncate(SHOWN);
    all
}
