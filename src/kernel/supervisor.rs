//! Owns every background task: its name, what its end means, its restarts and its last error.
//!
//! A task is data ([`Task`]): a name, a [`Policy`] and a function that makes its future again after each end. The supervisor
//! restarts with back-off what should go on, brings the daemon down when a task that must not end has ended, and stops them
//! in the reverse of the order they were started in. This is the only file that calls `tokio::spawn`.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, getpriority_process, setpriority_process};
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{BoxFuture, Clock, Timestamp};

/// The stack of each thread, bytes. Cedar closes over a hierarchy by calling itself once a level, and a question may reach a
/// thousand: a thread's usual 2 MiB were outgrown by that, and the daemon with it.
pub const STACK: usize = 16 * 1024 * 1024;

/// The pause before a task is started again: at first, and at most, doubled each time that it did not last.
const FIRST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(5);
/// At most for one that requests wait for.
const SOON: Duration = Duration::from_millis(400);
/// A task that ran for so long did not end for having begun: whatever ended it is new.
const LASTED: Duration = Duration::from_secs(1);

/// Says to a task that it should stop. Cloneable; cancelled once and for good.
pub type Stop = CancellationToken;

/// Why a task ended with a failure: a sentence for operators.
pub type TaskError = Box<dyn std::error::Error + Send + Sync>;

/// What the end of a task means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Start it again, with back-off. What most background work wants.
    Restart,
    /// The daemon cannot go on without it: stop the daemon.
    Fatal,
}

/// A background task as data. `run` is called again for every restart, so it must find its place by itself.
pub struct Task {
    name: &'static str,
    policy: Policy,
    apart: bool,
    behind: bool,
    most: Duration,
    run: Box<dyn Fn(Stop) -> BoxFuture<'static, Result<(), TaskError>> + Send + Sync>,
}

impl Task {
    /// A task that is restarted when it ends.
    pub fn restarting<F, Fut>(name: &'static str, run: F) -> Self
    where
        F: Fn(Stop) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), TaskError>> + Send + 'static,
    {
        Self {
            name,
            policy: Policy::Restart,
            apart: false,
            behind: false,
            most: MOST,
            run: Box::new(move |s| Box::pin(run(s))),
        }
    }

    /// A task whose end before the stop ends the daemon.
    pub fn fatal<F, Fut>(name: &'static str, run: F) -> Self
    where
        F: Fn(Stop) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), TaskError>> + Send + 'static,
    {
        Self { policy: Policy::Fatal, ..Self::restarting(name, run) }
    }

    /// Starts it again soon, however often it ended: for what requests wait for.
    #[must_use]
    pub fn eager(mut self) -> Self {
        self.most = SOON;
        self
    }

    /// Gives it a thread of its own, which the kernel wakes at once; a task among others is looked at when those before it have
    /// had their turn.
    #[must_use]
    pub fn apart(mut self) -> Self {
        self.apart = true;
        self
    }

    /// Gives it a thread of its own that lets everybody else go first: for work in long pieces that nobody waits for.
    #[must_use]
    pub fn behind(mut self) -> Self {
        self.behind = true;
        self.apart()
    }

    /// One attempt: what it came to, or that it panicked. It is apart from the supervisor, so that a panic does not take that along.
    async fn attempt(&self, stop: Stop) -> Result<(), TaskError> {
        let work = (self.run)(stop);
        if !self.apart {
            return tokio::spawn(work).await.unwrap_or_else(|e| Err(format!("panicked: {e}").into()));
        }
        let (tell, told) = oneshot::channel();
        let behind = self.behind;
        std::thread::Builder::new().name(self.name.to_owned()).stack_size(STACK).spawn(move || {
            if behind {
                give_way(None);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            // Nobody listens when the supervisor itself was ended; then so is this.
            let _ = tell.send(runtime.map_err(TaskError::from).and_then(|r| r.block_on(work)));
        })?;
        told.await.unwrap_or_else(|_| Err("panicked".into()))
    }

    /// A task that does `work` every `period` until stopped. A failure is noted and the next period tries again.
    pub fn periodic<F, Fut>(name: &'static str, period: Duration, work: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), TaskError>> + Send + 'static,
    {
        let work = Arc::new(work);
        Self::restarting(name, move |stop| {
            let work = Arc::clone(&work);
            async move {
                let mut failing = false;
                let mut tick = tokio::time::interval(period);
                tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        _ = tick.tick() => match work().await {
                            Ok(()) => failing = false,
                            Err(e) if failing => tracing::debug!(task = name, error = %e, "{name} fails still"),
                            Err(e) => {
                                failing = true;
                                tracing::warn!(task = name, error = %e, "{name} failed; it is tried again in {period:?}");
                            }
                        },
                    }
                }
            }
        })
    }
}

/// How a task is doing, for `/readyz` and metrics.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Whether it runs now.
    pub running: bool,
    /// How often it was started again.
    pub restarts: u64,
    /// Why it last ended, if it ended badly.
    pub last_error: Option<String>,
    /// When that was.
    pub last_error_at: Option<Timestamp>,
}

#[derive(Default)]
struct Inner {
    tasks: Vec<(&'static str, Stop, JoinHandle<()>)>,
    status: BTreeMap<&'static str, Status>,
}

/// The owner of all tasks of one daemon.
#[derive(Clone)]
pub struct Supervisor {
    inner: Arc<Mutex<Inner>>,
    clock: Clock,
    failed: Stop,
}

impl Supervisor {
    /// With no tasks yet.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { inner: Arc::default(), clock, failed: Stop::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a task; it stops when told, in the reverse of this order.
    pub fn start(&self, task: Task) {
        let stop = Stop::new();
        let name = task.name;
        self.lock().status.insert(name, Status { running: true, restarts: 0, last_error: None, last_error_at: None });
        let handle = tokio::spawn(self.clone().supervise(task, stop.clone()));
        self.lock().tasks.push((name, stop, handle));
    }

