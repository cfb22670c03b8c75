//! Reports of ttl checks that change nothing anyone can see: those that come together share an entry (rule 18), and each is
//! answered once it is durable.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc, oneshot};

use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};
use crate::ledger::Ledger;

use super::checks;

/// How long a report waits for others: a quarter of the shortest interval there may be.
const GATHER: Duration = Duration::from_millis(125);
/// Reports in one entry at most.
const MOST: usize = 1000;
/// Reports that may wait.
const QUEUE: usize = 16_384;

type Waiting = (String, String, oneshot::Sender<Result<i64, Refusal>>);

/// Takes reports.
#[derive(Clone)]
pub(super) struct Reports(mpsc::Sender<Waiting>);

impl Reports {
    pub fn start(ledger: Ledger, tasks: &Supervisor) -> Self {
        let (send, receive) = mpsc::channel::<Waiting>(QUEUE);
        let receive = Arc::new(Mutex::new(receive));
        tasks.start(Task::restarting("health/reports", move |stop| {
            let (receive, ledger) = (receive.clone(), ledger.clone());
            async move {
                let mut receive = receive.lock().await;
                loop {
                    let mut all = Vec::new();
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        n = receive.recv_many(&mut all, MOST) => if n == 0 { stop.cancelled().await; return Ok(()) },
                    }
                    tokio::time::sleep(GATHER).await;
                    while all.len() < MOST
                        && let Ok(one) = receive.try_recv()
                    {
                        all.push(one);
                    }
                    flush(&ledger, all).await;
                }
            }
        }));
        Self(send)
    }

    /// Reports that a check is as it was; the entry it is in.
    pub async fn give(&self, caller: &Caller, name: String) -> Result<i64, Refusal> {
        let (tell, told) = oneshot::channel();
        self.0
            .try_send((name, caller.actor().to_owned(), tell))
            .map_err(|_| Refusal::new(&problem::OVERLOADED, "too many reports wait"))?;
        told.await.map_err(|_| Refusal::unavailable("the daemon is stopping"))?
    }
}

async fn flush(ledger: &Ledger, all: Vec<Waiting>) {
    let reports = checks::Reports(all.iter().map(|(name, actor, _)| (name.clone(), actor.clone())).collect());
    let done = ledger.write(&Caller::daemon("health"), &[], reports).await;
    for (name, _, tell) in all {
        let answer = match &done {
            Ok(done) if done.value.contains(&name) => Ok(done.index),
            Ok(_) => Err(checks::absent(&name)),
            Err(r) => Err(r.clone()),
        };
        let _ = tell.send(answer);
    }
}
