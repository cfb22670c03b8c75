//! A turn on the spot.
//!
//! The writer's thread is woken for a command, and wakes who brought it when that is done: two changes of thread, which take a
//! good part of the whole request where the machine has nothing else to do. So where nobody else writes, a task beside the
//! request takes the turn itself, on the thread it runs on. Where several write the thread serves them better: it gathers them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::kernel::supervisor;
use crate::ledger::Shared;
use crate::ledger::job::Job;

use super::{Turn, Who, Writer};

impl Writer {
    /// Takes a turn for a command on the spot, if nobody else writes; gives it back otherwise.
    pub fn express(writer: &Arc<Mutex<Self>>, shared: &Shared, job: Box<dyn Job>) -> Option<Box<dyn Job>> {
        if !shared.calm.load(Ordering::Relaxed) {
            return Some(job);
        }
        match writer.clone().try_lock_owned() {
            // Once its queue is closed the writer has written its last.
            Ok(writer) if !shared.queue.is_closed() => {
                // Apart from the request: a client that hangs up must not end a turn halfway.
                supervisor::detach(on_the_spot(writer, job));
                None
            }
            _ => Some(job),
        }
    }
}

async fn on_the_spot(mut writer: OwnedMutexGuard<Writer>, job: Box<dyn Job>) {
    let w = &mut *writer;
    let mut session = match w.express.take().filter(|s| s.era == w.era) {
        Some(session) => session,
        None => match w.connect(Who::Bringer).await {
            Ok(session) => session,
            Err(e) => return w.away(vec![job], &e).await,
        },
    };
    w.shared.metrics.spot.inc();
    match w.turn(&mut session, vec![job]).await {
        Turn::Fine => w.express = Some(session),
        Turn::Broken(jobs, e) => {
            w.lost(Who::Bringer, jobs, &e);
            // The thread goes on with it: it has the patience.
            w.shared.bell.notify_one();
        }
    }
    let (shared, news) = (w.shared.clone(), w.untold.take());
    // The caller goes first, and finds the writer free when it comes back.
    drop(writer);
    if let Some(news) = news {
        tokio::task::yield_now().await;
        shared.news(news);
    }
}
