//! The nouns of the room: instances of services, topics, groups, messages.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::kernel::probe::Probe;
use crate::kernel::web::faulty;
use crate::kernel::{Fault, Refusal, ids};

/// Seconds that a message may be held back, at most.
pub(super) const DELAY_MOST: f64 = 2_592_000.0;

/// What registers an instance.
#[derive(Clone, Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Registration {
    /// Where it is reached, such as `http://10.0.0.7:9000`
    pub address: String,
    /// Its share of the load, 0-1000
    #[serde(default = "one")]
    pub weight: i64,
    /// Which release it is
    #[serde(default)]
    pub version: Option<String>,
    /// Anything else, as text
    #[serde(default)]
    #[schema(value_type = Object)]
    pub meta: Map<String, Value>,
    /// How its health is looked at; without any it is fit as long as it beats
    #[serde(default)]
    pub checks: Vec<Probe>,
    /// Seconds without a heartbeat after which it is gone, 1-86,400
    pub ttl: f64,
}

fn one() -> i64 {
    1
}

impl Registration {
    /// Its faults, all of them.
    ///
    /// # Errors
    /// 400.
    pub fn check(&self) -> Result<(), Refusal> {
        let mut faults = Vec::new();
        if let Some(fault) = ids::id_fault(&self.address) {
            faults.push(Fault::new("/address", fault));
        }
        if !(0..=1000).contains(&self.weight) {
            faults.push(Fault::new("/weight", "weight is from 0 to 1000"));
        }
        if !(1.0..=86_400.0).contains(&self.ttl) {
            faults.push(Fault::new("/ttl", "ttl is from 1 to 86400 seconds"));
        }
        if self.meta.len() > 64 {
            faults.push(Fault::new("/meta", "meta has at most 64 members"));
        }
        for (name, _) in self.meta.iter().filter(|(_, v)| !v.is_string()) {
            faults.push(Fault::new(format!("/meta/{}", name.replace('~', "~0").replace('/', "~1")), "text is wanted"));
        }
        if self.checks.len() > 16 {
            faults.push(Fault::new("/checks", "an instance has at most 16 checks"));
        }
        self.checks.iter().enumerate().for_each(|(i, c)| c.faults(&format!("/checks/{i}"), &mut faults));
        faulty(faults).map_or(Ok(()), Err)
    }

    /// Its time to live in milliseconds.
    #[must_use]
    pub fn ttl_ms(&self) -> i64 {
        (self.ttl * 1000.0) as i64
    }
}

/// How an instance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// Fit to be called.
    Passing,
    /// Not to be called.
    Critical,
}

/// An instance of a service.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Instance {
    /// The service.
    pub service: String,
    /// The instance.
    pub id: String,
    /// As it was registered.
    #[serde(flatten)]
    pub registration: Registration,
    /// How it is.
    pub status: Fitness,
    /// Why.
    pub why: String,
    /// Index of its last visible change.
    pub index: i64,
    /// Index of its registration.
    pub created_index: i64,
}

/// A service in the list.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// How many instances.
    pub instances: i64,
    /// How many of them are fit to be called.
    pub passing: i64,
}

/// What a heartbeat answers.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Beaten {
    /// The service.
    pub service: String,
    /// The instance.
    pub id: String,
    /// Seconds it lives on without another.
    pub ttl: f64,
}

/// What makes or changes a topic.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TopicBody {
    /// Seconds a message is kept, 1-31,536,000
    pub retention: f64,
}

/// A topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// Seconds a message is kept.
    pub retention: f64,
    /// Index of its last change.
    pub index: i64,
    /// Index at which it was made.
    pub created_index: i64,
}

/// What makes or changes a group.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupBody {
    /// How often a message is given before it is dead, 1-1000; 5 without it
    #[serde(default)]
    pub max_attempts: Option<i64>,
    /// Seconds after which a message that was not acknowledged is given again, 0.1-43,200; 30 without it
    #[serde(default)]
    pub ack_wait: Option<f64>,
    /// Seconds a refused message waits the first time, twice as long each time after, 0-3,600; 1 without it
    #[serde(default)]
    pub backoff: Option<f64>,
    /// Topic that messages go to when they are dead; without it they stay with the group
    #[serde(default)]
    pub dead_letter: Option<String>,
}

/// A group of consumers of a topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Group {
    /// The topic.
    pub topic: String,
    /// Its name.
    pub name: String,
    /// How often a message is given before it is dead.
    pub max_attempts: i64,
    /// Seconds after which a message is given again.
    pub ack_wait: f64,
    /// Seconds a refused message waits the first time.
    pub backoff: f64,
    /// Where dead messages go.
    pub dead_letter: Option<String>,
    /// Messages it was given and has not acknowledged, or that wait for their time.
    pub outstanding: i64,
    /// Messages that are dead and stayed.
    pub dead: i64,
    /// Index of its last change.
    pub index: i64,
    /// Index at which it was made.
    pub created_index: i64,
}

/// Where a published message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Published {
    /// Its entry.
    pub index: i64,
    /// Its place among the messages of that entry.
    pub position: i64,
    /// The message.
    pub id: Uuid,
    /// Whether it had been published before, by source and id.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub duplicate: bool,
}

/// A message as a consumer gets it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Message {
    /// By which it is acknowledged.
    pub id: Uuid,
    /// Index at which it was published.
    pub index: i64,
    /// Its place among the messages of that entry.
    pub position: i64,
    /// 1 the first time.
    pub attempt: i64,
    /// The CloudEvent, as it was published.
    #[schema(value_type = Object)]
    pub event: Box<RawValue>,
}
