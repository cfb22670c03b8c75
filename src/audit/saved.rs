//! Searches that are saved, and alerts on them: more than so many entries that fit within so long, all together or of each
//! actor, action or resource. An alert is an entry with a signal; health opens the incident.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Refusal, Timestamp, problem};
use crate::ledger::{Claim, Command, Committed, Entry, Failure, Tx};

use super::model::{Filter, Found, Stored};
use super::store::searches::{self as rows, Row};
use super::{Audit, store};

/// One daemon at a time looks for alerts.
const CLAIM: Duration = Duration::from_secs(15);
/// Entries read at a time.
const PAGE: i64 = 1000;
/// How long nothing may be heard before it looks all the same.
const POLL: Duration = Duration::from_secs(2);
/// Saved searches there may be.
const MOST: i64 = 1000;

/// A search that is saved.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = SavedSearch)]
pub struct Saved {
    /// Who did it
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<String>,
    /// `state`, `token`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<String>,
    /// `state:put`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Beginning of the resource
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
    /// `ok`, `denied` or `failed`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// Words of the details
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// When to open an incident
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert: Option<Alert>,
}

/// When a saved search opens an incident.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = SearchAlert)]
pub struct Alert {
    /// So many may fit; one more raises it
    pub more_than: u32,
    /// Within so many seconds
    pub within: f64,
    /// Counted for each `actor`, `action` or `resource`; without it, all together
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<By>,
    /// Of the incident
    #[serde(default)]
    pub severity: Severity,
}

/// What an alert counts by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = SearchAlertBy)]
pub enum By {
    /// Who did it
    Actor,
    /// What was done
    Action,
    /// To what
    Resource,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = SearchAlertSeverity)]
pub enum Severity {
    /// Worth knowing
    Info,
    /// Worth a look
    #[default]
    Warning,
    /// Worth waking somebody
    Critical,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

impl Audit {
    /// Saves a search.
    ///
    /// # Errors
    /// 403 when denied, 409 when there are too many.
    pub async fn save(&self, caller: &Caller, name: String, saved: &Saved) -> Result<Committed<bool>, Refusal> {
        let definition = serde_json::to_vec(saved).map_err(Refusal::internal)?;
        self.ledger
            .write(caller, &[Ask::new("audit:search-put", "Search", name.clone())], Put { name, definition })
            .await
    }

    /// Forgets a saved search.
    ///
    /// # Errors
    /// 404 when there is none.
    pub async fn forget(&self, caller: &Caller, name: String) -> Result<Committed<()>, Refusal> {
        self.ledger.write(caller, &[Ask::new("audit:search-delete", "Search", name.clone())], Remove(name)).await
    }

    /// A saved search, and the index that put it.
    ///
    /// # Errors
    /// 404 when there is none.
    pub async fn saved(&self, caller: &Caller, name: &str) -> Result<(Saved, i64), Refusal> {
        self.ledger.permit(caller, &[Ask::new("audit:search-read", "Search", name)]).await?;
        let mut conn = self.connection().await?;
        let row = rows::one(&mut conn, name).await.map_err(|e| self.store.refusal(e))?;
        let row = row.ok_or_else(|| Refusal::not_found(format!("saved search {name}")))?;
        Ok((serde_json::from_slice(&row.definition).map_err(Refusal::internal)?, row.index))
    }

    /// Saved searches in the order of their names.
    ///
    /// # Errors
    /// 403 when denied.
    pub async fn all_saved(
        &self,
        caller: &Caller,
        after: &str,
        limit: usize,
    ) -> Result<(Vec<(String, Saved, i64)>, Option<String>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("audit:search-read", "Search", "")]).await?;
        let mut conn = self.connection().await?;
        let take = i64::try_from(limit).unwrap_or(1000) + 1;
        let mut found = rows::list(&mut conn, after, take).await.map_err(|e| self.store.refusal(e))?;
        let more = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| more).map(|r| r.name.clone());
        let read = |r: Row| Some((r.name, serde_json::from_slice(&r.definition).ok()?, r.index));
        Ok((found.into_iter().filter_map(read).collect(), next))
    }
}

