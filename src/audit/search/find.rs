//! What is found: entries page by page, and how many there are of each kind.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::PgConnection;

use crate::audit::model::{Filter, Stored};
use crate::audit::{Audit, store as entries};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Clock, Refusal};
use crate::ledger::Entry;

use super::block::{self, Kind};
use super::shelf::{BLOCKS, Spot};
use super::tokens::{self, Token};
use super::{BLOCK, TAIL, store};

/// How long a page may look for what is rare before it answers with what it has, and how to go on.
const PATIENCE: Duration = Duration::from_millis(400);
/// How long counting may take.
const COUNTING: Duration = Duration::from_secs(3);
/// Entries of a shelf.
const SHELF: i64 = BLOCKS * BLOCK;
/// Shelves and blocks that are read at a time, at most; one at first, for often that is enough.
const SHELVES: i64 = 64;
const READ: usize = 16;
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

impl Range {
    fn is_empty(self) -> bool {
        self.from > self.to
    }
}

/// What is still to be looked at.
struct Search<'a> {
    conn: &'a mut PgConnection,
    filter: &'a Filter,
    /// What a block must hold.
    wanted: Vec<Token>,
    range: Range,
    /// Entries from this one on are in no block; those before it from `shelved` on in none of a shelf.
    whole: i64,
    shelved: i64,
    /// Shelves to be read next.
    shelves: i64,
}

