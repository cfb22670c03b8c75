//! The guard before the disk is full: PostgreSQL that cannot write its log stops, so writing ends before that.
//!
//! At [`Disk::guard_percent`](crate::config::Disk) of use, or when the reserve had to be touched, writes are refused (507) and
//! reads go on. A reserve file keeps room for PostgreSQL's own needs; it is given up when the disk is full all the same, and
//! made again when there is room.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prometheus::IntGauge;

use crate::config::Config;
use crate::kernel::supervisor::{Supervisor, Task};

/// Writing resumes this many percent below the guard, so that it does not flap.
const HYSTERESIS: u64 = 1;

pub(super) fn start(config: &Config, tasks: &Supervisor, gauge: IntGauge, full: Arc<AtomicBool>) {
    let guard = Arc::new(Guard {
        dir: config.data.dir.clone(),
        percent: u64::from(config.disk.guard_percent),
        reserve: config.disk.reserve_mb * 1024 * 1024,
        full,
        gauge,
    });
    tasks.start(Task::periodic("store/guard", Duration::from_secs(1), move || {
        let guard = guard.clone();
        async move { guard.look().map_err(Into::into) }
    }));
}

struct Guard {
    dir: PathBuf,
    percent: u64,
    reserve: u64,
    full: Arc<AtomicBool>,
    gauge: IntGauge,
}

impl Guard {
    fn look(&self) -> std::io::Result<()> {
        let disk = rustix::fs::statvfs(&self.dir)?;
        let (free, all) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
        let used = disk.f_blocks.saturating_sub(disk.f_bfree);
        let percent = used * 100 / (used + disk.f_bavail).max(1);
        let was = self.full.load(Ordering::Acquire);
        let limit = if was { self.percent.saturating_sub(HYSTERESIS) } else { self.percent };
        let now = percent >= limit;
        if now != was {
            self.full.store(now, Ordering::Release);
            self.gauge.set(i64::from(now));
            if now {
                tracing::error!(
                    percent,
                    free,
                    all,
                    "the disk of the data folder is nearly full: writes are refused until there is room"
                );
            } else {
                tracing::info!(percent, free, all, "there is room on the disk again: writes go on");
            }
        }
        self.keep_reserve(free)
    }

    fn keep_reserve(&self, free: u64) -> std::io::Result<()> {
        let path = self.dir.join("reserve");
        let there = path.exists();
        if there && free < self.reserve / 2 {
            std::fs::remove_file(&path)?;
            tracing::error!("the reserve on the disk was given up so that PostgreSQL can go on");
        } else if !there && free > self.reserve * 4 && self.reserve > 0 {
            allocate(&path, self.reserve)?;
        }
        Ok(())
    }
}

fn allocate(path: &Path, size: u64) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    if let Err(e) = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size) {
        tracing::debug!(error = %e, "no reserve can be kept on this file system");
        std::fs::remove_file(path)?;
    }
    Ok(())
}