    async fn supervise(self, task: Task, stop: Stop) {
        let mut pause = FIRST;
        loop {
            let began = self.clock.elapsed();
            let ended = task.attempt(stop.clone()).await.err().map(|e| e.to_string());
            if stop.is_cancelled() {
                self.note(task.name, |s| s.running = false);
                return;
            }
            let why = ended.unwrap_or_else(|| "ended before it was told to".to_owned());
            tracing::warn!(task = task.name, error = %why, "task {} ended: {why}", task.name);
            let now = self.clock.now();
            self.note(task.name, |s| {
                s.running = task.policy == Policy::Restart;
                s.restarts += 1;
                s.last_error = Some(why);
                s.last_error_at = Some(now);
            });
            if task.policy == Policy::Fatal {
                self.failed.cancel();
                return;
            }
            if self.clock.elapsed().saturating_sub(began) > LASTED {
                pause = FIRST;
            }
            tokio::select! {
                () = stop.cancelled() => { self.note(task.name, |s| s.running = false); return; }
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(task.most);
        }
    }

    fn note(&self, name: &'static str, f: impl FnOnce(&mut Status)) {
        if let Some(s) = self.lock().status.get_mut(name) {
            f(s);
        }
    }

    /// Cancelled when a task that must not end has ended.
    #[must_use]
    pub fn failed(&self) -> Stop {
        self.failed.clone()
    }

    /// Every task's status, by name.
    #[must_use]
    pub fn status(&self) -> BTreeMap<&'static str, Status> {
        self.lock().status.clone()
    }

    /// Stops all tasks, last started first, each within `each`; one that does not end by then is aborted and named.
    pub async fn stop(&self, each: Duration) {
        let mut tasks = std::mem::take(&mut self.lock().tasks);
        while let Some((name, stop, mut handle)) = tasks.pop() {
            stop.cancel();
            if tokio::time::timeout(each, &mut handle).await.is_err() {
                tracing::warn!(task = name, "task {name} did not stop in {each:?} and was aborted");
                handle.abort();
            }
        }
    }
}

/// How much nicer work is that lets others go first: where the processor is wanted by both it gets a third of their share.
const NICER: i32 = 5;

/// Lets everybody else on this machine go first: a process of ours, or this thread. If that may not be, all stays as it is.
pub fn give_way(process: Option<Pid>) {
    if let Ok(nice) = getpriority_process(process) {
        let _ = setpriority_process(process, nice + NICER);
    }
}

/// Runs `work` apart from the caller, so that it goes on when the caller is dropped (a client that hangs up).
pub fn detach<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(work)
}

/// The runtime that requests are answered on, for a task with a thread of its own.
pub struct Requests(tokio::runtime::Handle);

impl Requests {
    /// The runtime of the caller.
    pub fn here() -> Self {
        Self(tokio::runtime::Handle::current())
    }

    /// Runs `work` there.
    pub fn detach<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) {
        self.0.spawn(work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    #[test]
    fn who_gives_way_does_so_alone() {
        let nice = || getpriority_process(None).unwrap();
        let before = nice();
        let behind = std::thread::spawn(move || {
            give_way(None);
            nice()
        });
        assert_eq!((behind.join().unwrap(), nice()), ((before + NICER).min(19), before));
    }

    #[tokio::test]
    async fn a_failing_task_is_restarted_and_says_why() {
        restarted(|task| task).await;
        restarted(Task::apart).await;
    }

    async fn restarted(how: fn(Task) -> Task) {
        let s = Supervisor::new(Clock::system());
        let n = Arc::new(AtomicU32::new(0));
        let m = n.clone();
        let flaky = Task::restarting("flaky", move |stop| {
            let n = m.clone();
            async move {
                match n.fetch_add(1, SeqCst) {
                    0 => Err("no luck".into()),
                    1 => panic!("worse luck"),
                    _ => {
                        stop.cancelled().await;
                        Ok(())
                    }
                }
            }
        });
        s.start(how(flaky));
        while n.load(SeqCst) < 3 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let status = s.status()["flaky"].clone();
        assert_eq!(status.restarts, 2);
        assert!(status.last_error.unwrap().contains("panicked"));
        s.stop(Duration::from_secs(1)).await;
        assert!(!s.status()["flaky"].running);
    }

    #[tokio::test]
    async fn a_fatal_end_is_told() {
        let s = Supervisor::new(Clock::system());
        s.start(Task::fatal("vital", |_| async { Err("gone".into()) }));
        s.failed().cancelled().await;
        assert_eq!(s.status()["vital"].last_error.as_deref(), Some("gone"));
    }

    #[tokio::test]
    async fn stops_in_reverse_order() {
        let s = Supervisor::new(Clock::system());
        let order = Arc::new(Mutex::new(Vec::new()));
        for name in ["first", "second", "third"] {
            let order = order.clone();
            s.start(Task::restarting(name, move |stop| {
                let order = order.clone();
                async move {
                    stop.cancelled().await;
                    order.lock().unwrap().push(name);
                    Ok(())
                }
            }));
        }
        s.stop(Duration::from_secs(1)).await;
        assert_eq!(*order.lock().unwrap(), ["third", "second", "first"]);
    }
}
