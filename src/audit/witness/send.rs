//! Having this log's checkpoints signed by others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{IntCounterVec, IntGaugeVec};
use reqwest::StatusCode;

use crate::audit::note::VerifierKey;
use crate::audit::store::{self, witness as rows};
use crate::audit::tree;
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::{Clock, Refusal, crypto};
use crate::ledger::{Ledger, merkle};
use crate::store::Store;

/// How long a witness may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the newest checkpoint is sent, if there is a new one.
const EVERY: Duration = Duration::from_secs(1);
/// The longest a witness that fails is left alone.
const REST: Duration = Duration::from_secs(60);
/// The longest answer that is read.
const LARGEST: usize = 16 * 1024;
/// One daemon at a time does this.
const CLAIM: Duration = Duration::from_secs(15);

/// A witness of this log.
#[derive(Clone, Debug)]
pub struct Watched {
    /// Where it takes checkpoints: its base URL.
    pub url: String,
    /// Its key.
    pub key: VerifierKey,
}

/// What is known of a witness.
#[derive(Clone, Default)]
struct Known {
    /// The size it has seen.
    size: u64,
    /// The size it has signed.
    signed: u64,
    /// How often it failed since it last did not, and when it is asked again.
    failed: u32,
    again: Duration,
}

/// Sends checkpoints to witnesses.
pub struct Sender {
    pub(in crate::audit) store: Store,
    pub(in crate::audit) ledger: Ledger,
    pub(in crate::audit) clock: Clock,
    pub(in crate::audit) witnesses: Vec<Watched>,
    pub(in crate::audit) http: reqwest::Client,
    pub(in crate::audit) sent: IntCounterVec,
    pub(in crate::audit) age: IntGaugeVec,
    known: Mutex<BTreeMap<String, Known>>,
}

/// What a witness said.
enum Said {
    Signed(String),
    /// It has seen another size.
    Has(u64),
    /// It says that this log has forked.
    Fork,
}

