//! Claims: work that one daemon at a time does.
//!
//! A claim is a row with a holder and a beat that grows with each renewal. It is taken over by an entry, and only by a daemon
//! that watched the beat stand still for the whole time to live on its own clock: no two clocks are ever compared (rule 18).
//! Renewals change nothing that anyone could ask about, so they are plain updates without an entry.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::store::ClaimRow;
use super::{Command, Entry, Failure, Ledger, Tx, store};

/// One daemon's hold on a named piece of work, or its wait for it.
pub struct Claim {
    ledger: Ledger,
    name: &'static str,
    ttl: Duration,
    /// The index of our acquisition, while we hold it.
    mine: Option<i64>,
    /// When it was last renewed.
    renewed: Option<Duration>,
    /// What we last saw of another's, and since when it has stood still.
    seen: Option<(ClaimRow, Duration)>,
}

impl Ledger {
    /// A claim on `name` that ends when it is not renewed for `ttl`. Nothing is taken yet.
    #[must_use]
    pub fn claim(&self, name: &'static str, ttl: Duration) -> Claim {
        Claim { ledger: self.clone(), name, ttl, mine: None, renewed: None, seen: None }
    }
}

impl Claim {
    /// Renews or takes the claim; true if this daemon holds it now, and until `ttl` from now. Call it at least every third of
    /// the time to live, and do no claimed work longer than that without asking again.
    ///
    /// # Errors
    /// 503 when the database is away: then the claim must be taken for lost.
    pub async fn held(&mut self) -> Result<bool, Refusal> {
        let shared = self.ledger.0.shared.clone();
        let refusal = |e| shared.store.refusal(e);
        let now = shared.clock.elapsed();
        // A renewal is good for a while: whoever asks often need not write often.
        if self.mine.is_some() && self.renewed.is_some_and(|then| now.saturating_sub(then) < self.ttl / 4) {
            return Ok(true);
        }
        let holder = shared.store.daemon().to_owned();
        let mut conn = shared.store.reader().acquire().await.map_err(refusal)?;
        if let Some(token) = self.mine {
            if store::beat(&mut conn, self.name, &holder, token, shared.clock.now()).await.map_err(refusal)? {
                self.renewed = Some(now);
                return Ok(true);
            }
            self.mine = None;
        }
        let row = store::claim(&mut conn, self.name).await.map_err(refusal)?;
        drop(conn);
        let expected = match (row, &self.seen) {
            (None, _) => None,
            (Some(row), Some((seen, since))) if row == *seen => {
                let ttl = Duration::from_millis(u64::try_from(row.ttl_ms).unwrap_or(0)).max(self.ttl);
                if now.saturating_sub(*since) < ttl {
                    return Ok(false);
                }
                Some(row)
            }
            (Some(row), _) => {
                self.seen = Some((row, now));
                return Ok(false);
            }
        };
        let take = Take { name: self.name, holder, ttl: self.ttl, expected };
        match self.ledger.write(&Caller::daemon("claim"), &[], take).await {
            Ok(done) => {
                self.mine = Some(done.value.token);
                self.renewed = Some(now);
                self.seen = None;
                Ok(true)
            }
            Err(r) if r.problem() == &problem::CONFLICT => Ok(false),
            Err(r) => Err(r),
        }
    }

    /// Gives the claim back, so that another daemon need not wait it out.
    pub async fn release(&mut self) {
        let Some(token) = self.mine.take() else { return };
        let holder = self.ledger.0.shared.store.daemon().to_owned();
        let give = Release { name: self.name, holder, token };
        if let Err(e) = self.ledger.write(&Caller::daemon("claim"), &[], give).await {
            tracing::debug!(error = %e, claim = self.name, "a claim was not given back; it will run out");
        }
    }
}

/// What taking a claim answers.
#[derive(Serialize, Deserialize)]
struct Taken {
    token: i64,
}

struct Take {
    name: &'static str,
    holder: String,
    ttl: Duration,
    expected: Option<ClaimRow>,
}

impl Command for Take {
    type Out = Taken;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Taken, Entry), Failure> {
        let row = store::claim(tx.read(), self.name).await?;
        if row != self.expected {
            return Err(Refusal::new(&problem::CONFLICT, "the claim is not as it was: its holder lives").into());
        }
        let (token, now) = (tx.index(), tx.now());
        store::take_claim(tx.write(), self.name, &self.holder, token, self.ttl, now).await?;
        let mut entry = Entry::ok("ledger:claim", format!("claim/{}", self.name)).change("holder", self.holder.clone());
        if let Some(old) = &self.expected {
            entry =
                entry.change("previous", old.holder.clone()).reason("its holder was silent for its whole time to live");
        }
        Ok((Taken { token }, entry))
    }
}

struct Release {
    name: &'static str,
    holder: String,
    token: i64,
}

impl Command for Release {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let row = store::claim(tx.read(), self.name).await?;
        if !row.is_some_and(|r| r.token == self.token && r.holder == self.holder) {
            return Err(Refusal::new(&problem::CONFLICT, "the claim is another's").into());
        }
        store::drop_claim(tx.write(), self.name).await?;
        Ok(((), Entry::ok("ledger:release", format!("claim/{}", self.name)).change("holder", self.holder.clone())))
    }
}