/// Entries that fit, in the filter's order, of a block or of what is in none.
struct Fitting {
    kinds: Vec<Kind>,
    /// Index, and which of the kinds.
    entries: Vec<(i64, usize)>,
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
        let refusal = |e| self.store.refusal(e);
        // Of one moment: a block that goes onto its shelf meanwhile would be found in neither place.
        let mut moment = self.store.moment().await.map_err(refusal)?;
        let mut search = Search::new(&mut moment, filter, upto, after).await.map_err(refusal)?;
        let (found, next) = search.page(limit, &self.clock).await.map_err(refusal)?;
        let mut entries = entries::entries(&mut moment, &found).await.map_err(refusal)?;
        moment.commit().await.map_err(refusal)?;
        entries.sort_by_key(|e| if filter.ascending { e.index } else { -e.index });
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
        let refusal = |e| self.store.refusal(e);
        // Of one moment: a block that goes onto its shelf meanwhile would be found in neither place.
        let mut moment = self.store.moment().await.map_err(refusal)?;
        let mut search = Search::new(&mut moment, filter, upto, None).await.map_err(refusal)?;
        let counted = search.count(&self.clock).await.map_err(refusal)?;
        moment.commit().await.map_err(refusal)?;
        let entry = Entry::ok("audit:read", "entry").change("counted", counted.entries).change("upto", upto);
        self.ledger.record(caller, permit, entry).await?;
        Ok(Counted { upto, ..counted })
    }

    /// Waits until the search reflects `upto`, or this moment.
    async fn searched(&self, upto: Option<i64>) -> Result<i64, Refusal> {
        let upto = upto.unwrap_or_else(|| self.ledger.index());
        let mut indexed = self.indexed.clone();
        if *indexed.borrow() + TAIL < upto {
            self.hurry.notify_one();
        }
        let waited = async {
            let there = self.ledger.index() >= upto || self.ledger.reach(upto, Duration::from_secs(5)).await.is_ok();
            there && indexed.wait_for(|whole| whole.saturating_add(TAIL) >= upto).await.is_ok()
        };
        if tokio::time::timeout(Duration::from_secs(5), waited).await.unwrap_or(false) {
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
        let whole = store::indexed(conn).await? + 1;
        let (wanted, shelved) = (tokens::wanted(filter), whole / SHELF * SHELF);
        Ok(Self { conn, filter, wanted, range, whole, shelved, shelves: 1 })
    }

    /// Up to `limit` indexes in the filter's order, and where to go on.
    async fn page(&mut self, limit: usize, clock: &Clock) -> Result<(Vec<i64>, Option<i64>), sqlx::Error> {
        if self.filter.is_open() {
            return Ok(self.every(limit));
        }
        let began = clock.elapsed();
        let (mut found, mut read) = (Vec::new(), 1);
        while let Some((part, blocks)) = self.part().await? {
            for some in pieces(&blocks, &mut read) {
                for fitting in self.fitting(part, some).await? {
                    found.extend(fitting.entries.into_iter().map(|(index, _)| index));
                }
                if found.len() > limit {
                    found.truncate(limit);
                    return Ok((found.clone(), found.last().copied()));
                }
                let late = clock.elapsed().saturating_sub(began) > PATIENCE;
                // Where there is nothing more to look at, late is in time.
                if late && !(self.range.is_empty() && some.last() == blocks.last()) {
                    return Ok((found, Some(self.edge(part, some))));
                }
            }
        }
        Ok((found, None))
    }

    /// The page of a filter that everything fits.
    fn every(&self, limit: usize) -> (Vec<i64>, Option<i64>) {
        let Range { from, to } = self.range;
        if self.range.is_empty() {
            return (Vec::new(), None);
        }
        let more = to - from >= limit as i64;
        let found: Vec<i64> = if self.filter.ascending {
            (from..=to).take(limit).collect()
        } else {
            (from..=to).rev().take(limit).collect()
        };
        let next = found.last().copied().filter(|_| more);
        (found, next)
    }

    /// The last entry that was looked at when these blocks of a part were.
    fn edge(&self, part: Range, blocks: &[i64]) -> i64 {
        match (blocks.last(), self.filter.ascending) {
            (Some(block), true) => part.to.min(block * BLOCK + BLOCK - 1),
            (Some(block), false) => part.from.max(block * BLOCK),
            (None, true) => part.to,
            (None, false) => part.from,
        }
    }

    /// The next part to look at, and the blocks of it that may hold what fits, in order; moves past it. `None` at the end. Of
    /// what is in no block, there is none.
    async fn part(&mut self) -> Result<Option<(Range, Vec<i64>)>, sqlx::Error> {
        let (Range { from, to }, up) = (self.range, self.filter.ascending);
        if self.range.is_empty() {
            return Ok(None);
        }
        let lead = if up { from } else { to };
        // Parts do not reach across the borders of what is kept in one way.
        let (start, end) = if lead >= self.whole {
            (self.whole.max(lead / BLOCK * BLOCK), lead / BLOCK * BLOCK + BLOCK)
        } else if lead >= self.shelved {
            (self.shelved, self.whole)
        } else {
            let (shelf, most) = (lead / SHELF, self.shelves);
            self.shelves = (self.shelves * 4).min(SHELVES);
            let (first, last) = if up { (shelf, shelf + most) } else { ((shelf + 1 - most).max(0), shelf + 1) };
            (first * SHELF, (last * SHELF).min(self.shelved))
        };
        let part = Range { from: from.max(start), to: to.min(end - 1) };
        self.range = if up { Range { from: part.to + 1, to } } else { Range { from, to: part.from - 1 } };
        let mut blocks = self.blocks(part).await?;
        if !up {
            blocks.reverse();
        }
        Ok(Some((part, blocks)))
    }

    /// The blocks of a part that may hold what fits, in order.
    async fn blocks(&mut self, part: Range) -> Result<Vec<i64>, sqlx::Error> {
        let (first, last) = (part.from / BLOCK, part.to / BLOCK);
        if part.from >= self.whole {
            return Ok(Vec::new());
        }
        if self.wanted.is_empty() {
            return Ok((first..=last).collect());
        }
        if part.from >= self.shelved {
            let loose = store::loose(self.conn, first, last).await?;
            let holding = loose.into_iter().filter(|(_, has)| tokens::holds(has, &self.wanted));
            return Ok(holding.map(|(block, _)| block).collect());
        }
        let spots: Vec<Spot> = self.wanted.iter().map(|t| Spot::of(*t)).collect();
        let shelves = store::shelves(self.conn, &spots, first / BLOCKS, last / BLOCKS).await?;
        let of_shelf = |(shelf, bits): (i64, u64)| {
            (0..BLOCKS).filter(move |place| bits >> place & 1 == 1).map(move |place| shelf * BLOCKS + place)
        };
        Ok(shelves.into_iter().flat_map(of_shelf).filter(|block| (first..=last).contains(block)).collect())
    }

    /// What fits of these blocks of a part, or of the part itself if that is in none; block by block, in order.
    async fn fitting(&mut self, part: Range, blocks: &[i64]) -> Result<Vec<Fitting>, sqlx::Error> {
        let mut all = Vec::new();
        if part.from >= self.whole {
            all.push(self.unkept(part).await?);
        } else if !blocks.is_empty() {
            let names = block::asks_names(self.filter);
            for kept in store::blocks(self.conn, blocks, names).await? {
                let read = block::Read::new(&kept)?;
                let entries = read.fitting(self.filter, kept.names.as_deref(), (part.from, part.to))?;
                all.push(Fitting { kinds: read.into_kinds(), entries });
            }
            self.saying(&mut all).await?;
        }
        if !self.filter.ascending {
            all.reverse();
            all.iter_mut().for_each(|fitting| fitting.entries.reverse());
        }
        Ok(all)
    }

    /// What fits of entries that are in no block.
    async fn unkept(&mut self, part: Range) -> Result<Fitting, sqlx::Error> {
        let mut fitting = Fitting { kinds: Vec::new(), entries: Vec::new() };
        for stored in entries::unindexed(self.conn, part.from - 1, part.to - part.from + 1).await? {
            let found = stored.found();
            if self.filter.fits(&found) && self.filter.says(stored.details.as_deref()) {
                fitting.entries.push((stored.index, fitting.kinds.len()));
                fitting.kinds.push([found.actor, found.room, found.action, found.outcome]);
            }
        }
        Ok(fitting)
    }

    /// Leaves of these those whose details have all the words.
    async fn saying(&mut self, all: &mut [Fitting]) -> Result<(), sqlx::Error> {
        if self.filter.words.is_empty() {
            return Ok(());
        }
        let indexes: Vec<i64> = all.iter().flat_map(|f| f.entries.iter().map(|(index, _)| *index)).collect();
        let details: HashMap<i64, Vec<u8>> = entries::details(self.conn, &indexes).await?.into_iter().collect();
        for fitting in all {
            fitting.entries.retain(|(index, _)| self.filter.says(details.get(index).map(Vec::as_slice)));
        }
        Ok(())
    }

    async fn count(&mut self, clock: &Clock) -> Result<Counted, sqlx::Error> {
        let began = clock.elapsed();
        let mut sums: HashMap<Kind, i64> = HashMap::new();
        let (oldest, mut read) = (self.range.from, 1);
        let mut from = oldest;
        'all: while let Some((part, blocks)) = self.part().await? {
            for some in pieces(&blocks, &mut read) {
                for fitting in self.fitting(part, some).await? {
                    fitting.add(&mut sums);
                }
                let last = self.range.is_empty() && some.last() == blocks.last();
                if !last && clock.elapsed().saturating_sub(began) > COUNTING {
                    from = self.edge(part, some);
                    break 'all;
                }
            }
        }
        let facets = ["actor", "room", "action", "outcome"];
        let facets = std::array::from_fn::<_, 4, _>(|n| (facets[n], facet(n, &sums)));
        let (complete, entries) = (from <= oldest, sums.values().sum());
        Ok(Counted { upto: 0, from, complete, entries, facets: facets.into() })
    }
}

