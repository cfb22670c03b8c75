//! The disk by itself, beside a load that waits for it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use crate::kernel::Clock;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// What is written: a page of PostgreSQL.
const PAGE: usize = 8192;

/// How long each `fdatasync` of one page took, for so long, some two hundred a second.
pub(super) async fn syncs(dir: &Path, length: Duration) -> anyhow::Result<Vec<Duration>> {
    let path = dir.join("disk");
    let measured = tokio::task::spawn_blocking(move || {
        let file = OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
        let (clock, mut all) = (Clock::system(), Vec::new());
        let end = clock.elapsed() + length;
        while clock.elapsed() < end {
            // The same page: nothing but the page itself has to become durable.
            file.write_all_at(&[all.len() as u8; PAGE], 0)?;
            let began = clock.elapsed();
            file.sync_data()?;
            all.push(clock.elapsed().saturating_sub(began));
            std::thread::sleep(PAUSE);
        }
        std::fs::remove_file(&path)?;
        std::io::Result::Ok(all)
    });
    Ok(measured.await??)
}
