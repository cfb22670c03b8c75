//! Decisions that were answered while the store was away: kept on this daemon's disk before the answer, and put into the record
//! once the store is back.
//!
//! Only what policies marked `@stale_ok("15m")` determine is answered so, and only as long as what this daemon knows is not older
//! than that. What is already in the record is not recorded twice ([`Late`]). What cannot be read is not thrown away: it is kept
//! beside, as `decisions.unread-1` and on.

mod frames;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::IntGauge;
use serde::Deserialize;
use uuid::Uuid;

use crate::kernel::Refusal;
use crate::kernel::supervisor::TaskError;
use crate::kernel::web::Caller;

use super::decisions::{BYTES, Late, Record, SEGMENT};
use super::{Governance, past};
use frames::{End, Frames};

/// The file that is written.
const OPEN: &str = "decisions";
/// The one that is being put into the record.
const CLOSED: &str = "decisions.closed";
/// What could not be read, with a number behind it.
const UNREAD: &str = "decisions.unread";

/// What waits on disk.
pub(super) struct Spool {
    dir: PathBuf,
    limit: u64,
    /// How many that is.
    waiting: IntGauge,
    open: Mutex<Option<Open>>,
    closed: Mutex<Option<Closed>>,
}

struct Open {
    file: File,
    size: u64,
}

