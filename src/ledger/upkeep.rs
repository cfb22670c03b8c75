//! What the ledger sees to now and then: room for what comes, the clock, who else is there, outcomes that are old.

use std::sync::atomic::Ordering;

use super::{Shared, job, store, writer};

impl Shared {
    /// Makes an empty log's head, checks the master key, and sees to it that the next indexes have a partition.
    pub(super) async fn prepare(&self) -> Result<(), sqlx::Error> {
        let mut conn = self.store.dedicated("start").await?;
        store::make_head(&mut conn, &writer::empty_root()).await?;
        self.room(&mut conn).await
    }

    /// Adds a partition when the head is within half of one of the end.
    async fn room(&self, conn: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
        let head = store::head_index(conn).await?;
        let end = store::attached(conn).await?.end;
        if end - head < store::PARTITION / 2 {
            store::add_partition(conn, end, self.partitioned).await?;
        }
        Ok(())
    }

    /// Holds the clock to the wall's, with the database's as the witness of a step (rule 17); and looks who else is there.
    pub(super) async fn discipline(&self) -> Result<(), sqlx::Error> {
        let read = async {
            let mut conn = self.store.reader().acquire().await?;
            store::surroundings(&mut conn, self.store.daemon()).await
        };
        let read = read.await;
        self.clock.discipline(read.as_ref().ok().map(|(time, _)| *time));
        self.others.store(read.as_ref().map_or(true, |(_, others)| *others), Ordering::Relaxed);
        read.map(|_| ())
    }

    /// Whether a notification might be heard. A daemon that has just started finds by itself what it was not told, until it is
    /// seen.
    pub(super) fn heard(&self) -> bool {
        self.others.load(Ordering::Relaxed)
    }

    /// What is done once a minute: drop old outcomes, keep room for new entries.
    pub(super) async fn tidy(&self) -> Result<(), sqlx::Error> {
        let mut conn = self.store.dedicated("tidy").await?;
        self.room(&mut conn).await?;
        while store::drop_outcomes(&mut conn, job::outcome_horizon(self.clock.now())).await? == 1000 {}
        Ok(())
    }
}