struct Put {
    name: String,
    definition: Vec<u8>,
}

impl Command for Put {
    type Out = bool;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(bool, Entry), Failure> {
        let new = rows::one(tx.read(), &self.name).await?.is_none();
        if new && rows::list(tx.read(), "", MOST).await?.len() as i64 == MOST {
            return Err(
                Refusal::new(&problem::CONFLICT, format!("there are {MOST} saved searches; forget some")).into()
            );
        }
        let row = Row { name: self.name.clone(), definition: self.definition.clone(), index: tx.index() };
        rows::put(tx.write(), &row).await?;
        let definition: serde_json::Value = serde_json::from_slice(&self.definition).unwrap_or_default();
        // As text: a number of seconds may have a fraction, which canonical JSON of ours does not.
        Ok((
            new,
            Entry::ok("audit:search-put", format!("search/{}", self.name)).change("definition", definition.to_string()),
        ))
    }
}

struct Remove(String);

impl Command for Remove {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        if rows::one(tx.read(), &self.0).await?.is_none() {
            return Err(Refusal::not_found(format!("saved search {}", self.0)).into());
        }
        rows::remove(tx.write(), &self.0).await?;
        Ok(((), Entry::ok("audit:search-delete", format!("search/{}", self.0))))
    }
}

/// Raises an alert, once in its time for its group.
struct Raise {
    name: String,
    group: String,
    within: i64,
    severity: Severity,
    reason: String,
}

impl Command for Raise {
    type Out = bool;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(bool, Entry), Failure> {
        let now = tx.now();
        let last = rows::raised(tx.read(), &self.name, &self.group).await?;
        if last.is_some_and(|t| now.millis() - t < self.within) || rows::one(tx.read(), &self.name).await?.is_none() {
            return Err(Refusal::new(&problem::CONFLICT, "it was raised a short while ago").into());
        }
        rows::raise(tx.write(), &self.name, &self.group, now).await?;
        let fingerprint = format!("audit/alert/{}/{}", self.name, self.group);
        let entry = Entry::ok("audit:alert", format!("search/{}", self.name))
            .reason(self.reason.clone())
            .change("group", self.group.clone())
            .signal(self.severity.as_str(), fingerprint);
        Ok((true, entry))
    }
}

/// What is watched for, and what was seen of it.
struct Watch {
    audit: Audit,
    claim: Claim,
    /// All up to here was looked at; `None`: begin anew.
    at: Option<i64>,
    searches: Vec<(String, Filter, Alert)>,
    /// Times of entries that fitted, milliseconds, by search and group.
    seen: HashMap<(usize, String), VecDeque<i64>>,
}

/// Starts looking for alerts.
pub(super) fn start(audit: &Audit, tasks: &Supervisor) {
    let claim = audit.ledger.claim("audit/alerts", CLAIM);
    let watch = Watch { audit: audit.clone(), claim, at: None, searches: Vec::new(), seen: HashMap::new() };
    let watch = Arc::new(Mutex::new(watch));
    let index = audit.ledger.watch_index();
    tasks.start(Task::restarting("audit/alerts", move |stop| {
        let (watch, mut index) = (watch.clone(), index.clone());
        async move {
            let mut watch = watch.lock().await;
            loop {
                index.mark_unchanged();
                watch.round().await?;
                tokio::select! {
                    () = stop.cancelled() => { watch.claim.release().await; return Ok(()); }
                    _ = index.changed() => tokio::time::sleep(Duration::from_millis(200)).await,
                    () = tokio::time::sleep(POLL) => {}
                }
            }
        }
    }));
}

