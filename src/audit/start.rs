//! Before anything is written: does the record agree with itself, and with what was published of it? And how to go on if not.

use std::path::{Path, PathBuf};

use sqlx::{Connection as _, PgConnection, Postgres, Transaction};

use crate::kernel::Refusal;
use crate::kernel::crypto::{self, Hash};
use crate::kernel::problem::{self, Problem};
use crate::kernel::web::Caller;
use crate::ledger::{Committed, Entry, Ledger, Permit, merkle};
use crate::store::{MOMENT, Store};

use super::keys;
use super::note::Checkpoint;
use super::store::{self, damage};
use super::tree;

/// A checkpoint that was published, and that the database does not extend.
#[derive(Clone, Debug)]
pub struct Lost {
    /// Entries it had.
    pub size: u64,
    /// Its root.
    pub root: Hash,
    /// Entries the database has.
    pub head: u64,
    /// What is wrong, for operators.
    pub why: String,
}

/// Why nothing may be written, though the daemon may start and be read.
#[derive(Clone, Debug)]
pub struct Halt {
    /// Its type.
    pub problem: &'static Problem,
    /// What is wrong.
    pub why: String,
}

/// Before anything is written: the tree must agree with the head, and with what was published, in the database and beside it;
/// and nothing may be open that the self-audit found. If not, the daemon starts and writes nothing.
///
/// # Errors
/// When there is nothing to start on: the log is gone, or cannot be read.
pub async fn check_at_start(store: &Store, data: &Path) -> Result<Option<Halt>, String> {
    let mut conn = connection(store).await?;
    let mut conn = still(&mut conn).await?;
    let Some(head) = store::head(&mut conn).await.map_err(failed)? else {
        // A log that was signed here and is gone is the largest loss of all, not a first start.
        return kept_note(data)?.map_or(Ok(None), |_| Err(emptied()));
    };
    let damaged = |why| Some(Halt { problem: &problem::RECORD_DAMAGED, why });
    // What was published is looked at first: it says more than that something does not fit.
    if let Some(lost) = against_kept(&mut conn, data, head).await? {
        let behind = lost.size > lost.head;
        let problem = if behind { &problem::RECORD_BEHIND } else { &problem::RECORD_DAMAGED };
        return Ok(Some(Halt { problem, why: lost.why }));
    }
    if let Err(why) = consistent(&mut conn, head).await {
        return Ok(damaged(why));
    }
    Ok(damage::open(&mut conn).await.map_err(failed)?.into_iter().next().and_then(damaged))
}

/// The same for work that writes and serves nobody.
///
/// # Errors
/// With what is wrong.
pub async fn must_write(store: &Store, data: &Path) -> Result<(), String> {
    check_at_start(store, data).await?.map_or(Ok(()), |halt| Err(halt.why))
}

/// What the self-audit found, that nobody has accepted.
///
/// # Errors
/// When the record cannot be read.
pub async fn damaged(store: &Store) -> Result<Vec<String>, String> {
    damage::open(&mut connection(store).await?).await.map_err(failed)
}

/// Goes on although something stored was changed: what it is is said in an entry, and is not reported again.
///
/// # Errors
/// When the entry cannot be written.
pub async fn accept(ledger: &Ledger, store: &Store, found: &[String], reason: &str) -> Result<Committed<()>, Refusal> {
    let entry = Entry::ok("audit:resume", "log")
        .reason(reason)
        .change("accepted", found.to_vec())
        .signal("critical", "audit/record-damaged");
    let done = ledger.record(&Caller::daemon("operator"), Permit::granted(), entry).await?;
    let mut conn = store.dedicated("resume").await.map_err(|e| store.refusal(e))?;
    damage::accept(&mut conn, done.index).await.map_err(|e| store.refusal(e))?;
    Ok(done)
}

/// What the checkpoint in the data folder has that the database has not, where the database agrees with itself.
///
/// # Errors
/// When there is no record at all, or it contradicts itself.
pub async fn lost(store: &Store, data: &Path) -> Result<Option<Lost>, String> {
    let mut conn = connection(store).await?;
    let mut conn = still(&mut conn).await?;
    let head = store::head(&mut conn).await.map_err(failed)?.ok_or_else(emptied)?;
    consistent(&mut conn, head).await?;
    against_kept(&mut conn, data, head).await
}

/// Goes on although entries that were published are lost: what is lost is said in an entry, and the checkpoint that had them is
/// set aside. Whoever holds that checkpoint will find that the log does not extend it, and this entry says why.
///
/// # Errors
/// When the entry cannot be written.
pub async fn resume(
    ledger: &Ledger,
    data: &Path,
    lost: &Lost,
    reason: &str,
) -> Result<(Committed<()>, PathBuf), Refusal> {
    let entry = Entry::ok("audit:resume", "log")
        .reason(reason)
        .change("published_size", lost.size)
        .change("published_root", crypto::base64(lost.root))
        .change("database_size", lost.head)
        .signal("critical", "audit/record-behind");
    let done = ledger.record(&Caller::daemon("operator"), Permit::granted(), entry).await?;
    // Only now: a crash in between leaves a folder that refuses again, never one that has forgotten.
    let (from, aside) = (data.join("checkpoint"), data.join(format!("checkpoint.lost-{}", lost.size)));
    std::fs::rename(&from, &aside).map_err(Refusal::internal)?;
    Ok((done, aside))
}

