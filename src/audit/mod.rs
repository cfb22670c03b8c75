//! The record that proves itself: entries, receipts, tiles, checkpoints.
//!
//! **Invariants.** A checkpoint is signed only over a root that the head had; it never shrinks. What was published can be
//! derived again from the leaves, byte for byte. Reading the record is recorded before it is answered.
//!
//! **Not here.** How an entry commits (`ledger`), who may read (`governance`).
//!
//! **Why this way.** Tiles are derived after the commit and not in it: the head's root already binds every leaf, so publishing
//! can be late, repeated or done by another daemon without weakening anything.

mod events;
mod examine;
pub mod http;
mod keys;
pub mod model;
pub mod note;
pub mod proof;
mod publisher;
mod receipts;
mod saved;
mod search;
mod selfaudit;
mod start;
mod store;
pub mod tiles;
mod tree;
mod verbs;
pub mod verify;
mod witness;

use std::time::Duration;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use std::sync::Arc;
use tokio::sync::{Notify, watch};

use crate::config;
use crate::kernel::crypto::{MasterKey, SigningKey};
use crate::kernel::supervisor::Supervisor;
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Clock, Refusal, problem};
use crate::ledger::{Entry, Ledger};
use crate::store::Store;

pub use events::Records;
pub use examine::Finding;
use model::Stored;
use note::VerifierKey;
pub use receipts::Consistency;
pub use search::{Counted, Page, Tail, Told};
pub use selfaudit::diagnose;
pub use start::{Halt, Lost, accept, check_at_start, damaged, lost, must_write, resume};
use tiles::{Tile, WIDTH};
use witness::{Sender, Watched, Witness};

/// Tables that are partitioned by index as the entries are.
pub const PARTITIONED: &str = "audit.segments";

/// How long a checkpoint that witnesses signed is preferred to a newer one that they did not, milliseconds.
const COSIGNED_FOR: i64 = 10_000;
/// Seals the witness's key.
const WITNESS: &str = "audit/witness-key";

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct Audit(Arc<Room>);

impl std::ops::Deref for Audit {
    type Target = Room;

    fn deref(&self) -> &Room {
        &self.0
    }
}

/// What the room holds.
pub struct Room {
    ledger: Ledger,
    store: Store,
    keys: keys::Keys,
    public_entries: bool,
    indexed: watch::Receiver<i64>,
    hurry: Arc<Notify>,
    metrics: Metrics,
    records: Arc<[Arc<dyn Records>]>,
    clock: Clock,
    witness: Arc<Witness>,
    watched: bool,
}

/// What the room counts.
#[derive(Clone)]
struct Metrics {
    published: IntGauge,
    mismatches: IntCounter,
    indexed: IntGauge,
    events: IntCounter,
    audited: IntCounter,
    alerts: IntCounter,
}

impl Metrics {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let m = Self {
            published: IntGauge::new("sop_audit_checkpoint_size", "Size of the newest checkpoint this daemon signed")?,
            mismatches: IntCounter::new(
                "sop_audit_root_mismatches_total",
                "Times the entries did not give the head's root",
            )?,
            indexed: IntGauge::new("sop_audit_indexed_to", "Newest index that can be searched")?,
            audited: IntCounter::new(
                "sop_audit_self_audits_total",
                "Samples of the record that the self-audit examined",
            )?,
            alerts: IntCounter::new("sop_audit_alerts_total", "Alerts of saved searches that were raised")?,
            events: IntCounter::new("sop_audit_events_total", "Events of the protocols that were recorded")?,
        };
        registry.register(Box::new(m.published.clone()))?;
        registry.register(Box::new(m.mismatches.clone()))?;
        registry.register(Box::new(m.indexed.clone()))?;
        registry.register(Box::new(m.events.clone()))?;
        registry.register(Box::new(m.audited.clone()))?;
        registry.register(Box::new(m.alerts.clone()))?;
        Ok(m)
    }
}

/// What the room is made from.
pub struct Parts<'a> {
    /// The ledger.
    pub ledger: Ledger,
    /// The database.
    pub store: Store,
    /// The clock.
    pub clock: Clock,
    /// Seals the log's keys.
    pub master: Arc<MasterKey>,
    /// The configuration.
    pub config: &'a config::Config,
    /// Where its metrics go.
    pub registry: &'a Registry,
    /// Where the records of other rooms' segments are.
    pub records: Vec<Arc<dyn Records>>,
}

