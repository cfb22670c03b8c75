//! Replay: what a bundle would have decided, over decisions that were really made, each with the entities of its index and the
//! other bundle of its time.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};
use tokio::sync::SemaphorePermit;

use crate::kernel::web::{Ask, Caller, EntityName};
use crate::kernel::{Refusal, problem};

use super::engine::{Answered, Force};
use super::past::{self, Past};
use super::rules::{self, Entities};
use super::snapshot::{self, Given, Held, Slice};
use super::spread::{CORES, spread};
use super::store::decisions as rows;
use super::{Governance, snapshot::read};

/// Decisions read where no limit is given.
const READ: usize = 50_000;
/// How long one answer is worked at; `next` says where to go on.
const PATIENCE: Duration = Duration::from_secs(4);
/// Entries read at a time, as long as that takes the time that a step should.
const STEPS: std::ops::Range<i64> = 16..1024;
/// How long a step should take.
const STEP: Duration = Duration::from_millis(200);
/// Replays at once; others wait for their turn.
pub(super) const AT_ONCE: usize = 2;
/// Records read at a time, bytes.
const BYTES: i64 = 16 * 1024 * 1024;
/// Entities read at a time.
const PAGE: usize = 10_000;
/// Flips listed in one answer; all are counted, and grouped.
const LISTED: usize = 1000;
/// How far before its segment a decision can have been made, in indexes: what was undone of the entities is kept so long.
const BEHIND: i64 = 20_000;

/// An entity from an index on; `None` where it was removed.
type Version = (i64, Option<Arc<Held>>);

/// The entities of an index, and how they were a little before.
#[derive(Default)]
pub(super) struct History {
    /// The versions of each, the newest last.
    entities: HashMap<EntityName, SmallVec<[Version; 1]>>,
    index: i64,
    /// What changed, the newest last.
    changed: VecDeque<(i64, EntityName)>,
}

impl History {
    /// All entities as they were at an index.
    fn begin(index: i64, entities: impl Iterator<Item = (EntityName, Arc<Held>)>) -> Self {
        let first = |(name, held)| (name, smallvec![(i64::MIN, Some(held))]);
        Self { entities: entities.map(first).collect(), index, changed: VecDeque::new() }
    }

    fn apply(&mut self, index: i64, name: EntityName, now: Option<Arc<Held>>) {
        self.entities.entry(name.clone()).or_default().push((index, now));
        self.changed.push_back((index, name));
        while let Some((old, name)) = self.changed.pop_front_if(|(i, _)| *i < index - BEHIND) {
            // Nobody asks any more how it was before that change.
            let Some(versions) = self.entities.get_mut(&name) else { continue };
            versions.retain(|(i, _)| *i >= old);
            if let [(_, None)] = versions[..] {
                self.entities.remove(&name);
            }
        }
    }

    /// As it was at an index not after this one.
    fn at(&self, index: i64) -> View<'_> {
        View { history: self, index }
    }
}

/// The entities of one moment.
struct View<'a> {
    history: &'a History,
    index: i64,
}

impl View<'_> {
    fn find(&self, name: &EntityName) -> Option<&Arc<Held>> {
        let versions = self.history.entities.get(name)?;
        versions.iter().rev().find(|(from, _)| *from <= self.index)?.1.as_ref()
    }
}

impl Entities for View<'_> {
    fn held(&self, name: &EntityName) -> Option<Arc<Held>> {
        self.find(name).cloned()
    }

    fn slice(&self, roots: &[&EntityName], given: &Given<'_>) -> Result<Slice, Refusal> {
        let held = |name: &EntityName| snapshot::given(given, name).or_else(|| self.find(name)).cloned();
        snapshot::slice(held, self.index, roots)
    }
}

/// A decision that would be another.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Flip {
    /// The decision
    pub decision_id: String,
    /// Its entry
    pub index: i64,
    /// Its place among the records of the entry
    #[serde(default)]
    pub position: usize,
    /// As it was
    pub before: bool,
    /// As it would have been
    pub after: bool,
    /// About whom
    #[schema(value_type = Object)]
    pub subject: EntityName,
    /// To do what
    pub action: String,
    /// To what
    #[schema(value_type = Object)]
    pub resource: EntityName,
    /// The policies that determined it
    pub policies_before: Vec<String>,
    /// Those that would have
    pub policies_after: Vec<String>,
}

/// How many flips there are of each policy, subject and action.
#[derive(Clone, Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct Groups {
    /// By policy: those that determined it before and would not have, or the other way round
    pub policy: BTreeMap<String, u64>,
    /// By subject, `Type::id`
    pub subject: BTreeMap<String, u64>,
    /// By action
    pub action: BTreeMap<String, u64>,
}

/// Names counted in a group; those that come after so many are counted together.
const NAMED: usize = 1000;
/// What they are counted under: no policy, action or `Type::id` is called so.
const OTHERS: &str = "*";