impl Watch {
    async fn round(&mut self) -> Result<(), TaskError> {
        let said = |e: Refusal| TaskError::from(e.detail().to_owned());
        if self.audit.ledger.stopped().is_some() {
            return Ok(());
        }
        if self.at.is_none() || self.searches.is_empty() {
            self.begin().await?;
        }
        // Who has nothing to look for does not hold the claim, so that a daemon alone writes no entry for it.
        if self.searches.is_empty() || !self.claim.held().await.map_err(said)? {
            self.at = None;
            return Ok(());
        }
        while let Some(at) = self.at {
            let head = self.audit.ledger.index();
            if at >= head {
                break;
            }
            let mut conn = self.audit.store.reader().acquire().await?;
            let most = PAGE.min(head - at);
            let page = store::unindexed(&mut conn, at, most).await?;
            drop(conn);
            let to = page.last().map_or(at + most, |e| e.index);
            for stored in &page {
                let found = stored.found();
                if matches!(found.action.as_str(), "audit:search-put" | "audit:search-delete") {
                    self.at = None;
                    return Ok(());
                }
                self.look(stored, &found).await;
            }
            self.at = Some(to);
        }
        Ok(())
    }

    /// Reads what is to be looked for, and goes back as far as the longest of them looks.
    async fn begin(&mut self) -> Result<(), TaskError> {
        let mut conn = self.audit.store.reader().acquire().await?;
        let head = self.audit.ledger.index();
        let rows = rows::list(&mut conn, "", MOST).await?;
        let newest = rows.iter().map(|r| r.index).max().unwrap_or(-1);
        let read = |r: Row| {
            let saved: Saved = serde_json::from_slice(&r.definition).ok()?;
            Some((r.name, saved.filter().ok()?, saved.alert?))
        };
        self.searches = rows.into_iter().filter_map(read).collect();
        self.seen.clear();
        if self.searches.is_empty() {
            self.at = Some(head);
            return Ok(());
        }
        let longest = self.searches.iter().map(|s| s.2.millis()).max().unwrap_or(0);
        let since = Timestamp::from_millis(self.audit.clock.now().millis() - longest);
        let from = store::search::not_before(&mut conn, since).await?;
        // Not before the newest of them: what puts one is not looked at again.
        self.at = Some((from - 1).max(newest).min(head));
        Ok(())
    }

    async fn look(&mut self, stored: &Stored, found: &Found) {
        // An alert is no reason for another.
        if found.action == "audit:alert" {
            return;
        }
        for (i, (name, filter, alert)) in self.searches.iter().enumerate() {
            if !filter.fits(found) || !filter.says(stored.details.as_deref()) {
                continue;
            }
            let group = match alert.by {
                None => String::new(),
                Some(By::Actor) => found.actor.clone(),
                Some(By::Action) => found.action.clone(),
                Some(By::Resource) => found.resource.clone(),
            };
            let times = self.seen.entry((i, group.clone())).or_default();
            let now = found.time.millis();
            times.push_back(now);
            while times.front().is_some_and(|t| now - t >= alert.millis()) {
                times.pop_front();
            }
            if times.len() <= alert.more_than as usize {
                continue;
            }
            let of = if group.is_empty() { String::new() } else { format!(" of {group}") };
            let reason = format!(
                "{}: {} entries{of} within {} s, more than {}",
                name,
                times.len(),
                alert.within,
                alert.more_than
            );
            // Begun anew, so that it is not told for each that follows.
            times.clear();
            let (name, within, severity) = (name.clone(), alert.millis(), alert.severity);
            let raise = Raise { name, group, within, severity, reason };
            match self.audit.ledger.write(&Caller::daemon("alerts"), &[], raise).await {
                Ok(_) => self.audit.metrics.alerts.inc(),
                Err(e) if e.problem() == &problem::CONFLICT => {}
                Err(e) => tracing::warn!(error = %e, "an alert could not be raised"),
            }
        }
    }
}

impl Alert {
    /// Its time, in milliseconds.
    fn millis(&self) -> i64 {
        (self.within * 1000.0) as i64
    }
}
