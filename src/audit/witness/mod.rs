//! Witnesses (C2SP tlog-witness, tlog-cosignature): this daemon is one for other logs, and has its own checkpoints signed by
//! others, so that two installations watch each other.
//!
//! **Invariants.** A checkpoint is signed only if it extends the one that was signed before it of the same log; what was signed
//! is durable before the signature leaves.
//!
//! **Not here.** What a checkpoint is (`note`), how one log extends another (`ledger::merkle`).
//!
//! **Why this way.** What was seen of another log is no change of this one: as an entry it would make this log grow, the other
//! would sign that and grow, and two that watch each other would never rest. That a log was seen first, and a fork, are entries.

mod send;

use std::collections::BTreeMap;

use crate::kernel::crypto::{self, Hash, SigningKey};
use crate::kernel::problem::{self, Problem};
use crate::kernel::web::Caller;
use crate::kernel::{Clock, Refusal};
use crate::ledger::{Entry, Ledger, Outcome, Permit, merkle};
use crate::store::Store;

use super::note::{self, Checkpoint, VerifierKey};
use super::store::witness as store;

pub(super) use send::{Sender, Watched, start};

/// What others send at most: 63 hashes and a note.
pub(super) const LARGEST: usize = 64 * 1024;
/// Hashes of a proof at most (C2SP tlog-witness).
const HASHES: usize = 63;

/// The witness for other logs.
pub(super) struct Witness {
    pub store: Store,
    pub ledger: Ledger,
    pub clock: Clock,
    pub key: SigningKey,
    /// Its name in signatures.
    pub name: String,
    /// The keys of the logs it watches, by origin.
    pub logs: BTreeMap<String, Vec<VerifierKey>>,
}

/// What a log sends.
struct Added<'a> {
    old: u64,
    proof: Vec<Hash>,
    note: &'a str,
}

/// What it is answered.
pub enum Answered {
    /// The line under its note.
    Cosigned(String),
    /// It goes on from another size than this witness has seen.
    Size(u64),
}

fn parse(body: &str) -> Option<Added<'_>> {
    let (head, note) = body.split_once("\n\n")?;
    let mut lines = head.lines();
    let old = lines.next()?.strip_prefix("old ")?;
    let canonical = old == "0" || (!old.starts_with('0') && old.bytes().all(|b| b.is_ascii_digit()));
    let old = old.parse().ok().filter(|_| canonical)?;
    let proof = lines.map(|l| crypto::from_base64(l)?.try_into().ok()).collect::<Option<Vec<Hash>>>()?;
    (proof.len() <= HASHES).then_some(Added { old, proof, note })
}

impl Witness {
    /// The key that checks its signatures.
    pub fn verifier(&self) -> VerifierKey {
        VerifierKey::witness(&self.name, self.key.public())
    }

    /// Looks at a checkpoint of another log and signs that it extends what was seen.
    ///
    /// # Errors
    /// 400 for what is not in form, 404 for a log it does not watch, 403 for a signature it does not know, 422 for a fork.
    pub async fn add(&self, body: &[u8]) -> Result<Answered, Refusal> {
        let malformed = || {
            Refusal::new(
                &problem::MALFORMED,
                "send `old <size>`, the hashes of the proof, an empty line and the checkpoint",
            )
        };
        let added = std::str::from_utf8(body).ok().and_then(parse).ok_or_else(malformed)?;
        let claimed = Checkpoint::unverified(added.note).ok_or_else(malformed)?;
        let keys =
            self.logs.get(&claimed.origin).ok_or_else(|| Refusal::not_found(format!("log {} here", claimed.origin)))?;
        let checkpoint = Checkpoint::open_any(added.note, keys).map_err(|e| Refusal::new(&problem::DENIED, e))?;
        if added.old > checkpoint.size {
            return Err(Refusal::new(&problem::MALFORMED, "the old size is above that of the checkpoint"));
        }
        let mut conn = self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))?;
        let refusal = |e| self.store.refusal(e);
        let seen = store::seen(&mut conn, &checkpoint.origin).await.map_err(refusal)?;
        let (size, root) = seen.clone().unwrap_or((0, merkle::root(&[]).to_vec()));
        if added.old != size {
            return Ok(Answered::Size(size));
        }
        if checkpoint.size == size && root != checkpoint.root {
            drop(conn);
            self.fork(&checkpoint, &root).await;
            return Ok(Answered::Size(size));
        }
        let old: Hash = root.clone().try_into().unwrap_or_default();
        if !merkle::verify_consistency(size, checkpoint.size, &old, &checkpoint.root, &added.proof) {
            drop(conn);
            self.fork(&checkpoint, &root).await;
            return Err(Refusal::new(
                &problem::UNPROCESSABLE,
                "the proof does not show that this checkpoint extends the one that was seen",
            ));
        }
        let before = seen.as_ref().map(|(n, r)| (*n, r.as_slice()));
        let now = self.clock.now();
        if !store::see(&mut conn, &checkpoint.origin, before, (checkpoint.size, &checkpoint.root), now)
            .await
            .map_err(refusal)?
        {
            let seen = store::seen(&mut conn, &checkpoint.origin).await.map_err(refusal)?;
            return Ok(Answered::Size(seen.map_or(0, |s| s.0)));
        }
        drop(conn);
        if seen.is_none() {
            let entry =
                Entry::ok("audit:witness", format!("log/{}", checkpoint.origin)).change("size", checkpoint.size);
            self.ledger.record(&Caller::daemon("witness"), Permit::granted(), entry).await?;
        }
        let seconds = u64::try_from(now.millis() / 1000).unwrap_or(0);
        note::cosign(added.note, &self.name, &self.key, seconds).map(Answered::Cosigned).ok_or_else(malformed)
    }

    /// Two histories of one log, both signed by it: the worst there is.
    async fn fork(&self, checkpoint: &Checkpoint, root: &[u8]) {
        tracing::error!(log = checkpoint.origin, size = checkpoint.size, "a log that is watched here has forked");
        let entry = Entry::ok("audit:witness", format!("log/{}", checkpoint.origin))
            .outcome(Outcome::Failed)
            .reason("it signed a checkpoint that does not extend the one it signed before: a fork")
            .change("size", checkpoint.size)
            .change("root", crypto::base64(checkpoint.root))
            .change("seen_root", crypto::base64(root))
            .signal("critical", format!("audit/fork/{}", checkpoint.origin));
        if let Err(e) = self.ledger.record(&Caller::daemon("witness"), Permit::granted(), entry).await {
            tracing::error!(error = %e, "the fork could not be recorded");
        }
    }
}

/// A problem that says the log cannot be what a witness saw.
pub(super) const FORKED: &Problem = &problem::RECORD_BEHIND;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_log_sends_is_read_to_the_letter() {
        let hash = crypto::base64([7; 32]);
        let added = parse(&format!("old 20\n{hash}\n{hash}\n\norigin\n30\n{hash}\n\n\u{2014} x AAAA\n"))
            .map(|a| (a.old, a.proof.len()));
        assert_eq!(added, Some((20, 2)));
        assert!(parse("old 0\n\nnote").is_some(), "nothing to prove");
        for bad in
            ["", "old 1", "old x\n\nn", "old 01\n\nn", "old -1\n\nn", "old +1\n\nn", "new 1\n\nn", "old 1\nzz\n\nn"]
        {
            assert!(parse(bad).is_none(), "{bad:?}");
        }
        assert!(parse(&format!("old 1\n{}\n\nn", vec![hash; 64].join("\n"))).is_none());
    }
}