fn add(group: &mut BTreeMap<String, u64>, name: &str, n: u64) {
    let name = if group.len() >= NAMED && !group.contains_key(name) { OTHERS } else { name };
    match group.get_mut(name) {
        Some(count) => *count += n,
        None => drop(group.insert(name.to_owned(), n)),
    }
}

impl Groups {
    /// Adds what was counted elsewhere.
    pub(super) fn merge(&mut self, other: &Self) {
        let pairs =
            [(&mut self.policy, &other.policy), (&mut self.subject, &other.subject), (&mut self.action, &other.action)];
        for (into, from) in pairs {
            from.iter().for_each(|(name, n)| add(into, name, *n));
        }
    }

    fn count(&mut self, flip: &Flip) {
        let (before, after) = (&flip.policies_before, &flip.policies_after);
        let changed = before.iter().filter(|p| !after.contains(p)).chain(after.iter().filter(|p| !before.contains(p)));
        for policy in changed {
            add(&mut self.policy, policy, 1);
        }
        add(&mut self.subject, &format!("{}::{}", flip.subject.kind, flip.subject.id), 1);
        add(&mut self.action, &flip.action, 1);
    }
}

/// What a replay found.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Replay {
    /// The bundle that was tried
    pub bundle: String,
    /// From this index
    pub from: i64,
    /// To this index
    pub to: i64,
    /// The index that was reached
    pub reached: i64,
    /// Decisions that were decided again
    pub read: u64,
    /// Those whose record does not have all of what was asked; they were left out
    pub skipped: u64,
    /// How many would be other ones
    pub changed: u64,
    /// The first of them
    pub flips: Vec<Flip>,
    /// All of them, counted
    pub groups: Groups,
    /// Where to go on; `null` at the end
    pub next: Option<String>,
}

/// From where to where, and how many.
#[derive(Clone, Debug, Default)]
pub(super) struct Range {
    pub from: i64,
    pub to: Option<i64>,
    pub limit: Option<usize>,
    /// Where an earlier answer ended.
    pub after: Option<(i64, usize)>,
}

impl Governance {
    /// Decides recorded decisions again with another bundle.
    pub(super) async fn replay(&self, caller: &Caller, id: &str, range: Range) -> Result<Replay, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:decision-read", "Bundle", id)]).await?;
        let (row, _) = self.open(id).await?;
        let _turn = self.turn().await?;
        let head = self.ledger.index();
        let to = range.to.unwrap_or(head).min(head);
        if range.from > head {
            return Err(Refusal::new(&problem::BEYOND_HEAD, format!("the newest index is {head}")));
        }
        let began = self.rules.clock.elapsed();
        let mut from = range.after.map_or(range.from, |(index, _)| index);
        let mut run = self.run(id, &row.scope, from).await?;
        (run.done.from, run.done.to) = (range.from, to);
        (run.limit, run.after, run.cores) = (range.limit.unwrap_or(READ), range.after, CORES);
        let mut step = STEPS.start * 4;
        while from <= to && run.next.is_none() {
            let until = (from + step - 1).min(to);
            let before = self.rules.clock.elapsed();
            self.go_on(&mut run, from, until).await?;
            let now = self.rules.clock.elapsed();
            let fast = now.saturating_sub(before) < STEP;
            step = (if fast { step * 2 } else { step / 2 }).clamp(STEPS.start, STEPS.end);
            from = run.done.reached + 1;
            if now.saturating_sub(began) > PATIENCE && from <= to && run.next.is_none() {
                run.next = Some((from, 0));
            }
        }
        run.done.next = run.next.map(|place| crate::kernel::web::cursor::encode(&place));
        Ok(run.done)
    }

    /// Waits for a turn: replays work on all cores, and each holds the entities of its own moment.
    async fn turn(&self) -> Result<SemaphorePermit<'_>, Refusal> {
        let busy = || Refusal::new(&problem::OVERLOADED, "other replays are under way");
        let turn = tokio::time::timeout(PATIENCE * 2, self.replays.acquire()).await;
        turn.map_err(|_| busy())?.map_err(|_| Refusal::unavailable("the daemon is stopping"))
    }

    /// A replay of this bundle, with the entities of a little before this index.
    pub(super) async fn run(&self, id: &str, scope: &str, from: i64) -> Result<Run, Refusal> {
        let mut run = Run::new(id, scope, from);
        let start = (from - BEHIND).max(0);
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let mut conn = self.connection().await?;
            let page = rows::all_at(&mut conn, start, after.as_ref(), PAGE).await;
            drop(conn);
            let page = page.map_err(|e| self.store.refusal(e))?;
            after = page.last().map(|(name, _)| name.clone());
            let last = page.len() < PAGE;
            // Of a hundred thousand this takes a second: others go on meanwhile.
            tokio::task::block_in_place(|| all.extend(page.into_iter().filter_map(|(_, row)| read(row?))));
            if last {
                break;
            }
        }
        run.history = tokio::task::block_in_place(|| History::begin(start, all.into_iter()));
        Ok(run)
    }

    /// Decides again what the entries from one index up to another have of decisions: up to there, or as far as fits into memory.
    pub(super) async fn go_on(&self, run: &mut Run, from: i64, until: i64) -> Result<(), Refusal> {
        let refusal = |e| self.store.refusal(e);
        let mut conn = self.connection().await?;
        let until = rows::reach(&mut conn, from, until, BYTES).await.map_err(refusal)?;
        let changes = rows::changes(&mut conn, run.history.index, until).await.map_err(refusal)?;
        let entries = rows::between(&mut conn, from, until).await.map_err(refusal)?;
        // Bundles may have to be compiled: not while a connection is held that others wait for.
        drop(conn);
        for (index, name, row) in changes {
            run.history.apply(index, name, row.and_then(read).map(|(_, held)| held));
        }
        run.history.index = until;
        let pasts = tokio::task::block_in_place(|| spread(&entries, run.cores, || false, past::of_entry));
        let pasts = run.next_of(pasts.into_iter().flatten());
        for past in &pasts {
            if let Entry::Vacant(slot) = run.forces.entry(past.bundles.clone()) {
                let others = self.others(&past.bundles, &run.scope).await?;
                slot.insert(self.force_of(&others, Some(&run.done.bundle)).await?);
            }
        }
        tokio::task::block_in_place(|| {
            let again = spread(&pasts, run.cores, || false, |past| run.again(past));
            pasts.into_iter().zip(again).for_each(|(past, now)| run.count(past, now));
        });
        run.done.reached = until;
        Ok(())
    }

    /// The bundles of a decision but for the one of this scope.
    async fn others(&self, ids: &[String], scope: &str) -> Result<Vec<String>, Refusal> {
        let mut others = Vec::new();
        for id in ids {
            if self.open(id).await?.0.scope != scope {
                others.push(id.clone());
            }
        }
        Ok(others)
    }
}