/// The file that is being read.
struct Closed {
    frames: Frames,
    /// What was read last, and is not in the record yet.
    piece: Vec<Record>,
    /// Every frame so far was a record.
    whole: bool,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spool {
    /// In `DATA/spool`, of at most so many bytes; `waiting` says how many records wait, those of an earlier run too.
    pub fn start(data: &Path, limit: u64, waiting: IntGauge) -> Self {
        let spool = Self { dir: data.join("spool"), limit, waiting, open: Mutex::default(), closed: Mutex::default() };
        if let Err(e) = spool.count() {
            tracing::error!(error = %e, "what was decided while the store was away cannot be read: {}", spool.dir.display());
        }
        spool
    }

    fn count(&self) -> io::Result<()> {
        let closed = self.dir.join(CLOSED);
        let mut count = if closed.exists() { Frames::open(&closed, 0)?.count()?.0 } else { 0 };
        if self.dir.join(OPEN).exists() {
            let (open, more) = self.make()?;
            *lock(&self.open) = Some(open);
            count += more;
        }
        self.waiting.set(count);
        Ok(())
    }

    /// Keeps records; durable on return.
    ///
    /// # Errors
    /// 503 when the disk does not take them, or there are too many.
    pub fn keep(&self, records: &[&Record]) -> Result<(), Refusal> {
        let mut framed = Vec::new();
        records.iter().for_each(|record| frames::push(&mut framed, &record.bytes));
        let mut open = lock(&self.open);
        let unavailable = |e: &dyn std::fmt::Display| {
            Refusal::unavailable(format!("the store is away, and decisions cannot be kept on this disk: {e}"))
        };
        let Open { mut file, size } = match open.take() {
            Some(open) => open,
            None => self.make().map_err(|e| unavailable(&e))?.0,
        };
        let closed = fs::metadata(self.dir.join(CLOSED)).map_or(0, |m| m.len());
        if closed + size + framed.len() as u64 > self.limit {
            *open = Some(Open { file, size });
            return Err(unavailable(&"governance.spool_mb is used up"));
        }
        if let Err(e) = file.write_all(&framed).and_then(|()| file.sync_data()) {
            // Behind a torn frame nothing would be found again. If it cannot be cut off now, it is when the file is next opened.
            if file.set_len(size).is_ok() {
                *open = Some(Open { file, size });
            }
            return Err(unavailable(&e));
        }
        *open = Some(Open { file, size: size + framed.len() as u64 });
        self.waiting.add(i64::try_from(records.len()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// Opens the file that is written, behind its last whole frame; how many there are.
    fn make(&self) -> io::Result<(Open, i64)> {
        fs::create_dir_all(&self.dir)?;
        let path = self.dir.join(OPEN);
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
        let mut frames = Frames::open(&path, 0)?;
        let (count, end) = frames.count()?;
        let size = frames.at();
        if end != End::Whole {
            let bytes = file.metadata()?.len() - size;
            if end == End::Torn {
                tracing::warn!(bytes, "the end of {} was torn and is cut off: it was never answered", path.display());
            } else {
                let beside = self.unread(|to| copy(&path, size, to))?;
                tracing::error!(bytes, "{} is damaged: its end is kept in {}", path.display(), beside.display());
            }
            file.set_len(size)?;
            file.sync_all()?;
        }
        self.sync()?;
        Ok((Open { file, size }, count))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Puts something beside, under the first name that is free.
    fn unread(&self, put: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<PathBuf> {
        let names = (1..).map(|n| self.dir.join(format!("{UNREAD}-{n}")));
        let free = names.into_iter().find(|name| !name.exists()).unwrap_or_else(|| self.dir.join(UNREAD));
        put(&free)?;
        self.sync()?;
        Ok(free)
    }

    /// Whether anything waits.
    fn waits(&self) -> bool {
        let size = |name: &str| fs::metadata(self.dir.join(name)).map(|m| m.len());
        size(CLOSED).is_ok() || size(OPEN).is_ok_and(|size| size > 0)
    }

    /// The next records that wait, as many as a segment takes; the same until they are [`recorded`](Self::recorded). They are
    /// of the file that was closed before, or else of the one that is written, which is closed now. `None` at its end.
    fn piece(&self) -> io::Result<Option<Vec<Record>>> {
        let mut closed = lock(&self.closed);
        let mut now = match closed.take() {
            Some(closed) => closed,
            None => Closed { frames: self.close()?, piece: Vec::new(), whole: true },
        };
        let end = if now.piece.is_empty() { self.fill(&mut now) } else { Ok(None) };
        let done = match end {
            Ok(Some(end)) if now.piece.is_empty() => self.done(now.whole && end == End::Whole),
            Ok(_) => return Ok(Some(closed.insert(now).piece.clone())),
            // What was read is good; the frame in the middle of which it failed is read again.
            Err(e) => Frames::open(&self.dir.join(CLOSED), now.frames.at()).and_then(|again| {
                now.frames = again;
                Err(e)
            }),
        };
        if done.is_err() {
            *closed = Some(now);
        }
        done.map(|()| None)
    }

    fn close(&self) -> io::Result<Frames> {
        let closed = self.dir.join(CLOSED);
        if !closed.exists() {
            let mut open = lock(&self.open);
            fs::rename(self.dir.join(OPEN), &closed)?;
            *open = None;
            self.sync()?;
        }
        Frames::open(&closed, 0)
    }

    /// Reads a segment's worth; how the file ends, if it does.
    fn fill(&self, closed: &mut Closed) -> io::Result<Option<End>> {
        let mut bytes = 0;
        while closed.piece.len() < SEGMENT && bytes < BYTES {
            let at = closed.frames.at();
            let record = match closed.frames.read()? {
                Ok(record) => record,
                Err(end) => return Ok(Some(end)),
            };
            match read(record) {
                Some(record) => {
                    bytes += record.bytes.len();
                    closed.piece.push(record);
                }
                None => {
                    tracing::error!(at, "what was kept here while the store was away is no decision");
                    closed.whole = false;
                    self.waiting.dec();
                }
            }
        }
        Ok(None)
    }

    /// The piece that was taken is in the record.
    fn recorded(&self) {
        if let Some(closed) = lock(&self.closed).as_mut() {
            self.waiting.sub(i64::try_from(closed.piece.len()).unwrap_or(i64::MAX));
            closed.piece = Vec::new();
        }
    }

    /// All that could be read is in the record.
    fn done(&self, whole: bool) -> io::Result<()> {
        let closed = self.dir.join(CLOSED);
        if whole {
            fs::remove_file(closed)?;
            return self.sync();
        }
        let beside = self.unread(|to| fs::rename(&closed, to))?;
        tracing::error!(
            "not all that was decided while the store was away could be read: it is kept in {}",
            beside.display()
        );
        Ok(())
    }
}

/// A copy of a file from a place on.
fn copy(from: &Path, at: u64, to: &Path) -> io::Result<()> {
    let mut from = File::open(from)?;
    io::Seek::seek(&mut from, io::SeekFrom::Start(at))?;
    let mut to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut from, &mut to)?;
    to.sync_all()
}

fn read(bytes: Vec<u8>) -> Option<Record> {
    #[derive(Deserialize)]
    struct Kept {
        id: Uuid,
        decision: bool,
    }
    let Kept { id, decision } = serde_json::from_slice(&bytes).ok()?;
    let about = past::about(&bytes);
    Some(Record { id, decision, bytes, about })
}

impl Governance {
    /// Puts into the record what was decided while the store was away.
    pub(super) async fn reconcile(&self) -> Result<(), TaskError> {
        if !self.spool.waits() {
            return Ok(());
        }
        // Nothing is closed before the store is known to be back.
        self.ledger.fence().await?;
        while let Some(records) = tokio::task::block_in_place(|| self.spool.piece())? {
            let done = self.ledger.write(&Caller::daemon("governance"), &[], Late(records)).await?;
            tokio::task::block_in_place(|| self.spool.recorded());
            if done.value > 0 {
                tracing::info!(
                    index = done.index,
                    count = done.value,
                    "decisions made while the store was away are in the record"
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A folder that goes with the test.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("sop-spool-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            Self(dir)
        }

        fn start(&self) -> Spool {
            Spool::start(&self.0, 1000, IntGauge::new("waiting", "waiting").unwrap())
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.join("spool").join(name)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn record(n: u8) -> Record {
        let id = Uuid::from_bytes([n; 16]);
        let bytes = json!({"id": id.to_string(), "decision": n.is_multiple_of(2)}).to_string().into_bytes();
        Record { id, decision: n.is_multiple_of(2), bytes, about: None }
    }

    /// What a pass puts into the record.
    fn pass(spool: &Spool) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(piece) = spool.piece().unwrap() {
            assert!(!piece.is_empty());
            all.extend(piece.iter().map(|r| r.id.as_bytes()[0]));
            spool.recorded();
        }
        all
    }

    #[test]
    fn what_is_kept_is_found_again_once_and_counted_all_the_while() {
        let dir = Dir::new("kept");
        let spool = dir.start();
        assert!(!spool.waits());
        spool.keep(&[&record(1), &record(2)]).unwrap();
        assert_eq!(spool.waiting.get(), 2);
        drop(spool);
        let spool = dir.start();
        assert!(spool.waits());
        assert_eq!(spool.waiting.get(), 2, "counted at the start");
        assert_eq!(spool.piece().unwrap().unwrap().len(), 2);
        spool.keep(&[&record(3)]).unwrap();
        assert_eq!(spool.piece().unwrap().unwrap().len(), 2, "the same until it is in the record");
        assert_eq!(spool.waiting.get(), 3);
        drop(spool);
        let spool = dir.start();
        assert_eq!(spool.waiting.get(), 3, "of both files");
        assert_eq!(pass(&spool), [1, 2], "what was closed first is not lost to what is new");
        assert_eq!(spool.waiting.get(), 1);
        assert_eq!(pass(&spool), [3]);
        assert_eq!((spool.waiting.get(), spool.waits()), (0, false));
        let full = spool.keep(&(0..20).map(|_| record(4)).collect::<Vec<_>>().iter().collect::<Vec<_>>());
        assert_eq!(full.unwrap_err().problem().status, 503);
        assert_eq!(spool.waiting.get(), 0);
    }

    #[test]
    fn the_limit_is_of_both_files() {
        let dir = Dir::new("limit");
        let spool = dir.start();
        let seven: Vec<Record> = (0..7).map(record).collect();
        let seven: Vec<&Record> = seven.iter().collect();
        spool.keep(&seven).unwrap();
        assert_eq!(spool.piece().unwrap().unwrap().len(), 7);
        spool.keep(&seven).unwrap_err();
        spool.recorded();
        assert!(spool.piece().unwrap().is_none());
        spool.keep(&seven).unwrap();
    }

    #[test]
    fn what_is_kept_behind_a_torn_end_is_found() {
        let dir = Dir::new("torn");
        dir.start().keep(&[&record(1), &record(2)]).unwrap();
        let whole = fs::read(dir.file(OPEN)).unwrap();
        for torn in [&whole[..3], &whole[..frames::HEAD], &whole[..whole.len() / 2 - 3]] {
            fs::write(dir.file(OPEN), [&whole[..], torn].concat()).unwrap();
            let spool = dir.start();
            assert_eq!(spool.waiting.get(), 2);
            assert_eq!(fs::read(dir.file(OPEN)).unwrap(), whole, "it is cut off");
            spool.keep(&[&record(3)]).unwrap();
            drop(spool);
            let spool = dir.start();
            assert_eq!(pass(&spool), [1, 2, 3]);
            assert!(!dir.file("decisions.unread-1").exists(), "it was never answered");
        }
    }

    #[test]
    fn what_cannot_be_read_is_kept_beside() {
        let dir = Dir::new("beside");
        let spool = dir.start();
        let strange = Record { bytes: b"{}".to_vec(), ..record(7) };
        spool.keep(&[&record(1), &strange, &record(2)]).unwrap();
        let whole = fs::read(dir.file(OPEN)).unwrap();
        assert_eq!(pass(&spool), [1, 2]);
        assert_eq!((spool.waiting.get(), spool.waits()), (0, false));
        assert_eq!(fs::read(dir.file("decisions.unread-1")).unwrap(), whole);
        // Damage in the middle: what is behind it cannot be told from it, and stays.
        spool.keep(&[&record(1), &record(2), &record(3)]).unwrap();
        drop(spool);
        let mut bytes = fs::read(dir.file(OPEN)).unwrap();
        let second = frames::HEAD + record(1).bytes.len();
        bytes[second + frames::HEAD + 4] ^= 1;
        fs::write(dir.file(OPEN), &bytes).unwrap();
        let spool = dir.start();
        assert_eq!(fs::read(dir.file("decisions.unread-2")).unwrap(), &bytes[second..]);
        spool.keep(&[&record(4)]).unwrap();
        assert_eq!(pass(&spool), [1, 4]);
        // The same in the file that is closed.
        fs::write(dir.file(CLOSED), &bytes).unwrap();
        drop(spool);
        let spool = dir.start();
        assert_eq!(spool.waiting.get(), 1);
        assert_eq!(pass(&spool), [1]);
        assert_eq!(fs::read(dir.file("decisions.unread-3")).unwrap(), bytes);
        assert_eq!((spool.waiting.get(), spool.waits()), (0, false));
    }

    #[test]
    fn a_piece_is_no_more_than_a_segment() {
        let dir = Dir::new("pieces");
        let spool = Spool::start(&dir.0, 1 << 24, IntGauge::new("waiting", "waiting").unwrap());
        let many: Vec<Record> = (0..SEGMENT + 5).map(|n| record((n % 200) as u8)).collect();
        spool.keep(&many.iter().collect::<Vec<_>>()).unwrap();
        let large = Record { bytes: vec![b' '; BYTES], ..record(1) };
        let large = Record { bytes: [&large.bytes[..], &record(1).bytes].concat(), ..large };
        spool.keep(&[&large, &record(2)]).unwrap();
        let mut sizes = Vec::new();
        while let Some(piece) = spool.piece().unwrap() {
            sizes.push(piece.len());
            spool.recorded();
        }
        assert_eq!(sizes, [SEGMENT, 6, 1]);
    }
}
