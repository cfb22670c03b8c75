//! Identifiers: UUIDv7 (RFC 9562) wherever a thing has no natural name, and the rule for names.

use uuid::{Builder, Uuid};

use super::{Timestamp, crypto};

/// A new UUIDv7 at `now`. Ids made in the same millisecond differ in their random part.
#[must_use]
pub fn new_id(now: Timestamp) -> Uuid {
    let ms = u64::try_from(now.millis()).unwrap_or(0);
    match crypto::random::<10>() {
        Ok(random) => Builder::from_unix_timestamp_millis(ms, &random).into_uuid(),
        // Without random bytes nothing that matters gets far; an id is still an id.
        Err(_) => Uuid::now_v7(),
    }
}

/// The longest name of a key, topic, service, file, lock or pool.
pub const NAME_MAX: usize = 256;

/// Why a string is no name, or `None` if it is one: 1-256 characters of `A-Za-z0-9._:-` in segments joined by `/`,
/// none of them empty, `.` or `..`.
#[must_use]
pub fn name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("a name has at least one character");
    }
    if name.len() > NAME_MAX {
        return Some("a name has at most 256 characters");
    }
    for segment in name.split('/') {
        if segment.is_empty() {
            return Some("a name has no empty segment: no leading, trailing or doubled `/`");
        }
        if segment == "." || segment == ".." {
            return Some("a name has no segment `.` or `..`");
        }
        if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-')) {
            return Some("a name is made of A-Z a-z 0-9 . _ : - and `/`");
        }
    }
    None
}

/// Why a string is no id of a subject, resource, entity or client: 1-512 bytes without control characters.
#[must_use]
pub fn id_fault(id: &str) -> Option<&'static str> {
    if id.is_empty() {
        return Some("an id has at least one character");
    }
    if id.len() > 512 {
        return Some("an id has at most 512 bytes");
    }
    if id.chars().any(char::is_control) {
        return Some("an id has no control characters");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        for good in ["a", "arp/plan/1", "A-z_0.9:x", &"x".repeat(256), "..."] {
            assert_eq!(name_fault(good), None, "{good}");
        }
        for bad in ["", "/a", "a/", "a//b", ".", "a/../b", "a b", "ä", "a\0", &"x".repeat(257)] {
            assert!(name_fault(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn ids_sort_by_time() {
        let a = new_id(Timestamp::from_millis(1_000));
        let b = new_id(Timestamp::from_millis(2_000));
        assert!(a < b);
        assert_eq!(a.get_version_num(), 7);
    }
}