impl Audit {
    /// Opens the room: finds or makes the log's key, and starts the publisher and the search.
    ///
    /// # Errors
    /// When the database is away, or the key does not open.
    pub async fn start(parts: Parts<'_>, tasks: &Supervisor) -> Result<Self, Refusal> {
        let Parts { ledger, store, clock, master, config, registry, records } = parts;
        let metrics = Metrics::new(registry).map_err(Refusal::internal)?;
        let mut conn = store.reader().acquire().await.map_err(|e| store.refusal(e))?;
        let refusal = |e| store.refusal(e);
        let keys = keys::Keys::open(&mut conn, master.clone(), &clock, config.audit.origin.as_deref(), refusal).await?;
        drop(conn);
        let file = config.data.dir.join("checkpoint");
        let publisher = publisher::Publisher {
            store: store.clone(),
            clock: clock.clone(),
            keys: keys.clone(),
            file,
            ledger: ledger.clone(),
            metrics: metrics.clone(),
            place: None,
        };
        publisher::start(publisher, &ledger, config.audit.publish_interval.get(), tasks);
        let witness =
            witness_of(&store, &ledger, &clock, &master, &keys.current().name, &config.audit.witness_logs).await?;
        let watched = watch(&store, &ledger, &clock, &config.audit.witnesses, registry, tasks).await?;
        let hurry = Arc::new(Notify::new());
        let indexed = search::start(&store, &ledger, metrics.clone(), hurry.clone(), tasks);
        let audit = Self(Arc::new(Room {
            ledger,
            store,
            keys,
            public_entries: config.audit.public_entries,
            indexed,
            hurry,
            metrics,
            records: records.into(),
            clock,
            witness: Arc::new(witness),
            watched,
        }));
        selfaudit::start(&audit, config.audit.self_audit_interval.get(), tasks);
        saved::start(&audit, tasks);
        Ok(audit)
    }

