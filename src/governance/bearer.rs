//! Entities from tokens: a question about whoever bears an access token of this daemon.
//!
//! A client is asked about with the scopes it is registered with. Where the caller was handed the client's token
//! (`subject.properties.token`), that is looked at instead: it must be good now, and of this client, and its scopes count, which may
//! be fewer. The token itself is a secret: what is kept of the question is which token it was and what it said.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::kernel::Refusal;
use crate::kernel::web::Identity;

use super::authzen::Evaluation;

/// Who looks at access tokens: the token room.
pub trait Bearers: Send + Sync {
    /// Whose it is and what it says, if it is good now.
    fn bearer(&self, token: &str) -> Option<Arc<Identity>>;
}

const TOKEN: &str = "token";
const AT: &str = "/subject/properties/token";

/// Takes the token out of a question, and what it says into it.
///
/// # Errors
/// 400 when it is not good (any more), or another's.
pub(super) fn vouched(mut e: Evaluation, bearers: Option<&Arc<dyn Bearers>>) -> Result<Evaluation, Refusal> {
    if e.subject.name.kind != "Sop::Client" || !e.subject.properties.contains_key(TOKEN) {
        return Ok(e);
    }
    let Some(Value::String(token)) = e.subject.properties.remove(TOKEN) else {
        return Err(Refusal::malformed(AT, "an access token is a string"));
    };
    let bearers = bearers.ok_or_else(|| Refusal::unavailable("tokens cannot be looked at yet"))?;
    let who = bearers.bearer(&token).ok_or_else(|| Refusal::malformed(AT, "the token is not good (any more)"))?;
    if who.principal != e.subject.name {
        return Err(Refusal::malformed(AT, "the token is not of this client"));
    }
    e.context.insert("scopes".into(), json!(who.scopes));
    let tokens = who.credential.as_ref().map(|c| c.tokens.clone()).unwrap_or_default();
    let mut asked: Value = serde_json::from_str(&e.asked).map_err(Refusal::internal)?;
    if let Some(properties) = asked.pointer_mut("/subject/properties").and_then(Value::as_object_mut) {
        properties.remove(TOKEN);
    }
    if let Some(whole) = asked.as_object_mut() {
        whole.insert("context".into(), Value::Object(e.context.clone()));
        whole.insert("tokens".into(), json!(tokens));
    }
    e.asked = asked.to_string();
    Ok(e)
}
