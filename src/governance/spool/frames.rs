//! The frames of a file: a length, the beginning of a digest, and a record. They are read one by one, for a file may be large.

use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use crate::kernel::crypto;

/// Bytes of a record's digest that a frame carries.
const DIGEST: usize = 8;
/// Bytes before a record.
pub(super) const HEAD: usize = 4 + DIGEST;

/// Puts a record behind others.
pub(super) fn push(framed: &mut Vec<u8>, record: &[u8]) {
    framed.extend_from_slice(&u32::try_from(record.len()).unwrap_or(u32::MAX).to_be_bytes());
    framed.extend_from_slice(&crypto::sha256(record)[..DIGEST]);
    framed.extend_from_slice(record);
}

/// How a file ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Behind a whole frame.
    Whole,
    /// In a frame: it was being written when all stopped.
    Torn,
    /// In something that is no frame. Where the next begins cannot be known.
    Damaged,
}

/// A file as far as it was read.
pub(super) struct Frames {
    input: BufReader<File>,
    at: u64,
    size: u64,
    end: Option<End>,
}

impl Frames {
    /// From a place on that is between two frames.
    pub fn open(path: &Path, at: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(at))?;
        Ok(Self { input: BufReader::new(file), at, size, end: None })
    }

    /// The end of the last whole frame that was read.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The record of the next frame, or how the file ends.
    pub fn read(&mut self) -> io::Result<Result<Vec<u8>, End>> {
        let frame = match self.end {
            None => self.frame()?,
            Some(end) => Err(end),
        };
        self.end = frame.as_ref().err().copied();
        Ok(frame)
    }

    fn frame(&mut self) -> io::Result<Result<Vec<u8>, End>> {
        let left = self.size.saturating_sub(self.at);
        if left == 0 {
            return Ok(Err(End::Whole));
        }
        if left < HEAD as u64 {
            return Ok(Err(End::Torn));
        }
        let (mut length, mut digest) = ([0; 4], [0; DIGEST]);
        self.input.read_exact(&mut length)?;
        self.input.read_exact(&mut digest)?;
        let length = u32::from_be_bytes(length) as usize;
        let whole = (HEAD + length) as u64;
        if whole > left {
            return Ok(Err(End::Torn));
        }
        let mut record = vec![0; length];
        self.input.read_exact(&mut record)?;
        if crypto::sha256(&record)[..DIGEST] != digest {
            return Ok(Err(End::Damaged));
        }
        self.at += whole;
        Ok(Ok(record))
    }

    /// How many whole frames follow, and how the file ends.
    pub fn count(&mut self) -> io::Result<(i64, End)> {
        let mut count = 0;
        loop {
            match self.read()? {
                Ok(_) => count += 1,
                Err(end) => return Ok((count, end)),
            }
        }
    }
}