async fn connection(store: &Store) -> Result<PgConnection, String> {
    store.dedicated("check").await.map_err(failed)
}

/// All that is compared is of one moment: other daemons write and publish meanwhile.
async fn still(conn: &mut PgConnection) -> Result<Transaction<'_, Postgres>, String> {
    conn.begin_with(MOMENT).await.map_err(failed)
}

fn failed(e: sqlx::Error) -> String {
    format!("the record cannot be checked: {e}")
}

fn emptied() -> String {
    "record-behind: the data folder keeps a signed checkpoint, the database has no log: it was emptied, or is another one. Bring the log back; if this is another database, use another data folder".to_owned()
}

/// The checkpoint that this daemon signed last, if it ever signed one.
fn kept_note(data: &Path) -> Result<Option<String>, String> {
    let file = data.join("checkpoint");
    match std::fs::read_to_string(&file) {
        Ok(note) => Ok(Some(note)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(format!("{} cannot be read, so the record cannot be checked: {e}", file.display())),
    }
}

/// Compares with the checkpoint in the data folder.
pub(super) async fn against_kept(
    conn: &mut PgConnection,
    data: &Path,
    head: (i64, Hash),
) -> Result<Option<Lost>, String> {
    let Some(note) = kept_note(data)? else { return Ok(None) };
    let keys = keys::all(conn).await.map_err(failed)?;
    if keys.is_empty() {
        return Err(emptied());
    }
    let kept = Checkpoint::open_any(&note, &keys).map_err(|e| {
        format!("the checkpoint in the data folder cannot be used: {e}; if this is another database, use another data folder")
    })?;
    let what = "the checkpoint kept in the data folder";
    let why = disagreement(conn, kept.size, &kept.root, size(head.0), what).await?;
    Ok(why.map(|why| Lost { size: kept.size, root: kept.root, head: size(head.0), why }))
}

fn size(index: i64) -> u64 {
    u64::try_from(index + 1).unwrap_or(0)
}

/// Whether entries, tiles, the published checkpoint and the head agree with each other.
async fn consistent(conn: &mut PgConnection, (index, root): (i64, Hash)) -> Result<(), String> {
    let published = store::checkpoint(conn).await.map_err(failed)?;
    if let Some(p) = &published
        && let Some(why) = disagreement(conn, p.size, &p.root, size(index), "the last published checkpoint").await?
    {
        return Err(why);
    }
    // The leaves since the last checkpoint are few; with the tiles before them they must give the head's root.
    let covered = published.map_or(0, |p| p.size);
    let mut nodes = Vec::new();
    for subtree in merkle::subtrees(0, covered) {
        nodes.push(tree::node(conn, subtree).await.map_err(failed)?);
    }
    let mut frontier = merkle::Frontier::from_nodes(nodes, covered).ok_or("the tiles do not give a frontier")?;
    while frontier.size() < size(index) {
        let from = frontier.size();
        let hashes = store::hashes(conn, from, size(index).min(from + 8192)).await.map_err(failed)?;
        if hashes.is_empty() {
            return Err(format!(
                "entry {from} is missing although the head is at {index}: the database was changed from outside"
            ));
        }
        hashes.into_iter().for_each(|h| frontier.push(h));
    }
    if frontier.root() != root {
        return Err(format!(
            "the entries 0 to {index} do not give the head's root: the database was changed from outside; `sop audit diagnose` names what was"
        ));
    }
    Ok(())
}

/// Why the log does not extend a checkpoint, if it does not.
async fn disagreement(
    conn: &mut PgConnection,
    size: u64,
    root: &Hash,
    head: u64,
    what: &str,
) -> Result<Option<String>, String> {
    if size > head {
        return Ok(Some(format!(
            "record-behind: {what} has {size} entries, the database has {head}: it lost entries (a failover, a restored backup). Writing would fork the log: bring the missing entries back, or, if they are lost for good, go on with `sop audit resume`"
        )));
    }
    let computed = match tree::root(conn, size).await {
        Ok(computed) => computed,
        // Rows that should be there are not.
        Err(sqlx::Error::Decode(e)) => {
            return Ok(Some(format!(
                "{e}: the database was changed from outside; `sop audit diagnose` names what was"
            )));
        }
        Err(e) => return Err(failed(e)),
    };
    Ok((computed != *root).then(|| {
        format!(
            "the first {size} entries do not give the root of {what}: the database was changed from outside, or another daemon went on after a loss; `sop audit diagnose` names what was"
        )
    }))
}