impl Sender {
    /// To these witnesses.
    ///
    /// # Errors
    /// When no client can be made.
    pub(in crate::audit) fn new(
        store: Store,
        ledger: Ledger,
        clock: Clock,
        witnesses: Vec<Watched>,
        sent: IntCounterVec,
        age: IntGaugeVec,
    ) -> Result<Self, Refusal> {
        let http = reqwest::Client::builder().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none()).no_proxy();
        let http = http.build().map_err(Refusal::internal)?;
        Ok(Self { store, ledger, clock, witnesses, http, sent, age, known: Mutex::default() })
    }

    fn of(&self, witness: &Watched) -> Known {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&witness.key.name).cloned().unwrap_or_default()
    }

    fn learn(&self, witness: &Watched, change: impl FnOnce(&mut Known)) {
        change(self.known.lock().unwrap_or_else(PoisonError::into_inner).entry(witness.key.name.clone()).or_default());
    }

    /// Before anything is written: whether a witness has seen more of this log than there is. What is wrong, if so.
    pub(in crate::audit) async fn at_start(&self) -> Option<String> {
        let looks = self.witnesses.iter().map(|w| async move {
            let (size, note) = self.newest().await.ok()??;
            match self.ask(w, &note, size, size).await {
                Ok(Said::Has(has)) if has > size => Some(format!(
                    "record-behind: the witness {} has seen {has} entries of this log, there are {size}: entries were lost", w.key.name
                )),
                Ok(Said::Fork) => Some(format!("record-behind: the witness {} has seen another history of this log", w.key.name)),
                Ok(Said::Has(has)) => {
                    self.learn(w, |k| k.size = has);
                    None
                }
                Ok(Said::Signed(_)) => {
                    self.learn(w, |k| k.size = size);
                    None
                }
                Err(e) => {
                    tracing::warn!(witness = w.key.name, "a witness could not be asked at start: {e}");
                    None
                }
            }
        });
        futures_util::future::join_all(looks).await.into_iter().flatten().next()
    }

    async fn newest(&self) -> Result<Option<(u64, String)>, sqlx::Error> {
        let mut conn = self.store.reader().acquire().await?;
        Ok(store::checkpoint(&mut conn).await?.map(|p| (p.size, p.note)))
    }

    /// Sends the newest checkpoint to whoever has not signed it.
    async fn round(&self) {
        let Ok(Some((size, note))) = self.newest().await else { return };
        let now = self.clock.elapsed();
        let due = self.witnesses.iter().filter(|w| {
            let known = self.of(w);
            known.signed < size && known.again <= now
        });
        let lines = futures_util::future::join_all(due.map(|w| self.one(w, size, &note))).await;
        let lines: String = lines.into_iter().flatten().collect();
        if lines.is_empty() {
            return;
        }
        let kept = async {
            let mut conn = self.store.reader().acquire().await?;
            rows::keep_cosigned(&mut conn, size, &format!("{note}{lines}"), self.clock.now()).await
        };
        if let Err(e) = kept.await {
            tracing::warn!(error = %e, "what witnesses signed could not be kept; it is asked for again");
        }
    }

    /// The line of one witness.
    async fn one(&self, witness: &Watched, size: u64, note: &str) -> Option<String> {
        let name = &witness.key.name;
        let mut said = self.ask(witness, note, self.of(witness).size, size).await;
        if let Ok(Said::Has(has)) = said
            && has <= size
        {
            said = self.ask(witness, note, has, size).await;
        }
        let (outcome, line) = match said {
            Ok(Said::Signed(line)) => {
                self.learn(witness, |k| *k = Known { size, signed: size, ..Known::default() });
                ("signed", Some(line))
            }
            Ok(Said::Has(has)) => {
                tracing::error!(witness = name, has, size, "a witness has seen more of this log than there is");
                ("ahead", None)
            }
            Ok(Said::Fork) => {
                tracing::error!(witness = name, size, "a witness says that this log has forked");
                ("fork", None)
            }
            Err(e) => {
                tracing::warn!(witness = name, "a witness did not sign: {e}");
                ("failed", None)
            }
        };
        self.sent.with_label_values(&[name, outcome]).inc();
        if line.is_none() {
            let now = self.clock.elapsed();
            self.learn(witness, |k| {
                k.failed += 1;
                k.again = now + EVERY.saturating_mul(1 << k.failed.min(6)).min(REST);
            });
        } else {
            self.age.with_label_values(&[name]).set(self.clock.now().millis() / 1000);
        }
        line
    }

    async fn ask(&self, witness: &Watched, note: &str, old: u64, size: u64) -> Result<Said, String> {
        let old = old.min(size);
        let mut body = format!("old {old}\n");
        if old > 0 && old < size {
            let mut conn = self.store.reader().acquire().await.map_err(|e| e.to_string())?;
            let proof = tree::path(&mut conn, merkle::consistency(old, size)).await.map_err(|e| e.to_string())?;
            for hash in proof {
                body.push_str(&crypto::base64(hash));
                body.push('\n');
            }
        }
        body.push('\n');
        body.push_str(note);
        let url = format!("{}/witness/add-checkpoint", witness.url.trim_end_matches('/'));
        let answer = self.http.post(url).body(body).send().await.map_err(|e| e.without_url().to_string())?;
        let (status, kind) = (answer.status(), answer.headers().get("content-type").cloned());
        let text = limited(answer).await?;
        match status {
            StatusCode::OK => {
                let line = text.lines().find(|l| witness.key.cosigned(&format!("{note}{l}\n")).is_some());
                line.map(|l| Said::Signed(format!("{l}\n")))
                    .ok_or_else(|| "it answered no signature of its key".to_owned())
            }
            StatusCode::CONFLICT if kind.is_some_and(|k| k == "text/x.tlog.size") => {
                let has: u64 = text.trim().parse().map_err(|_| "it answered no size".to_owned())?;
                if has == old && has == size { Ok(Said::Fork) } else { Ok(Said::Has(has)) }
            }
            StatusCode::UNPROCESSABLE_ENTITY => Ok(Said::Fork),
            other => Err(format!("it answered {other}")),
        }
    }
}

/// An answer's text, if it is not too long: a witness may answer anything.
async fn limited(mut answer: reqwest::Response) -> Result<String, String> {
    let mut bytes = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(|e| e.without_url().to_string())? {
        bytes.extend_from_slice(&part);
        if bytes.len() > LARGEST {
            return Err("it answered too much".to_owned());
        }
    }
    String::from_utf8(bytes).map_err(|_| "it did not answer text".to_owned())
}

/// Starts sending, on whichever daemon holds the claim.
pub(in crate::audit) fn start(sender: Sender, tasks: &Supervisor) {
    let sender = Arc::new(sender);
    tasks.start(Task::restarting("audit/witnesses", move |stop| {
        let sender = sender.clone();
        async move {
            let mut claim = sender.ledger.claim("audit/witnesses", CLAIM);
            loop {
                if sender.ledger.stopped().is_none() && claim.held().await.unwrap_or(false) {
                    sender.round().await;
                }
                tokio::select! {
                    () = stop.cancelled() => { claim.release().await; return Ok(()); }
                    () = tokio::time::sleep(EVERY) => {}
                }
            }
        }
    }));
}
