//! The problem types of RFC 9457: one table from slug to status, title and the page that explains it.

use super::Kind;

/// A type of problem. `type` in the answer is `/problems/<slug>`, and the daemon serves a page there.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// Last segment of the type's URI.
    pub slug: &'static str,
    /// HTTP status.
    pub status: u16,
    /// Which of the eight kinds it is.
    pub kind: Kind,
    /// Short, the same for every occurrence.
    pub title: &'static str,
    /// What it means and what to do about it, for the page.
    pub explain: &'static str,
    /// Default `Retry-After`, seconds.
    pub retry_after: Option<u32>,
}

macro_rules! problems {
    ($($name:ident, $slug:literal, $status:literal, $kind:ident, $retry:expr, $title:literal, $explain:literal;)*) => {
        $(
            #[doc = $title]
            pub static $name: Problem = Problem { slug: $slug, status: $status, kind: Kind::$kind, title: $title, explain: $explain, retry_after: $retry };
        )*
        /// Every problem type there is.
        pub static ALL: &[&Problem] = &[$(&$name),*];
    };
}

problems! {
    MALFORMED, "malformed", 400, Invalid, None, "The request is malformed",
        "The request could not be read: not JSON, a value of the wrong type, an unknown field, a parameter out of range, a name that breaks the rule. `errors` points at each fault. Mend the request; repeating it will not help.";
    BEYOND_HEAD, "beyond-head", 400, Invalid, None, "The index asked for does not exist yet",
        "`at` names an index past the newest entry. Ask for an index at or below `Sop-Index`, or wait for it with `min_index`.";
    UNAUTHENTICATED, "unauthenticated", 401, Unauthenticated, None, "No valid credentials",
        "The request carried no bearer token, or one that is malformed, expired, revoked or not meant for this daemon. Get one from `POST /oauth2/token` and send it as `Authorization: Bearer ...`.";
    DENIED, "denied", 403, Denied, None, "Not allowed",
        "The caller is known, and the active policy does not allow this action on this resource. `decision` names the recorded decision; whoever may read it can explain it.";
    NOT_FOUND, "not-found", 404, NotFound, None, "No such thing",
        "There is nothing under this path or name. Check its spelling; a list of its kind shows what there is.";
    METHOD_NOT_ALLOWED, "method-not-allowed", 405, Invalid, None, "This path does not take that method",
        "The path exists but does not take this method; the `Allow` header lists those it takes.";
    CONFLICT, "conflict", 409, Conflict, None, "The state of the thing does not permit this",
        "What the request supposes is not so (any more). Read the thing again and decide anew.";
    EXHAUSTED, "exhausted", 409, Exhausted, None, "All uses are spent",
        "The operation token was used as often as it may be. Ask for a new one.";
    GONE, "gone", 410, NotFound, None, "No longer there",
        "It was here and is not any more: it expired, was revoked or completed.";
    COMPACTED, "compacted", 410, NotFound, None, "That part of history was compacted",
        "The index asked for is older than the compaction mark. Read the present state and go on from its `Sop-Index`.";
    PRECONDITION_FAILED, "precondition-failed", 412, Conflict, None, "A precondition does not hold",
        "`If-Match` or `If-None-Match` does not fit the thing as it is now. Read it again, look at its `ETag`, decide anew.";
    TOO_LARGE, "too-large", 413, Invalid, None, "The body is too large",
        "A body has at most 1 MiB (files are streamed and have a quota instead). Send less at once.";
    UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", 415, Invalid, None, "The media type is not understood",
        "This path takes `application/json` unless its documentation says otherwise.";
    UNPROCESSABLE, "unprocessable", 422, Invalid, None, "Well formed, but it cannot be",
        "The request could be read, but what it says cannot hold: a document that fails its schema, a policy that does not type-check. `errors` points at each fault.";
    NOT_APPROVED, "not-approved", 409, Conflict, None, "Others have to approve this first",
        "The policy lets you do this once others have approved it. Propose it (`POST .../propose` for a bundle, `POST /v1/governance/proposals` for an entity, the same request with `Sop-Propose: REASON` for anything), let `required` others approve, and ask again (with `Sop-Proposal: ID` where it was proposed so).";
    PROPOSED, "proposed", 202, Conflict, None, "Proposed",
        "The change was not made: it was proposed, as `Sop-Propose` asked. Once others have approved the proposal, send the same request with `Sop-Proposal: ID`.";
    LOCKS_OUT, "locks-out", 422, Invalid, None, "Nobody could undo this",
        "Under these policies the caller, or the last administrator, could not go back to others. Change the bundle; where only the caller would be locked out, `force` does it all the same.";
    IDEMPOTENCY_MISMATCH, "idempotency-mismatch", 422, Conflict, None, "This Idempotency-Key was used for another request",
        "An `Idempotency-Key` names one request: the same method, path and body. Use a fresh key for a new request.";
    URI_TOO_LONG, "uri-too-long", 414, Invalid, None, "The URI is too long",
        "A request target has at most 8 KiB. Put what is long into the body.";
    HEADERS_TOO_LARGE, "headers-too-large", 431, Invalid, None, "The header section is too large",
        "A header section has at most 64 KiB. Send fewer or shorter headers.";
    RATE_LIMITED, "rate-limited", 429, Exhausted, Some(1), "Too many requests",
        "The caller's rate limit is spent. Wait for `Retry-After` seconds.";
    TIMEOUT, "request-timeout", 408, Unavailable, None, "The request took too long to arrive",
        "A request must arrive whole within 30 seconds.";
    INTERNAL, "internal", 500, Internal, None, "An error on our side",
        "The daemon failed to do what it should. Its log has the cause under the request id of the answer.";
    UNAVAILABLE, "unavailable", 503, Unavailable, Some(1), "Not available now",
        "Something the daemon needs is away (its database, or room in a queue). Nothing was changed unless the detail says that the outcome is not known. Try again after `Retry-After` seconds, with the same Idempotency-Key.";
    OVERLOADED, "overloaded", 503, Unavailable, Some(1), "Too much at once",
        "The queue of changes is full. Nothing was changed. Try again after `Retry-After` seconds.";
    RECORD_BEHIND, "record-behind", 503, Unavailable, Some(30), "The record went backwards",
        "The database holds an older record than this daemon has acknowledged: a failover lost entries, or a backup was put back. Writes have stopped so that the log cannot fork. Reads go on. Bring the missing entries back (the former primary, a newer backup) and restart the daemon, or, if they are lost for good, stop it and go on with `sop audit resume`.";
    RECORD_DAMAGED, "record-damaged", 503, Unavailable, Some(30), "The record was changed",
        "The self-audit, or the check at start, found that something stored is not what was written: an entry, its details, a tile, the head. Writes have stopped on every daemon so that nothing is built on it. Stop the daemon, see what was changed with `sop audit diagnose`, mend it from a backup, or go on with `sop audit resume`, which says so in the record.";
    CLOCK_UNSURE, "clock-unsure", 503, Unavailable, Some(5), "The clock disagrees with the database's",
        "This daemon's clock is more than 5 seconds ahead of the database's. It does not write until they agree. Check time synchronisation on both hosts.";
    BEHIND, "behind", 504, Unavailable, None, "The index asked for was not reached in time",
        "`min_index` names an index this daemon did not reflect within `Sop-Timeout` seconds. Ask again, or allow more time.";
    STORAGE_FULL, "storage-full", 507, Unavailable, Some(30), "The disk is nearly full",
        "The data folder's disk has passed the guard. Reads go on; writes resume by themselves when there is room again.";
}

/// The problem type of that slug.
#[must_use]
pub fn by_slug(slug: &str) -> Option<&'static Problem> {
    ALL.iter().copied().find(|p| p.slug == slug)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_are_unique_and_pages_say_something() {
        for (i, p) in ALL.iter().enumerate() {
            assert!(ALL[i + 1..].iter().all(|q| q.slug != p.slug), "{} twice", p.slug);
            assert!(p.explain.len() > 40, "{} explains nothing", p.slug);
            // A change that was proposed instead of made is no fault of anybody's.
            assert!((400..600).contains(&p.status) || p.slug == "proposed");
        }
    }

    #[test]
    fn the_documentation_lists_every_problem() {
        let page = include_str!("../../docs/api.md");
        for p in ALL {
            let row = format!("| `{}` {} | {} |", p.slug, p.title.to_ascii_lowercase(), p.status);
            assert!(page.contains(&row), "docs/api.md lacks: {row}");
        }
    }
}
