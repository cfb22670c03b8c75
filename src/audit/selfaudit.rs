//! The self-audit: a sample of the record every minute, all of it every day, held against itself and against what was
//! published. What is wrong stops writing, on every daemon, until a person has said in the record that it goes on.

use std::sync::Arc;
use std::time::Duration;

use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::{Refusal, crypto, problem};
use crate::ledger::Entry;
use crate::store::Store;

use super::examine::{self, Examiner, Finding};
use super::receipts::records_of;
use super::store::damage;
use super::{Audit, Records, keys};

/// How often it looks whether another daemon found something, or a whole audit is due.
const LOOK: Duration = Duration::from_secs(5);
/// Between two audits of everything.
const WHOLE: Duration = Duration::from_secs(86_400);
/// Blocks examined at a stretch before the others get their turn.
const STRETCH: usize = 16;
/// Blocks of a sample besides the newest.
const BLOCKS: usize = 4;

/// Starts it.
pub(super) fn start(audit: &Audit, every: Duration, tasks: &Supervisor) {
    let audit = audit.clone();
    tasks.start(Task::restarting("audit/self-audit", move |stop| {
        let audit = audit.clone();
        async move {
            let (mut sampled, mut whole) = (None::<Duration>, audit.clock.elapsed());
            loop {
                audit.heed().await?;
                let now = audit.clock.elapsed();
                if sampled.is_none_or(|then| now.saturating_sub(then) >= every) {
                    audit.sample().await?;
                    sampled = Some(now);
                }
                if now.saturating_sub(whole) >= WHOLE {
                    let done = examine_all(&audit.store, &audit.records).await;
                    let (_, found) = done.map_err(|e| e.detail().to_owned())?;
                    audit.report(&found).await?;
                    audit.recorded(&found).await;
                    whole = audit.clock.elapsed();
                }
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(LOOK.min(every)) => {}
                }
            }
        }
    }));
}

impl Audit {
    /// Stops writing if something was found that nobody has accepted.
    async fn heed(&self) -> Result<(), TaskError> {
        let mut conn = self.store.reader().acquire().await?;
        if let Some(what) = damage::open(&mut conn).await?.first() {
            self.ledger.halt(&problem::RECORD_DAMAGED, what);
        }
        Ok(())
    }

    /// Examines a few blocks: the newest, and some by chance.
    async fn sample(&self) -> Result<(), TaskError> {
        let size = self.ledger.index() + 1;
        if size == 0 {
            return Ok(());
        }
        let mut places = vec![size - 1];
        for _ in 0..BLOCKS {
            let drawn = u64::from_be_bytes(crypto::random::<8>().map_err(|e| e.detail().to_owned())?);
            places.push(i64::try_from(drawn % u64::try_from(size)?)?);
        }
        let mut conn = self.store.reader().acquire().await?;
        let mut found = Vec::new();
        for place in places {
            found.extend(examine::sample(&mut conn, place, size).await?);
        }
        drop(conn);
        self.metrics.audited.inc();
        self.report(&found).await
    }

    /// Keeps what was found, and stops writing for it.
    async fn report(&self, found: &[Finding]) -> Result<(), TaskError> {
        if found.is_empty() {
            return Ok(());
        }
        let mut conn = self.store.reader().acquire().await?;
        let known = damage::accepted(&mut conn).await?;
        let new: Vec<_> =
            found.iter().filter(|f| !known.contains(&f.what)).map(|f| (f.index, f.what.clone())).collect();
        for (_, what) in &new {
            tracing::error!(finding = %what, "the self-audit found the record changed: {what}");
            self.metrics.mismatches.inc();
        }
        damage::keep(&mut conn, &new, self.clock.now()).await?;
        if let Some((_, what)) = new.first() {
            self.ledger.halt(&problem::RECORD_DAMAGED, what);
        }
        Ok(())
    }

    /// That all was looked at is an entry, if the ledger writes.
    async fn recorded(&self, found: &[Finding]) {
        let entry = Entry::ok("audit:self-audit", "log")
            .change("entries", self.ledger.index() + 1)
            .change("found", found.len());
        let caller = crate::kernel::web::Caller::daemon("self-audit");
        if let Err(e) = self.ledger.record(&caller, crate::ledger::Permit::granted(), entry).await {
            tracing::warn!(error = %e, "the self-audit could not be recorded");
        }
    }
}

/// Examines everything, from rows to root.
async fn examine_all(db: &Store, rooms: &[Arc<dyn Records>]) -> Result<(i64, Vec<Finding>), Refusal> {
    let refusal = |e| db.refusal(e);
    let mut conn = db.reader().acquire().await.map_err(refusal)?;
    let keys = keys::all(&mut conn).await.map_err(refusal)?;
    let mut examiner = Examiner::new(&mut conn, keys).await.map_err(refusal)?;
    let mut blocks = 0;
    while let Some(rows) = examiner.next(&mut conn).await.map_err(refusal)? {
        for row in rows.iter().filter(|r| r.segment.is_some()) {
            let records = records_of(db, rooms, row).await?;
            if !records.is_empty() {
                examiner.records(row.index, row.segment.as_deref().unwrap_or_default(), &records);
            }
        }
        blocks += 1;
        if blocks % STRETCH == 0 {
            tokio::task::yield_now().await;
        }
    }
    let size = examiner.size();
    Ok((size, examiner.finish(&mut conn).await.map_err(refusal)?))
}

/// Examines the whole record while no daemon writes: how many entries, and what was changed.
///
/// # Errors
/// 503 when the database is away.
pub async fn diagnose(db: &Store, rooms: Vec<Arc<dyn Records>>) -> Result<(i64, Vec<Finding>), Refusal> {
    examine_all(db, &rooms).await
}
