//! Who is to hear that something happened: watches of services and waiting consumers, on this daemon.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use sqlx::PgConnection;
use tokio::sync::watch;

use crate::kernel::BoxFuture;
use crate::ledger::{Projection, Touch, What};

/// The kind of touch of a service's instances; the key is the service.
pub(super) const SERVICE: &str = "service";
/// The kind of touch of a topic's messages; the key is the topic, a zero byte, and which message.
pub(super) const MESSAGE: &str = "message";
/// The kind of touch of a topic's groups: something fell due, or was given back. The key is the topic.
pub(super) const GROUP: &str = "group";

/// Tells whoever waits for a service or a topic.
#[derive(Default)]
pub struct Board(Mutex<HashMap<(&'static str, String), watch::Sender<i64>>>);

impl Board {
    /// Hears of a service's changes; the value is an index up to which there may be some.
    pub(super) fn service(&self, name: &str) -> watch::Receiver<i64> {
        self.hear(SERVICE, name)
    }

    /// Hears of a topic's messages.
    pub(super) fn topic(&self, name: &str) -> watch::Receiver<i64> {
        self.hear(MESSAGE, name)
    }

    fn hear(&self, kind: &'static str, name: &str) -> watch::Receiver<i64> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry((kind, name.to_owned())).or_insert_with(|| watch::channel(-1).0).subscribe()
    }
}

impl Projection for Board {
    fn name(&self) -> &'static str {
        "nexus/board"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &[SERVICE, MESSAGE, GROUP]
    }

    fn load<'a>(&'a self, _: &'a mut PgConnection, _: i64) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async { Ok(()) })
    }

    fn advance<'a>(
        &'a self,
        _: &'a mut PgConnection,
        _: i64,
        to: i64,
        touched: &'a [(i64, Touch)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.is_empty() {
            // Whoever nobody hears any more goes.
            all.retain(|_, tell| tell.receiver_count() > 0);
            for (_, t) in touched {
                let kind = if t.kind == SERVICE { SERVICE } else { MESSAGE };
                if let Some(name) = named(t)
                    && let Some(tell) = all.get(&(kind, name))
                {
                    tell.send_replace(to);
                }
            }
        }
        Box::pin(async { Ok(()) })
    }
}

fn named(t: &Touch) -> Option<String> {
    if ![SERVICE, MESSAGE, GROUP].contains(&t.kind.as_str()) {
        return None;
    }
    let (What::Key(key) | What::Prefix(key)) = &t.what else { return None };
    let name = key.split(|b| *b == 0).next().unwrap_or_default();
    std::str::from_utf8(name).ok().map(str::to_owned)
}
