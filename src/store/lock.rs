//! One daemon a data folder: a lock file with the holder's process id in it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Held as long as the daemon lives; the operating system gives it up when the process ends, however it ends.
#[derive(Debug)]
pub struct DataLock(#[allow(dead_code)] File);

pub(super) fn take(dir: &Path) -> Result<DataLock, String> {
    let cannot =
        |what: &str, e: &dyn std::fmt::Display| format!("the data folder {} cannot be {what}: {e}", dir.display());
    // Others may pass through, so that PostgreSQL's user reaches its cluster in it; they may not look.
    std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(|e| cannot("made", &e))?;
    let path = dir.join("sop.lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| cannot("used", &e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            return Err(format!(
                "the data folder {} is in use by the daemon with process id {}",
                dir.display(),
                holder.trim()
            ));
        }
        Err(TryLockError::Error(e)) => return Err(cannot("locked", &e)),
    }
    let wrote = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    wrote.map_err(|e| cannot("written", &e))?;
    Ok(DataLock(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_told_which_has_it() {
        let dir = std::env::temp_dir().join(format!("sop-lock-{}", uuid::Uuid::new_v4()));
        let held = take(&dir).unwrap();
        let refused = take(&dir).unwrap_err();
        assert!(refused.contains(&std::process::id().to_string()), "{refused}");
        drop(held);
        take(&dir).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }
}
