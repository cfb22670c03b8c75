//! What must be so for the daemon to be ready.

use std::sync::Arc;

use crate::api::{Certificates, Check, Readiness};
use crate::kernel::{BoxFuture, Clock};
use crate::ledger::Ledger;
use crate::store::Store;

/// A session that holds a snapshot longer than this ruins the head row for everyone (rule 15).
const SNAPSHOT_MOST: f64 = 10.0;

pub(super) fn readiness(
    store: &Store,
    ledger: &Ledger,
    clock: &Clock,
    certificates: Option<Arc<Certificates>>,
) -> Readiness {
    let (s, l, c, full) = (store.clone(), ledger.clone(), clock.clone(), store.clone());
    let mut all = vec![
        Check {
            name: "database",
            look: Box::new(move || {
                let s = s.clone();
                Box::pin(async move {
                    match s.health().await {
                        Ok(oldest) if oldest > SNAPSHOT_MOST => Ok(format!(
                            "answers, but a session has held a snapshot for {oldest:.0} s: the head row suffers"
                        )),
                        Ok(_) => Ok("answers".to_owned()),
                        Err(e) => Err(format!("does not answer: {}", s.refusal(e).detail())),
                    }
                })
            }),
        },
        Check {
            name: "ledger",
            look: Box::new(move || {
                let (stopped, index, queued) = (l.stopped(), l.index(), l.queued());
                Box::pin(async move {
                    match stopped {
                        Some((slug, why)) => Err(format!("{slug}: {why}; see /problems/{slug}")),
                        None => Ok(format!("at index {index}, {queued} changes wait")),
                    }
                })
            }),
        },
        Check {
            name: "clock",
            look: Box::new(move || {
                let alarm = c.alarm();
                Box::pin(async move {
                    match alarm {
                        Some(off) => {
                            Ok(format!("the wall clock has stepped by {} s and is not believed yet", off.as_secs()))
                        }
                        None => Ok("steady".to_owned()),
                    }
                })
            }),
        },
        Check {
            name: "disk",
            look: Box::new(move || {
                let is_full = full.storage_full();
                Box::pin(async move {
                    if is_full {
                        Err("nearly full: writes are refused until there is room".to_owned())
                    } else {
                        Ok("has room".to_owned())
                    }
                })
            }),
        },
    ];
    all.extend(certificates.map(certificate));
    Readiness::new(all)
}

/// Whether what is served is what the files hold. If not, the old one is served on: the daemon is ready, and says so.
fn certificate(certificates: Arc<Certificates>) -> Check {
    let look = move || -> BoxFuture<'static, Result<String, String>> {
        let fault = certificates.fault();
        Box::pin(async move {
            Ok(fault
                .map_or_else(|| "served as its files have it".to_owned(), |f| format!("the old one is served: {f}")))
        })
    };
    Check { name: "certificate", look: Box::new(look) }
}
