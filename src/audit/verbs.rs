//! What of the room can be made together with changes of others.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sqlx::PgConnection;

use crate::kernel::web::Caller;
use crate::kernel::{BoxFuture, Refusal, cloudevents};
use crate::ledger::hot::{At, Decided, Fact, HotKey};
use crate::ledger::verbs::{Operation, Step, Verb};
use crate::ledger::{Command as _, Failure};

use super::Audit;
use super::events::{ACTION, Keep, keeping};

/// Records an event
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxEvent)]
struct EventBody {
    /// A CloudEvent in its JSON form
    #[schema(value_type = Object)]
    event: Box<RawValue>,
}

/// Keeps one event's record, among those of its entry.
struct KeepOne {
    keep: Keep,
    id: String,
}

impl Step for KeepOne {
    fn fact(&self) -> Option<HotKey> {
        self.keep.hot()
    }

    fn decide<'a>(
        &'a mut self,
        _: &'a mut PgConnection,
        fact: Option<&'a Fact>,
        at: At,
    ) -> BoxFuture<'a, Result<Decided<Value>, Failure>> {
        Box::pin(async move {
            let Decided { entry, after, row, .. } = self.keep.decide(fact, at)?;
            let value = json!({"index": at.index, "position": at.position, "id": self.id});
            Ok(Decided { value, entry, after, row })
        })
    }
}

impl Audit {
    /// Its verbs.
    #[must_use]
    pub fn verbs(&self) -> Vec<Verb> {
        let audit = self.clone();
        vec![Verb::new(ACTION, move |caller, body: EventBody| std::future::ready(audit.event_step(&caller, &body)))]
    }

    fn event_step(&self, caller: &Caller, body: &EventBody) -> Result<Operation, Refusal> {
        let event = cloudevents::structured(body.event.get().as_bytes(), "/event")?;
        let (asks, keep) = keeping(caller, std::slice::from_ref(&event))?;
        let counted = self.metrics.events.clone();
        Ok(Operation::new(asks, KeepOne { keep, id: event.id }).done(move |_| counted.inc()))
    }
}
