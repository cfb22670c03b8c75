//! Cursors of lists: opaque to callers, a value of ours in base64url.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::kernel::{Refusal, crypto};

/// A cursor for the next page.
pub fn encode(position: &impl Serialize) -> String {
    crypto::base64url(serde_json::to_vec(position).unwrap_or_default())
}

/// Reads a cursor.
///
/// # Errors
/// 400 when it is not one of this list's.
pub fn decode<T: DeserializeOwned>(text: &str) -> Result<T, Refusal> {
    let position = crypto::from_base64url(text).and_then(|bytes| serde_json::from_slice(&bytes).ok());
    position.ok_or_else(|| Refusal::malformed("?after", "`after` is the `next` of the page before, as it was given"))
}
