//! What is shown, and what is watched.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::Method;
use tokio::sync::Notify;

use crate::cli::client::Client;
use crate::cli::say;
use crate::kernel::supervisor::detach;

/// Shows what happens: plain lines, with colour on a terminal; nothing where JSON is wanted.
pub(super) struct Stage {
    silent: bool,
    colour: bool,
}

impl Stage {
    pub fn new(silent: bool) -> Self {
        Self { silent, colour: std::io::stdout().is_terminal() }
    }

    pub fn line(&self, clock: &str, who: &str, what: &str) {
        if self.silent {
            return;
        }
        if self.colour {
            say(format!("\u{1b}[2m{clock:>5}\u{1b}[0m  \u{1b}[1;36m{who:<4}\u{1b}[0m {what}"));
        } else {
            say(format!("{clock:>5}  {who:<4} {what}"));
        }
    }
}

/// Watches server-sent events and remembers their names.
pub(super) struct Watcher {
    seen: Arc<Mutex<Vec<String>>>,
    news: Arc<Notify>,
}

impl Watcher {
    pub async fn start(client: &Client, path: &str) -> anyhow::Result<Self> {
        let answer = client.send(client.request(Method::GET, path)).await?;
        let (seen, news) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
        let (s, n) = (seen.clone(), news.clone());
        detach(async move {
            let mut stream = answer.bytes_stream();
            let mut rest = String::new();
            while let Some(Ok(part)) = stream.next().await {
                rest.push_str(&String::from_utf8_lossy(&part));
                while let Some((line, after)) = rest.split_once('\n') {
                    if let Some(name) = line.strip_prefix("event: ") {
                        s.lock().unwrap_or_else(PoisonError::into_inner).push(name.to_owned());
                        n.notify_waiters();
                    }
                    rest = after.to_owned();
                }
            }
        });
        Ok(Self { seen, news })
    }

    /// How many events of that name there were.
    pub fn seen(&self, name: &str) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|n| *n == name).count()
    }

    /// Waits for the first of that name.
    pub async fn until(&self, name: &str, within: Duration) -> anyhow::Result<()> {
        let wait = async {
            loop {
                let news = self.news.notified();
                if self.seen(name) > 0 {
                    return;
                }
                news.await;
            }
        };
        let heard = tokio::time::timeout(within, wait).await;
        heard.map_err(|_| anyhow::anyhow!("the watch told of no {name} within {} s", within.as_secs()))
    }
}