/// A replay on its way.
pub(super) struct Run {
    pub done: Replay,
    scope: String,
    limit: usize,
    /// Flips that are listed; all are counted.
    pub listed: usize,
    /// Cores it may use.
    cores: usize,
    after: Option<(i64, usize)>,
    next: Option<(i64, usize)>,
    history: History,
    forces: HashMap<Vec<String>, Arc<Force>>,
}

impl Run {
    fn new(id: &str, scope: &str, from: i64) -> Self {
        let done = Replay {
            bundle: id.to_owned(),
            from,
            to: i64::MAX,
            reached: from,
            read: 0,
            skipped: 0,
            changed: 0,
            flips: Vec::new(),
            groups: Groups::default(),
            next: None,
        };
        let (scope, history) = (scope.to_owned(), History::default());
        let (limit, listed, cores) = (usize::MAX, LISTED, 1);
        Self { done, scope, limit, listed, cores, after: None, next: None, history, forces: HashMap::new() }
    }

    /// What was found since this was last called.
    pub fn take(&mut self) -> Replay {
        let anew = Run::new(&self.done.bundle, &self.scope, self.done.reached).done;
        std::mem::replace(&mut self.done, anew)
    }

    /// Those that are to be decided again.
    fn next_of(&mut self, pasts: impl Iterator<Item = Past>) -> Vec<Past> {
        let place = |past: &Past| (past.index, past.position.unwrap_or(0));
        let mut pasts = pasts.skip_while(|past| self.after.is_some_and(|after| place(past) < after));
        let room = self.limit - usize::try_from(self.done.read).unwrap_or(usize::MAX).min(self.limit);
        let taken = pasts.by_ref().take(room).collect();
        self.next = pasts.next().as_ref().map(place);
        taken
    }

    /// What would have been decided; `None` where the record does not have all of what was asked.
    fn again(&self, past: &Past) -> Option<Answered> {
        // One that was answered while the store was away may have been made long before its entry: what is not known is not guessed.
        if past.at < self.history.index - BEHIND {
            return None;
        }
        let force = self.forces.get(&past.bundles)?;
        rules::evaluate(force, &self.history.at(past.at), past.asked.as_ref()?).ok().map(|e| e.answered)
    }

    fn count(&mut self, past: Past, now: Option<Answered>) {
        self.done.read += 1;
        let Some(now) = now else {
            self.done.skipped += 1;
            return;
        };
        if now.allowed == past.allowed {
            return;
        }
        self.done.changed += 1;
        let flip = Flip {
            decision_id: past.id,
            index: past.index,
            position: past.position.unwrap_or(0),
            before: past.allowed,
            after: now.allowed,
            subject: past.subject,
            action: past.action,
            resource: past.resource,
            policies_before: past.policies,
            policies_after: now.policies,
        };
        self.done.groups.count(&flip);
        if self.done.flips.len() < self.listed {
            self.done.flips.push(flip);
        }
    }
}
