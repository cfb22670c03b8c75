//! Every way a request can be answered with no: one type, eight kinds, and a [`Problem`] that decides status and page.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::problem::{self, Problem};

/// The eight kinds of refusal. A room's error says which it is; [`Problem`] turns it into a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request itself cannot be.
    Invalid,
    /// Nobody vouched for the caller.
    Unauthenticated,
    /// The caller is known and may not.
    Denied,
    /// There is no such thing (any more).
    NotFound,
    /// The thing is not as the request supposes.
    Conflict,
    /// A quota, a count or a rate is used up.
    Exhausted,
    /// Not now; later perhaps.
    Unavailable,
    /// Our fault.
    Internal,
}

/// One fault in a body: where (JSON Pointer, RFC 6901) and what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// JSON Pointer into the body, `""` for the whole.
    pub pointer: String,
    /// What is wrong there, and what would be right.
    pub detail: String,
    /// Line in a text that the field carries (Cedar, for one), from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// Column in that line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u32>,
}

impl Fault {
    /// A fault at `pointer`.
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), detail: detail.into(), line: None, column: None }
    }
}

/// A request that was answered with no. It can be stored and answered again (an idempotent retry), so it is plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Refusal(Box<Inner>);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Inner {
    #[serde(serialize_with = "slug_of", deserialize_with = "problem_of")]
    problem: &'static Problem,
    detail: String,
    #[serde(default)]
    errors: Vec<Fault>,
    #[serde(default)]
    extra: Map<String, Value>,
    #[serde(default)]
    retry_after: Option<u32>,
    #[serde(default)]
    headers: Vec<(String, String)>,
    /// The entry that recorded this refusal, if it was recorded.
    #[serde(default)]
    index: Option<i64>,
}

fn slug_of<S: Serializer>(p: &&'static Problem, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(p.slug)
}

fn problem_of<'de, D: Deserializer<'de>>(d: D) -> Result<&'static Problem, D::Error> {
    let slug = String::deserialize(d)?;
    Ok(problem::by_slug(&slug).unwrap_or(&problem::INTERNAL))
}

impl Refusal {
    /// A refusal of this problem type; `detail` says what was wrong and what to do.
    pub fn new(problem: &'static Problem, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            problem,
            detail: detail.into(),
            errors: Vec::new(),
            extra: Map::new(),
            retry_after: problem.retry_after,
            headers: Vec::new(),
            index: None,
        }))
    }

    /// 400 with one fault at a pointer.
    pub fn malformed(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self::new(&problem::MALFORMED, detail.clone()).at(pointer, detail)
    }

    /// 404: `what` is not there.
    pub fn not_found(what: impl std::fmt::Display) -> Self {
        Self::new(&problem::NOT_FOUND, format!("there is no {what}"))
    }

    /// 500. The cause is logged here and never sent: the answer only names the request.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "internal error");
        Self::new(
            &problem::INTERNAL,
            "something went wrong on our side; the log of the daemon has the cause under this request id",
        )
    }

    /// 503 with Retry-After.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(&problem::UNAVAILABLE, detail)
    }

    /// Adds a fault.
    #[must_use]
    pub fn at(mut self, pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        self.0.errors.push(Fault::new(pointer, detail));
        self
    }

    /// Adds faults.
    #[must_use]
    pub fn with_faults(mut self, faults: impl IntoIterator<Item = Fault>) -> Self {
        self.0.errors.extend(faults);
        self
    }

    /// The same refusal, of a part of the request: its faults lie under `pointer`, and one without faults is a fault there.
    #[must_use]
    pub fn under(mut self, pointer: &str) -> Self {
        if self.0.errors.is_empty() {
            let detail = self.0.detail.clone();
            return self.at(pointer, detail);
        }
        self.0.errors.iter_mut().for_each(|fault| fault.pointer.insert_str(0, pointer));
        self
    }

    /// Adds a member to the problem document.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.extra.insert(name.to_owned(), value.into());
        self
    }

    /// Adds a response header.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.0.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Says after how many seconds to try again.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.0.retry_after = Some(seconds);
        self
    }

    /// Says which entry recorded it.
    #[must_use]
    pub fn recorded_at(mut self, index: i64) -> Self {
        self.0.index = Some(index);
        self
    }

    /// The problem type.
    #[must_use]
    pub fn problem(&self) -> &'static Problem {
        self.0.problem
    }

    /// The kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.problem.kind
    }

    /// What was wrong and what to do.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// Faults in the body.
    #[must_use]
    pub fn errors(&self) -> &[Fault] {
        &self.0.errors
    }

    /// Further members of the problem document.
    #[must_use]
    pub fn extra(&self) -> &Map<String, Value> {
        &self.0.extra
    }

    /// Seconds for `Retry-After`.
    #[must_use]
    pub fn retry_after_seconds(&self) -> Option<u32> {
        self.0.retry_after
    }

    /// Further response headers.
    #[must_use]
    pub fn headers(&self) -> &[(String, String)] {
        &self.0.headers
    }

    /// The entry that recorded it, if any did.
    #[must_use]
    pub fn index(&self) -> Option<i64> {
        self.0.index
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.0.problem.slug, self.0.detail)
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_a_part_points_into_it() {
        let at = |r: Refusal| r.under("/operations/3").errors()[0].pointer.clone();
        assert_eq!(at(Refusal::malformed("/key", "a name is wanted")), "/operations/3/key");
        assert_eq!(at(Refusal::not_found("such topic")), "/operations/3");
    }

    #[test]
    fn a_refusal_survives_being_stored() {
        let r = Refusal::malformed("/a/b", "a number is wanted").with("hint", 3).retry_after(7);
        let stored = serde_json::to_string(&r).unwrap();
        let back: Refusal = serde_json::from_str(&stored).unwrap();
        assert_eq!(back.problem().slug, "malformed");
        assert_eq!(back.errors(), r.errors());
        assert_eq!(back.extra()["hint"], 3);
        assert_eq!(back.retry_after_seconds(), Some(7));
    }
}