impl Fitting {
    /// Counts its entries by their kinds.
    fn add(self, sums: &mut HashMap<Kind, i64>) {
        let mut counts = vec![0; self.kinds.len()];
        self.entries.iter().for_each(|(_, kind)| counts[*kind] += 1);
        for (kind, n) in self.kinds.into_iter().zip(counts).filter(|(_, n)| *n > 0) {
            *sums.entry(kind).or_default() += n;
        }
    }
}

/// Blocks a few at a time: one at first, then more. A part without blocks is one piece.
fn pieces<'a>(blocks: &'a [i64], read: &mut usize) -> Vec<&'a [i64]> {
    let (mut all, mut rest) = (Vec::new(), blocks);
    loop {
        let (some, more) = rest.split_at((*read).min(rest.len()));
        all.push(some);
        if more.is_empty() {
            return all;
        }
        rest = more;
        *read = (*read * 2).min(READ);
    }
}

fn facet(n: usize, sums: &HashMap<Kind, i64>) -> Vec<(String, i64)> {
    let mut by: HashMap<&str, i64> = HashMap::new();
    for (kind, count) in sums {
        *by.entry(&kind[n]).or_default() += count;
    }
    let mut all: Vec<(String, i64)> = by.into_iter().map(|(v, n)| (v.to_owned(), n)).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    all.truncate(SHOWN);
    all
}
