//! Lock-out: who fails too often to prove to be a client is not listened to for a while, right secret or not.
//!
//! Failures are counted for a client and a block of addresses, so that nobody can lock a client out from elsewhere, and by each
//! daemon for itself; the lock-out is an entry and holds on all of them. It is answered like a wrong secret. A client that is not
//! known cannot be locked out: there is nothing to guess, and a stranger must not fill the record.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kernel::web::{Ask, Caller, RequestInfo, block};
use crate::kernel::{Refusal, Timestamp, problem};
use crate::ledger::{AUTHZ, Command, Committed, Entry, Failure, Touch, Tx};

use super::{Token, store};

/// When somebody is locked out, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Failures that are too many; 0: never.
    pub failures: u32,
    /// Within this time.
    pub window: Duration,
    /// For this long.
    pub period: Duration,
}

/// Failures in this window.
pub(super) type Failures = moka::sync::Cache<(String, String), Arc<AtomicU32>>;

/// None yet; a failure is forgotten a window after the first of its kind.
pub(super) fn none_yet(limits: Limits) -> Failures {
    moka::sync::Cache::builder().max_capacity(100_000).time_to_live(limits.window).build()
}

/// A client that is locked out.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq, utoipa::ToSchema)]
#[schema(as = LockOut)]
pub(super) struct Locked {
    /// The client
    pub client_id: String,
    /// From where: a /24 of IPv4, a /48 of IPv6, or `unix`
    pub block: String,
    /// Until when
    #[schema(value_type = String)]
    pub until: Timestamp,
}

impl Token {
    /// Whether this client is locked out at the address of this request.
    pub(super) fn locked(&self, client_id: &str, info: &RequestInfo) -> bool {
        self.snapshot.locked(client_id, &block(info.peer), self.clock.now())
    }

    /// Counts a failure to prove to be this client; the last that is borne locks it out.
    pub(super) async fn failed(&self, client_id: &str, info: &Arc<RequestInfo>) {
        if self.lockout.failures == 0 || !self.snapshot.has_client(client_id) {
            return;
        }
        let key = (client_id.to_owned(), block(info.peer));
        let count = self.failures.get_with(key.clone(), Arc::default);
        if count.fetch_add(1, Ordering::Relaxed) + 1 < self.lockout.failures {
            return;
        }
        self.failures.invalidate(&key);
        let (client_id, block) = key;
        let command = LockOut { client_id, block, failures: self.lockout.failures, period: self.lockout.period };
        let caller = Caller::daemon("token").with_request(info.clone());
        match self.ledger.write(&caller, &[], command).await {
            Ok(_) => self.counted.lockouts.inc(),
            Err(e) => tracing::warn!(error = %e, "a lock-out could not be recorded"),
        }
    }

    /// Who is locked out now.
    pub(super) async fn lockouts(&self, caller: &Caller) -> Result<Vec<Locked>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("token:client-read", "Client", "")]).await?;
        Ok(self.snapshot.lockouts(self.clock.now()))
    }

    /// Ends the lock-outs of a client before their time.
    pub(super) async fn release(&self, caller: &Caller, client_id: String) -> Result<Committed<()>, Refusal> {
        let ask = Ask::new("token:lockout-release", "Client", client_id.clone());
        self.ledger.write(caller, &[ask], Release { client_id }).await
    }
}

fn touched(entry: Entry) -> Entry {
    entry.touch(Touch::key(AUTHZ, "lockout"))
}

struct LockOut {
    client_id: String,
    block: String,
    failures: u32,
    period: Duration,
}

impl Command for LockOut {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let until = tx.now().plus(self.period);
        let locked = Locked { client_id: self.client_id.clone(), block: self.block.clone(), until };
        store::lock_out(tx.write(), &locked).await?;
        let entry = Entry::ok("token:lock-out", format!("client/{}", self.client_id))
            .reason(format!("{} failures to prove to be this client", self.failures))
            .change("block", self.block.clone())
            .change("until", until.to_string())
            .signal("warning", format!("token/lock-out/{}", self.client_id));
        Ok(((), touched(entry)))
    }
}

struct Release {
    client_id: String,
}

impl Command for Release {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let now = tx.now();
        let all = store::lockouts(tx.read()).await?;
        if !all.iter().any(|l| l.client_id == self.client_id && l.until > now) {
            return Err(Refusal::new(&problem::NOT_FOUND, "this client is not locked out").into());
        }
        store::release(tx.write(), &self.client_id).await?;
        Ok(((), touched(Entry::ok("token:lockout-release", format!("client/{}", self.client_id)))))
    }
}
