//! The room's background work.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use crate::kernel::supervisor::{Stop, Supervisor, Task, TaskError};

use super::Governance;
use super::rollout::Told;
use super::store::bundles as rows;

/// Bundles that are compiled at the start, because they were in force lately.
const LATELY: i64 = 8;
/// How often it is looked for proposals that are past their time.
const EXPIRE: Duration = Duration::from_secs(5);
/// How often it is looked how a rollout does.
const ROLLOUT: Duration = Duration::from_millis(250);
/// How often it is looked whether decisions wait to be put into the record.
const RECONCILE: Duration = Duration::from_millis(500);

impl Governance {
    /// Starts the compiler of bundles that were made on other daemons, the end of proposals that are past their time, the watch
    /// over rollouts, and whatever is tried in shadow.
    pub(super) fn start_tasks(&self, tasks: &Supervisor) {
        let (room, waiting) = (self.clone(), Arc::new(Mutex::new(self.rules.snapshot.library().waiting())));
        tasks.start(Task::restarting("governance/compiler", move |stop| {
            let (room, waiting) = (room.clone(), waiting.clone());
            async move { room.compile(&waiting, stop).await }
        }));
        let room = self.clone();
        tasks.start(Task::periodic("governance/proposals", EXPIRE, move || {
            let room = room.clone();
            async move {
                if room.rules.snapshot.force().index < 0 {
                    room.ship().await;
                }
                room.expire().await.map_err(Into::into)
            }
        }));
        let (room, told) = (self.clone(), Arc::new(Mutex::new(Told::new())));
        tasks.start(Task::periodic("governance/rollout", ROLLOUT, move || {
            let (room, told) = (room.clone(), told.clone());
            async move { room.watch_rollout(&mut *told.lock().await).await }
        }));
        let room = self.clone();
        tasks.start(Task::periodic("governance/spool", RECONCILE, move || {
            let room = room.clone();
            async move { room.reconcile().await }
        }));
        let room = self.clone();
        tasks.start(Task::restarting("governance/shadow", move |stop| {
            let room = room.clone();
            async move { room.follow_shadows(stop).await }
        }));
    }

    async fn compile(
        &self,
        waiting: &Mutex<Option<tokio::sync::mpsc::Receiver<String>>>,
        stop: Stop,
    ) -> Result<(), TaskError> {
        let mut waiting = waiting.lock().await;
        let Some(waiting) = waiting.as_mut() else { return Ok(()) };
        // What was in force lately can be gone back to at any moment.
        let mut conn = self.connection().await?;
        let lately = rows::lately(&mut conn, LATELY).await?;
        drop(conn);
        for id in lately {
            self.open(&id).await?;
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                id = waiting.recv() => match id {
                    Some(id) => drop(self.open(&id).await?),
                    None => return Ok(()),
                },
            }
        }
    }
}
