//! The ledger's background work.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};

use crate::kernel::supervisor::{Supervisor, Task};

use super::follower::Follower;
use super::writer::Writer;
use super::{Shared, fence};

pub(super) fn start(
    tasks: &Supervisor,
    shared: &Arc<Shared>,
    follower: Follower,
    writer: Arc<Mutex<Writer>>,
    asked: mpsc::Receiver<fence::Asked>,
) {
    // Each task is one value behind a lock, so that a restart goes on with what the last attempt knew.
    let follower = Arc::new(Mutex::new(follower));
    let follower = Task::restarting("ledger/follower", move |stop| {
        let follower = follower.clone();
        async move { follower.lock().await.run(stop).await }
    });
    tasks.start(follower.eager());
    let asked = Arc::new(Mutex::new(asked));
    let s = shared.clone();
    let fence = Task::restarting("ledger/fence", move |stop| {
        let (asked, s) = (asked.clone(), s.clone());
        async move { fence::run(s, &mut *asked.lock().await, stop).await }
    });
    tasks.start(fence.eager());
    let s = shared.clone();
    tasks.start(Task::periodic("ledger/tidy", Duration::from_secs(60), move || {
        let s = s.clone();
        async move { s.tidy().await.map_err(Into::into) }
    }));
    let s = shared.clone();
    tasks.start(Task::periodic("ledger/clock", Duration::from_secs(1), move || {
        let s = s.clone();
        async move { s.discipline().await.map_err(Into::into) }
    }));
    let s = shared.clone();
    tasks.start(Task::restarting("ledger/present", move |stop| {
        let s = s.clone();
        async move { s.present.run(&s.store, &stop).await }
    }));
    let s = shared.clone();
    let writer = Task::restarting("ledger/writer", move |stop| {
        let (writer, s) = (writer.clone(), s.clone());
        async move { Writer::run(&writer, &s, stop).await }
    });
    // Everyone who writes waits for it: it must not wait for its turn among the requests.
    tasks.start(writer.eager().apart());
}
