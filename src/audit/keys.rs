//! The log's signing keys: one that signs, and while it is being replaced the one before it too.

use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

use crate::kernel::crypto::{self, Hash, MasterKey, SigningKey};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Clock, Refusal, Timestamp, problem};
use crate::ledger::{Command, Committed, Entry, Failure, Tx};

use super::Audit;
use super::note::{Checkpoint, VerifierKey};
use super::store::{self, LogKey};

/// Seals the log's keys.
const PURPOSE: &str = "audit/log-key";

/// A key that signs now.
struct Signer {
    verifier: VerifierKey,
    key: SigningKey,
    until: Option<Timestamp>,
}

/// The keys that sign now, the newest first.
#[derive(Clone)]
pub(super) struct Keys {
    master: Arc<MasterKey>,
    signers: Arc<ArcSwap<Vec<Arc<Signer>>>>,
}

impl Keys {
    /// Finds the log's keys; makes the first at the first start.
    pub async fn open(
        conn: &mut PgConnection,
        master: Arc<MasterKey>,
        clock: &Clock,
        origin: Option<&str>,
        refusal: impl Fn(sqlx::Error) -> Refusal,
    ) -> Result<Self, Refusal> {
        if store::log_keys(conn).await.map_err(&refusal)?.is_empty() {
            let (key, seed) = SigningKey::generate()?;
            let made: String = crypto::random::<4>()?.iter().map(|b| format!("{b:02x}")).collect();
            let name = origin.map_or_else(|| format!("sop/{made}"), str::to_owned);
            let sealed = master.seal(PURPOSE, seed.expose())?;
            store::make_log_key(conn, &name, &key.public(), &sealed, clock.now()).await.map_err(&refusal)?;
        }
        let keys = Self { master, signers: Arc::default() };
        keys.refresh(conn, clock.now()).await.map_err(refusal)??;
        Ok(keys)
    }

    /// Takes over what another daemon changed. Called before each signature, so that no daemon signs with yesterday's keys.
    pub async fn refresh(&self, conn: &mut PgConnection, now: Timestamp) -> Result<Result<(), Refusal>, sqlx::Error> {
        let rows = store::log_keys(conn).await?;
        let known = self.signers.load_full();
        let live: Vec<&LogKey> = rows.iter().filter(|r| r.until.is_none_or(|t| t > now)).collect();
        let same = known.len() == live.len()
            && known.iter().zip(&live).all(|(k, l)| k.verifier.public == l.public && k.until == l.until);
        if same && !known.is_empty() {
            return Ok(Ok(()));
        }
        let signers = live.into_iter().map(|l| self.signer(l)).collect::<Result<Vec<_>, _>>();
        Ok(signers.and_then(|signers| {
            if signers.is_empty() {
                return Err(Refusal::new(&problem::INTERNAL, "the log has no key"));
            }
            self.signers.store(Arc::new(signers));
            Ok(())
        }))
    }

    fn signer(&self, row: &LogKey) -> Result<Arc<Signer>, Refusal> {
        let wrong = |what: &str| Refusal::new(&problem::INTERNAL, what.to_owned());
        let seed = self.master.open(PURPOSE, &row.sealed);
        let seed = seed.ok_or_else(|| wrong("the log's key does not open under this master key"))?;
        let key = SigningKey::from_seed(&seed)?;
        if key.public() != row.public {
            return Err(wrong("the log's key is not the one it is published as"));
        }
        Ok(Arc::new(Signer { verifier: VerifierKey::log(&row.name, row.public), key, until: row.until }))
    }

    /// The key that signs, and checks.
    pub fn current(&self) -> VerifierKey {
        let none = || VerifierKey::log("", Hash::default());
        self.signers.load().first().map_or_else(none, |s| s.verifier.clone())
    }

    /// Signs a checkpoint with each key that signs now.
    pub fn sign(&self, size: u64, root: Hash) -> String {
        let signers = self.signers.load();
        let keys: Vec<&SigningKey> = signers.iter().map(|s| &s.key).collect();
        Checkpoint { origin: self.current().name, size, root }.sign_with(&keys)
    }
}

/// All keys of the log, those that no longer sign too: what they signed holds.
pub(super) async fn all(conn: &mut PgConnection) -> Result<Vec<VerifierKey>, sqlx::Error> {
    Ok(store::log_keys(conn).await?.into_iter().map(|k| VerifierKey::log(k.name, k.public)).collect())
}

/// A key as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = LogKey)]
pub struct Shown {
    /// The verifier key
    pub key: String,
    /// Since when it signs
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// Until when it signs beside its successor; none: it is the one that signs
    #[schema(value_type = Option<String>)]
    pub until: Option<Timestamp>,
}

impl Shown {
    fn of(row: &LogKey) -> Self {
        let key = VerifierKey::log(&row.name, row.public).to_string();
        Self { key, since: row.time, until: row.until }
    }
}

impl Audit {
    /// Replaces the log's key: from now on a new one signs, and the one before it too for `overlap` milliseconds.
    ///
    /// # Errors
    /// 403 when denied, 503 when the database is away.
    pub async fn rotate_key(&self, caller: &Caller, overlap: i64) -> Result<Committed<Vec<Shown>>, Refusal> {
        let (key, seed) = SigningKey::generate()?;
        let sealed = self.keys.master.seal(PURPOSE, seed.expose())?;
        let rotate = Rotate { public: key.public(), sealed, overlap };
        let done = self.ledger.write(caller, &[Ask::new("audit:key-rotate", "SigningKey", "log")], rotate).await?;
        let mut conn = self.connection().await?;
        self.keys.refresh(&mut conn, self.clock.now()).await.map_err(|e| self.store.refusal(e))??;
        Ok(done)
    }

    /// All keys of the log, the newest first.
    ///
    /// # Errors
    /// 403 when denied.
    pub async fn log_keys(&self, caller: &Caller) -> Result<Vec<Shown>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("audit:receipt", "Entry", "")]).await?;
        let mut conn = self.connection().await?;
        let rows = store::log_keys(&mut conn).await.map_err(|e| self.store.refusal(e))?;
        Ok(rows.iter().map(Shown::of).collect())
    }
}

struct Rotate {
    public: Hash,
    sealed: Vec<u8>,
    overlap: i64,
}

impl Command for Rotate {
    type Out = Vec<Shown>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Vec<Shown>, Entry), Failure> {
        let now = tx.now();
        let old = store::log_keys(tx.read()).await?;
        let Some(current) = old.first() else {
            return Err(Refusal::new(&problem::CONFLICT, "the log has no key to replace").into());
        };
        let until = Timestamp::from_millis(now.millis() + self.overlap);
        store::replace_log_key(tx.write(), &current.name, &self.public, &self.sealed, now, until).await?;
        let keys: Vec<Shown> = store::log_keys(tx.write()).await?.iter().map(Shown::of).collect();
        let new = VerifierKey::log(&current.name, self.public).to_string();
        let entry = Entry::ok("audit:key-rotate", "signing-key/log")
            .change("new", new)
            .change("old", VerifierKey::log(&current.name, current.public).to_string())
            .change("until", until.to_string());
        Ok((keys, entry))
    }
}
