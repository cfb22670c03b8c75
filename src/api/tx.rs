//! `POST /v1/tx`: several changes, of any rooms, as one.

use std::fmt;

use axum::extract::State;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::openapi::schema::AdditionalProperties;
use utoipa::openapi::{ObjectBuilder, OneOfBuilder, OpenApi, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Json};
use crate::ledger::Ledger;
use crate::ledger::verbs::Verbs;

pub(super) fn routes(ledger: Ledger) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(tx)).with_state(ledger)
}

/// Changes that are made at one index, all or none
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Tx)]
struct Request {
    /// In order; each sees what those before it did
    #[schema(min_items = 1, max_items = 128)]
    operations: Vec<Named>,
}

/// What it came to
#[derive(Serialize, ToSchema)]
#[schema(as = TxAnswered)]
struct Answered {
    /// The index of all its changes
    index: i64,
    /// Of each operation, in order, what its own route answers
    #[schema(value_type = Vec<Object>)]
    results: Vec<Value>,
}

/// An operation: one member, named by the action it is decided as, with its fields.
struct Named(String, Box<RawValue>);

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct One;
        impl<'de> Visitor<'de> for One {
            type Value = Named;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one member, the operation")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named, A::Error> {
                let one = map.next_entry()?.map(|(name, fields)| Named(name, fields));
                let one = one.ok_or_else(|| A::Error::custom("an operation has one member, this one has none"))?;
                match map.next_key::<String>()? {
                    None => Ok(one),
                    Some(more) => Err(A::Error::custom(format!("an operation has one member: {more:?} is another"))),
                }
            }
        }
        deserializer.deserialize_map(One)
    }
}

// What operations there are is known once the rooms have registered them: `describe` puts it into the document.
impl PartialSchema for Named {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().into()
    }
}

impl ToSchema for Named {
    fn name() -> std::borrow::Cow<'static, str> {
        OPERATION.into()
    }
}

const OPERATION: &str = "TxOperation";

/// Says in the document which operations there are.
pub(super) fn describe(document: &mut OpenApi, verbs: Option<&Verbs>) {
    let (Some(components), Some(verbs)) = (document.components.as_mut(), verbs) else { return };
    let mut any = OneOfBuilder::new().description(Some("One operation, named by the action it is decided as"));
    for verb in verbs.iter() {
        let (fields, others) = verb.schema();
        let one = ObjectBuilder::new()
            .property(verb.name(), fields.clone())
            .required(verb.name())
            .additional_properties(Some(AdditionalProperties::FreeForm(false)));
        any = any.item(one);
        components.schemas.extend(others.iter().cloned());
    }
    components.schemas.insert(OPERATION.to_owned(), Schema::from(any.build()).into());
}

/// Make several changes, of any rooms, as one: all at one index and with one entry, or none. A refusal is what the operation's
/// own route would answer, with a pointer to the operation
#[utoipa::path(post, path = "/v1/tx", tag = "daemon", request_body = Request,
    responses((status = 200, body = Answered), (status = 400), (status = 403, description = "One of them is denied"),
              (status = 404, description = "One of them names what is not there"), (status = 409, description = "One of them cannot be now"),
              (status = 410, description = "One of them names what is no more"), (status = 412, description = "A condition of one of them does not hold")))]
async fn tx(
    State(ledger): State<Ledger>,
    caller: Caller,
    Json(request): Json<Request>,
) -> Result<Answer<Answered>, Refusal> {
    let verbs = ledger.verbs().ok_or_else(|| Refusal::unavailable("the daemon is starting"))?;
    let sent: Vec<_> = request.operations.into_iter().map(|Named(name, fields)| (name, fields)).collect();
    let operations = verbs.read(&caller, &sent).await?;
    let done = ledger.together(&caller, operations).await?;
    let answered = Answered { index: done.value.index, results: done.value.results };
    Ok(Answer::ok(answered).at(done.index))
}
