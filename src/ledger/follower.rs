//! The follower: turns entries into what this daemon holds in memory (policy snapshot, revocations, watch hub, registry).
//!
//! It hears of new entries from this daemon's own writer, with what they touched; of other daemons' by a notification, backed
//! up by a poll; and reads those from the ledger. Every projection is brought to the same index before that index is shown.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::sync::{mpsc, watch};

use crate::kernel::BoxFuture;
use crate::kernel::supervisor::{Stop, TaskError};
use crate::store::MOMENT;

use super::touch::Touch;
use super::{Shared, store};

/// A room's view in memory, kept current by the follower.
pub trait Projection: Send + Sync + 'static {
    /// For the log and `/readyz`.
    fn name(&self) -> &'static str;
    /// The kinds of touch it wants to hear of.
    fn kinds(&self) -> &'static [&'static str];
    /// Reads itself from nothing, inside a snapshot of the database at index `at`.
    fn load<'a>(&'a self, conn: &'a mut PgConnection, at: i64) -> BoxFuture<'a, Result<(), sqlx::Error>>;
    /// What `load` left to do that needs no database: the snapshot is given back before it (rule 15).
    ///
    /// # Errors
    /// When what was read cannot be made use of.
    fn loaded(&self) -> Result<(), sqlx::Error> {
        Ok(())
    }
    /// Takes in what the entries after `after` up to `to` touched. May be called again for the same entries.
    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        after: i64,
        to: i64,
        touched: &'a [(i64, Touch)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>>;
}

/// Entries after `after` up to `to`, and what they touched.
pub(super) struct News {
    pub after: i64,
    pub to: i64,
    pub touched: Vec<(i64, Touch)>,
    /// Nothing was newer than `to` at this time of the clock.
    pub began: Duration,
}

/// Entries read at a time.
const PAGE: i64 = 5_000;
/// How long a notification may be lost.
const POLL: Duration = Duration::from_millis(500);

pub(super) struct Follower {
    shared: Arc<Shared>,
    projections: Vec<Arc<dyn Projection>>,
    news: mpsc::Receiver<News>,
    at: watch::Sender<i64>,
    conn: Option<PgConnection>,
}

impl Follower {
    pub fn new(
        shared: Arc<Shared>,
        projections: Vec<Arc<dyn Projection>>,
        news: mpsc::Receiver<News>,
        at: watch::Sender<i64>,
    ) -> Self {
        Self { shared, projections, news, at, conn: None }
    }

    /// Reads every projection from nothing, all at one index.
    pub async fn load(&mut self) -> Result<(), sqlx::Error> {
        let began = self.shared.clock.elapsed();
        let mut conn = self.shared.store.dedicated("follower").await?;
        let mut tx = conn.begin_with(MOMENT).await?;
        store::unhurried(&mut tx).await?;
        let at = store::head_index(&mut tx).await?;
        for p in &self.projections {
            p.load(&mut tx, at).await?;
        }
        tx.commit().await?;
        self.projections.iter().try_for_each(|p| p.loaded())?;
        self.conn = Some(conn);
        self.at.send_replace(at);
        self.shared.confirm(began);
        Ok(())
    }

    /// Follows until stopped.
    pub async fn run(&mut self, stop: Stop) -> Result<(), TaskError> {
        let mut listener = self.shared.store.listener("sop_ledger").await?;
        // Whoever took itself for alone notifies from now on.
        let conn = self.connection().await?;
        let announced = store::announce(conn).await;
        self.kept(announced)?;
        loop {
            // The interest in notifications stands before we look, so nothing that comes in between is missed.
            self.drain().await?;
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                news = self.news.recv() => match news {
                    Some(news) => self.take(news).await?,
                    None => return Ok(()),
                },
                note = listener.recv() => {
                    let note = note?;
                    let index = note.payload().parse::<i64>().unwrap_or(i64::MAX);
                    // Of our own writer there is news on its way, with all that reading would show.
                    let ours = self.shared.writers.iter().any(|pid| pid.load(Ordering::Acquire) == note.process_id());
                    if !ours {
                        self.shared.others.store(true, Ordering::Relaxed);
                    }
                    if !ours && index > *self.at.borrow() {
                        self.read_on().await?;
                    }
                }
                () = tokio::time::sleep(POLL) => self.read_on().await?,
            }
        }
    }

    async fn drain(&mut self) -> Result<(), sqlx::Error> {
        while let Ok(news) = self.news.try_recv() {
            self.take(news).await?;
        }
        Ok(())
    }

    /// Takes news in directly if it continues what is known; else reads what lies between.
    async fn take(&mut self, news: News) -> Result<(), sqlx::Error> {
        let at = *self.at.borrow();
        if news.to <= at {
            return Ok(());
        }
        if news.after != at {
            return self.read_on().await;
        }
        // Our own writer found the head where it knew it.
        self.advance(news.after, news.to, news.touched).await?;
        self.shared.confirm(news.began);
        Ok(())
    }

    /// Reads from the ledger what is newer than what is known.
    async fn read_on(&mut self) -> Result<(), sqlx::Error> {
        loop {
            let (began, after) = (self.shared.clock.elapsed(), *self.at.borrow());
            let conn = self.connection().await?;
            let entries = store::entries_after(conn, after, i64::MAX, PAGE).await;
            let entries = self.kept(entries)?;
            let Some(last) = entries.last() else {
                self.shared.confirm(began);
                return Ok(());
            };
            let to = last.index;
            let more = entries.len() as i64 == PAGE;
            let touched = entries.into_iter().flat_map(|e| e.touched.into_iter().map(move |t| (e.index, t))).collect();
            self.advance(after, to, touched).await?;
            if !more {
                self.shared.confirm(began);
                return Ok(());
            }
        }
    }

    async fn advance(&mut self, after: i64, to: i64, touched: Vec<(i64, Touch)>) -> Result<(), sqlx::Error> {
        for p in self.projections.clone() {
            let wanted = touched.iter().any(|(_, t)| p.kinds().contains(&t.kind.as_str()));
            if wanted {
                let conn = self.connection().await?;
                let done = p.advance(conn, after, to, &touched).await;
                self.kept(done)?;
            }
        }
        self.shared.metrics.followed.set(to);
        self.at.send_replace(to);
        Ok(())
    }

    async fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        if self.conn.is_none() {
            self.conn = Some(self.shared.store.dedicated("follower").await?);
        }
        self.conn.as_mut().ok_or(sqlx::Error::PoolClosed)
    }

    /// Drops the connection on an error, so that the next attempt has a new one.
    fn kept<T>(&mut self, done: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        if done.is_err() {
            self.conn = None;
        }
        done
    }
}
