//! What of the room can be made together with changes of others.

use std::future::ready;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use sqlx::PgConnection;

use crate::kernel::probe::Probe;
use crate::kernel::web::{Ask, Caller, faulty};
use crate::kernel::{BoxFuture, Fault, Refusal, cloudevents, ids};
use crate::ledger::hot::{At, Decided, Fact, HotKey};
use crate::ledger::verbs::{Decides, Operation, Step, Verb, shown};
use crate::ledger::{Failure, Tx};

use super::Nexus;
use super::model::{DELAY_MOST, Instance, Registration};
use super::publish::Publish;
use super::services::Register;
use super::store::services as store;

/// Publishes a message
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxPublish)]
struct PublishBody {
    topic: String,
    /// A CloudEvent in its JSON form
    #[schema(value_type = Object)]
    event: Box<RawValue>,
    /// Seconds before it is delivered, 0-2,592,000
    #[serde(default)]
    delay: Option<f64>,
}

/// Registers an instance of a service, or registers it anew
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxRegister)]
struct RegisterBody {
    service: String,
    instance: String,
    /// Where it is reached, such as `http://10.0.0.7:9000`
    address: String,
    /// Its share of the load, 0-1000; 1 without it
    #[serde(default)]
    weight: Option<i64>,
    /// Which release it is
    #[serde(default)]
    version: Option<String>,
    /// Anything else, as text
    #[serde(default)]
    #[schema(value_type = Object)]
    meta: Map<String, Value>,
    /// How its health is looked at; without any it is fit as long as it beats
    #[serde(default)]
    checks: Vec<Probe>,
    /// Seconds without a heartbeat after which it is gone, 1-86,400
    ttl: f64,
}

/// Registers an instance.
struct RegisterStep {
    register: Register,
    /// As it will be.
    instance: Option<Instance>,
}

impl Step for RegisterStep {
    fn fact(&self) -> Option<HotKey> {
        None
    }

    fn decide<'a>(
        &'a mut self,
        conn: &'a mut PgConnection,
        _: Option<&'a Fact>,
        at: At,
    ) -> BoxFuture<'a, Result<Decided<Value>, Failure>> {
        Box::pin(async move {
            let (registered, entry) = self.register.decided(conn, at.index).await?;
            self.instance = Some(registered.instance.clone());
            Ok(shown(Decided { value: registered.instance, entry, after: None, row: None })?)
        })
    }

    fn write<'a>(&'a mut self, tx: &'a mut Tx<'_>) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            match self.instance.take() {
                Some(instance) => store::put(tx.write(), &instance, &self.register.owner, "register").await,
                None => Ok(()),
            }
        })
    }
}

fn named(names: &[(&str, &str)]) -> Result<(), Refusal> {
    let fault = |(at, name): &(&str, &str)| Some(Fault::new(*at, ids::name_fault(name)?));
    faulty(names.iter().filter_map(fault).collect()).map_or(Ok(()), Err)
}

impl Nexus {
    /// Its verbs.
    #[must_use]
    pub fn verbs(&self) -> Vec<Verb> {
        let (publishing, registering) = (self.clone(), self.clone());
        vec![
            Verb::new("nexus:publish", move |_, body| ready(publishing.publish_step(body))),
            Verb::new("nexus:register", move |caller, body| ready(registering.register_step(&caller, body))),
        ]
    }

    fn publish_step(&self, body: PublishBody) -> Result<Operation, Refusal> {
        let PublishBody { topic, event, delay } = body;
        named(&[("/topic", &topic)])?;
        let delay = delay.unwrap_or(0.0);
        if !(0.0..=DELAY_MOST).contains(&delay) {
            return Err(Refusal::malformed("/delay", "delay is from 0 to 2592000 seconds"));
        }
        let event = cloudevents::structured(event.get().as_bytes(), "/event")?;
        let ask = Ask::new("nexus:publish", "Topic", topic.clone());
        let (id, delay_ms) = (ids::new_id(self.clock.now()), (delay * 1000.0) as i64);
        let metrics = self.metrics.clone();
        let count = move |published: &Value| {
            let duplicate = published["duplicate"] == true;
            metrics.messages(if duplicate { "duplicate" } else { "published" }, 1);
        };
        Ok(Operation::new(vec![ask], Decides(Publish { topic, id, event, delay_ms })).done(count))
    }

    fn register_step(&self, caller: &Caller, body: RegisterBody) -> Result<Operation, Refusal> {
        let RegisterBody { service, instance: id, address, weight, version, meta, checks, ttl } = body;
        named(&[("/service", &service), ("/instance", &id)])?;
        let registration = Registration { address, weight: weight.unwrap_or(1), version, meta, checks, ttl };
        registration.check()?;
        let ask = Ask::new("nexus:register", "Service", service.clone());
        let once = format!("instance {id} of {service}");
        let register = Register { service, id, registration, owner: caller.actor().to_owned() };
        let metrics = self.metrics.clone();
        let step = RegisterStep { register, instance: None };
        Ok(Operation::new(vec![ask], step).once(once).done(move |_| metrics.did("register", 1)))
    }
}
