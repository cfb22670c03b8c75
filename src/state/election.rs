//! Watching who leads.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::kernel::Refusal;
use crate::kernel::web::{Ask, Caller};

use super::State;
use super::locks::Hold;

/// How often an observer hears that this is still so, and its permission is looked at again.
const BOOKMARK: Duration = Duration::from_secs(5);

/// What an observer hears.
pub(super) enum Heard {
    /// Who leads now, or nobody.
    Leader(Option<Hold>),
    /// Nothing else up to this index.
    Bookmark(i64),
    /// It ends here, and why.
    End(Refusal),
}

/// One who watches an election.
pub(super) struct Observed {
    state: State,
    caller: Caller,
    name: String,
    news: watch::Receiver<()>,
    /// The token and the words of the leader that was told; `None` before anything was.
    told: Option<Option<(i64, Option<Vec<u8>>)>>,
    bookmark: Interval,
    ended: bool,
}

impl State {
    pub(super) async fn observe(&self, caller: &Caller, name: String) -> Result<Observed, Refusal> {
        self.ledger.permit(caller, &[Ask::new("state:lock-read", "Lock", name.clone())]).await?;
        let news = self.hub.locks.lock(&name);
        let mut bookmark = interval(BOOKMARK);
        bookmark.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (state, caller) = (self.clone(), caller.clone());
        Ok(Observed { state, caller, name, news, told: None, bookmark, ended: false })
    }
}

impl Observed {
    /// What comes next; `None` after the end.
    pub async fn next(&mut self) -> Option<Heard> {
        if self.ended {
            return None;
        }
        match self.step().await {
            Ok(heard) => Some(heard),
            Err(refusal) => {
                self.ended = true;
                Some(Heard::End(refusal))
            }
        }
    }

    async fn step(&mut self) -> Result<Heard, Refusal> {
        let closing = self.state.ledger.closing();
        loop {
            self.news.mark_unchanged();
            let reflected = self.state.ledger.index();
            let leader = self.state.lock_stands(&self.name).await?.0.pop();
            let now = leader.as_ref().map(|h| (h.token, h.value.clone()));
            if self.told.as_ref() != Some(&now) {
                self.told = Some(now);
                return Ok(Heard::Leader(leader));
            }
            tokio::select! {
                () = closing.cancelled() => return Err(Refusal::unavailable("the daemon is stopping; observe again")),
                _ = self.news.changed() => {}
                _ = self.bookmark.tick() => {
                    let ask = Ask::new("state:lock-read", "Lock", self.name.clone());
                    self.state.ledger.permit(&self.caller, &[ask]).await?;
                    return Ok(Heard::Bookmark(reflected));
                }
            }
        }
    }
}