    /// The key that checks this log.
    #[must_use]
    pub fn key(&self) -> VerifierKey {
        self.keys.current()
    }

    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, Refusal> {
        self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))
    }

    /// The newest signed checkpoint; with witnesses, the newest that they signed, if that is not long ago.
    ///
    /// # Errors
    /// 503 before the first.
    pub async fn checkpoint(&self) -> Result<String, Refusal> {
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let published = store::checkpoint(&mut conn).await.map_err(refusal)?;
        let published = published.ok_or_else(|| Refusal::unavailable("no checkpoint was signed yet"))?;
        if self.watched
            && let Some((size, note, time)) = store::witness::cosigned(&mut conn).await.map_err(refusal)?
            && (size == published.size || self.clock.now().millis() - time.millis() < COSIGNED_FOR)
        {
            return Ok(note);
        }
        Ok(published.note)
    }

    /// A tile's bytes.
    ///
    /// # Errors
    /// 404 when the published tree does not reach so far.
    pub async fn tile(&self, tile: Tile) -> Result<Vec<u8>, Refusal> {
        let mut conn = self.connection().await?;
        let missing = || Refusal::not_found("such tile");
        let published = store::checkpoint(&mut conn).await.map_err(|e| self.store.refusal(e))?.ok_or_else(missing)?;
        let have = published.size.checked_shr(8 * u32::from(tile.level)).unwrap_or(0);
        if tile.n.saturating_mul(WIDTH).saturating_add(tile.width) > have {
            return Err(missing());
        }
        let hashes = tree::tile(&mut conn, tile).await.map_err(|e| self.store.refusal(e))?;
        Ok(hashes.ok_or_else(missing)?.concat())
    }

    /// The leaves of a level 0 tile as an entry bundle: each with its length before it, 16 bits.
    ///
    /// # Errors
    /// 404 when the published tree does not reach so far, 401 and 403 for whoever may not read entries.
    pub async fn bundle(&self, caller: Option<&Caller>, tile: Tile) -> Result<Vec<u8>, Refusal> {
        match caller {
            Some(caller) => drop(self.ledger.permit(caller, &[Ask::new("audit:read", "Entry", "")]).await?),
            None if self.public_entries => {}
            // Not left to whoever looked at the path before: it may be written in more than one way.
            None => return Err(Refusal::new(&problem::UNAUTHENTICATED, "entry bundles are not public here")),
        }
        let mut conn = self.connection().await?;
        let missing = || Refusal::not_found("such entry bundle");
        let published = store::checkpoint(&mut conn).await.map_err(|e| self.store.refusal(e))?.ok_or_else(missing)?;
        let from = tile.n.saturating_mul(WIDTH);
        let to = from.saturating_add(tile.width);
        if to > published.size {
            return Err(missing());
        }
        let leaves = store::leaves(&mut conn, from, to).await.map_err(|e| self.store.refusal(e))?;
        let mut out = Vec::with_capacity(leaves.iter().map(|l| l.len() + 2).sum());
        for leaf in leaves {
            out.extend_from_slice(&u16::try_from(leaf.len()).unwrap_or(u16::MAX).to_be_bytes());
            out.extend_from_slice(&leaf);
        }
        Ok(out)
    }

    /// The newest checkpoint once it covers `index`.
    async fn covered(&self, index: u64) -> Result<(u64, String), Refusal> {
        loop {
            let mut conn = self.connection().await?;
            if let Some(p) = store::checkpoint(&mut conn).await.map_err(|e| self.store.refusal(e))?
                && p.size > index
            {
                // One that others signed too is worth more than a newer one.
                if self.watched
                    && let Some((size, note, _)) =
                        store::witness::cosigned(&mut conn).await.map_err(|e| self.store.refusal(e))?
                    && size > index
                {
                    return Ok((size, note));
                }
                return Ok((p.size, p.note));
            }
            drop(conn);
            // Another daemon may be the one that publishes, so there is nothing here to be woken by.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// One entry; recorded.
    ///
    /// # Errors
    /// 404 beyond the head.
    pub async fn entry(&self, caller: &Caller, index: i64) -> Result<Stored, Refusal> {
        let permit = self.ledger.permit(caller, &[Ask::new("audit:read", "Entry", index.to_string())]).await?;
        let mut conn = self.connection().await?;
        let found = store::entries(&mut conn, &[index]).await.map_err(|e| self.store.refusal(e))?.pop();
        drop(conn);
        let found = found.ok_or_else(|| Refusal::not_found(format!("entry {index}")))?;
        self.ledger.record(caller, permit, Entry::ok("audit:read", format!("entry/{index}"))).await?;
        Ok(found)
    }

    /// Whether entry bundles are for everybody.
    #[must_use]
    pub fn public_entries(&self) -> bool {
        self.public_entries
    }

    /// The witness that this daemon is for other logs.
    fn witness(&self) -> &Witness {
        &self.witness
    }

    /// How far the search has come.
    #[must_use]
    pub fn indexed_to(&self) -> i64 {
        self.ledger.index().min(*self.indexed.borrow() + search::TAIL)
    }
}

/// The witness: its key is made at first start, and kept sealed.
async fn witness_of(
    store: &Store,
    ledger: &Ledger,
    clock: &Clock,
    master: &MasterKey,
    origin: &str,
    logs: &str,
) -> Result<Witness, Refusal> {
    let (_, seed) = SigningKey::generate()?;
    let sealed = ledger.settle(WITNESS, &master.seal(WITNESS, seed.expose())?).await?;
    let opened = master.open(WITNESS, &sealed);
    let seed = opened
        .ok_or_else(|| Refusal::new(&problem::INTERNAL, "the witness's key does not open under this master key"))?;
    let mut watched: std::collections::BTreeMap<String, Vec<VerifierKey>> = std::collections::BTreeMap::new();
    for text in logs.split(',').map(str::trim).filter(|t| !t.is_empty()) {
        let key = VerifierKey::parse(text).filter(|k| !k.witness);
        let key = key
            .ok_or_else(|| Refusal::new(&problem::MALFORMED, format!("audit.witness_logs: {text} is no log's key")))?;
        watched.entry(key.name.clone()).or_default().push(key);
    }
    Ok(Witness {
        store: store.clone(),
        ledger: ledger.clone(),
        clock: clock.clone(),
        key: SigningKey::from_seed(&seed)?,
        name: format!("{origin}/witness"),
        logs: watched,
    })
}

/// Has checkpoints signed by the witnesses that are configured; whether there are any. Writing stops at once if one has seen
/// more of this log than there is.
async fn watch(
    store: &Store,
    ledger: &Ledger,
    clock: &Clock,
    witnesses: &str,
    registry: &Registry,
    tasks: &Supervisor,
) -> Result<bool, Refusal> {
    let mut all = Vec::new();
    for text in witnesses.split(',').map(str::trim).filter(|t| !t.is_empty()) {
        let parsed = text.split_once(char::is_whitespace).and_then(|(url, key)| {
            let key = VerifierKey::parse(key).filter(|k| k.witness)?;
            reqwest::Url::parse(url).ok().map(|_| Watched { url: url.to_owned(), key })
        });
        let wrong =
            || Refusal::new(&problem::MALFORMED, format!("audit.witnesses: {text} is not `URL VKEY` of a witness"));
        all.push(parsed.ok_or_else(wrong)?);
    }
    let counted = Opts::new("sop_audit_witness_answers_total", "What witnesses answered to checkpoints of this log");
    let sent = IntCounterVec::new(counted, &["witness", "outcome"]).map_err(Refusal::internal)?;
    let last =
        Opts::new("sop_audit_witness_signed_seconds", "When a witness last signed a checkpoint of this log, Unix time");
    let age = IntGaugeVec::new(last, &["witness"]).map_err(Refusal::internal)?;
    registry.register(Box::new(sent.clone())).map_err(Refusal::internal)?;
    registry.register(Box::new(age.clone())).map_err(Refusal::internal)?;
    if all.is_empty() {
        return Ok(false);
    }
    for w in &all {
        age.with_label_values(&[&w.key.name]).set(0);
        for outcome in ["signed", "failed", "ahead", "fork"] {
            sent.with_label_values(&[w.key.name.as_str(), outcome]).inc_by(0);
        }
    }
    let sender = Sender::new(store.clone(), ledger.clone(), clock.clone(), all, sent, age)?;
    if let Some(why) = sender.at_start().await {
        ledger.halt(witness::FORKED, &why);
    }
    witness::start(sender, tasks);
    Ok(true)
}
