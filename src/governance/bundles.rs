//! Bundles of policies and their life: draft, shadow, canary, active, retired; and the way back.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller, EntityName};
use crate::kernel::{Fault, Refusal, Timestamp, crypto, ids, problem};
use crate::ledger::{Command, Committed, Entry, Failure, Touch, Tx};

use super::cases::{self, Case};
use super::compiled::{Compiled, Source};
use super::enforce::{Enforce, SetCanary, Target};
use super::engine::Force;
use super::proposals::{self, Approved};
use super::store::bundles::{self as rows, Bundle, InForce, Text};
use super::{Governance, MADE};

/// Which part of what is in force a bundle is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = BundleScope)]
pub enum Scope {
    /// The daemon's own API
    System,
    /// What protocols bring
    #[default]
    Application,
}

impl Scope {
    const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Application => "application",
        }
    }
}

/// A bundle as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Bundle)]
pub struct Shown {
    /// Its id
    pub id: String,
    /// Which it replaces
    pub scope: String,
    /// `draft`, `validated`, `shadow`, `canary`, `active` or `retired`
    pub status: String,
    /// What its author says of it
    pub note: String,
    /// Who made it
    pub author: String,
    /// It has a schema and was held to it, strictly
    pub validated: bool,
    /// How many policies
    pub count: i32,
    /// Index at which it was made
    pub created_index: i64,
    /// When
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// Index of its last change
    pub index: i64,
    /// Index at which it last came into force
    pub activated_index: Option<i64>,
    /// Its policies, as they were given; not in lists
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policies: Option<String>,
    /// Its schema; not in lists
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Its cases; not in lists
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tests: Option<Vec<Case>>,
    /// What is worth knowing about it
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub warnings: Vec<Fault>,
}

impl Shown {
    pub(super) fn of(b: Bundle, text: Option<&Text>) -> Self {
        let read = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            id: b.id,
            scope: b.scope,
            status: b.status,
            note: b.note,
            author: b.author,
            validated: b.validated,
            count: b.count,
            created_index: b.created,
            created_at: b.time,
            index: b.index,
            activated_index: b.activated,
            policies: text.map(|t| read(&t.policies)),
            schema: text.and_then(|t| t.schema.as_deref().map(read)),
            tests: text.and_then(|t| serde_json::from_slice(t.tests.as_deref()?).ok()),
            warnings: Vec::new(),
        }
    }
}

/// What is in force.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = BundlesInForce)]
pub struct Ruling {
    /// Since which index
    pub index: i64,
    /// The system bundle
    pub system: String,
    /// The application's
    pub application: Option<String>,
    /// The one that decides for some subjects
    pub canary: Option<String>,
    /// For how many of a hundred
    pub percent: f64,
    /// It stops when so many of a hundred of its decisions deny what the active bundle permits
    pub stop_at: f64,
}

impl From<InForce> for Ruling {
    fn from(r: InForce) -> Self {
        let InForce { index, system, application, canary, percent, stop_at } = r;
        Self { index, system, application, canary, percent, stop_at }
    }
}

/// A bundle that does not hold: every fault, with line and column.
pub(super) fn unfit(faults: Vec<Fault>) -> Refusal {
    let place = |f: &Fault| match (f.line, f.column) {
        (Some(line), Some(column)) => format!("{}, line {line}, column {column}: {}", f.pointer, f.detail),
        _ => format!("{}: {}", f.pointer, f.detail),
    };
    let first = faults.first().map(place).unwrap_or_default();
    Refusal::new(&problem::UNPROCESSABLE, first).with_faults(faults)
}

/// A text, or Cedar's JSON as it stands in a body.
pub(super) fn text_of(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

impl Governance {
    /// Makes a draft.
    pub(super) async fn create_bundle(
        &self,
        caller: &Caller,
        source: Source,
        scope: Scope,
        note: String,
        tests: Vec<Case>,
    ) -> Result<Committed<Shown>, Refusal> {
        tokio::task::block_in_place(|| cases::check(&tests, "/tests", self.rules.settings.cases))?;
        let tests = if tests.is_empty() { None } else { Some(serde_json::to_vec(&tests).map_err(Refusal::internal)?) };
        let ask = Ask::new("governance:bundle-create", "Bundle", scope.as_str());
        self.ledger.permit(caller, std::slice::from_ref(&ask)).await?;
        let id = ids::new_id(self.rules.clock.now()).to_string();
        let made = tokio::task::block_in_place(|| Compiled::new(&id, &source, scope == Scope::System));
        let bundle = Arc::new(made.map_err(unfit)?);
        let schema = source.schema.map(String::into_bytes);
        let text = Text { policies: source.policies.into_bytes(), schema, tests };
        let (validated, count) = (bundle.validated, i32::try_from(bundle.len()).unwrap_or(i32::MAX));
        let warnings = bundle.warnings.clone();
        self.rules.snapshot.library().keep(bundle);
        let create = Create {
            id,
            scope: scope.as_str(),
            note,
            author: caller.actor().to_owned(),
            validated,
            count,
            shipped: None,
            text,
        };
        let mut done = self.ledger.write(caller, &[ask], create).await?;
        done.value.warnings = warnings;
        Ok(done)
    }

    /// One bundle, with its text; as it was at an index, if one is given.
    pub(super) async fn bundle(&self, caller: &Caller, id: &str) -> Result<Shown, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:bundle-read", "Bundle", id)]).await?;
        let mut conn = self.connection().await?;
        let row = rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        let text = rows::text(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        let row = row.ok_or_else(|| Refusal::not_found(format!("bundle {id}")))?;
        Ok(Shown::of(row, text.as_ref()))
    }

    /// Bundles, newest first.
    pub(super) async fn bundles(
        &self,
        caller: &Caller,
        status: Option<&str>,
        before: i64,
        limit: usize,
    ) -> Result<Vec<Shown>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:bundle-read", "Bundle", "")]).await?;
        let mut conn = self.connection().await?;
        let limit = i64::try_from(limit).unwrap_or(1000);
        let found = rows::page(&mut conn, before, status, limit).await.map_err(|e| self.store.refusal(e))?;
        Ok(found.into_iter().map(|b| Shown::of(b, None)).collect())
    }

    /// What is in force, or was at an index.
    pub(super) async fn in_force(&self, caller: &Caller, at: Option<i64>) -> Result<Ruling, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:bundle-read", "Bundle", "active")]).await?;
        let head = self.ledger.index();
        if at.is_some_and(|at| at > head) {
            return Err(Refusal::new(&problem::BEYOND_HEAD, format!("the newest index is {head}")));
        }
        let mut conn = self.connection().await?;
        let found = rows::in_force_at(&mut conn, at.unwrap_or(i64::MAX)).await.map_err(|e| self.store.refusal(e))?;
        found.map(Ruling::from).ok_or_else(|| Refusal::not_found("bundle in force at that index"))
    }

    /// The bundle, compiled here.
    pub(super) async fn open(&self, id: &str) -> Result<(Bundle, Arc<Compiled>), Refusal> {
        let mut conn = self.connection().await?;
        let row = rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        let row = row.ok_or_else(|| Refusal::not_found(format!("bundle {id}")))?;
        let library = self.rules.snapshot.library();
        let found = library.find(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        // Not while a connection is held that others wait for.
        drop(conn);
        Ok((row, library.compiled(found).map_err(|e| self.store.refusal(e))?))
    }

    /// Brings a bundle into force, if the policy lets the caller: by default once others have approved.
    pub(super) async fn activate(&self, caller: &Caller, id: &str, force: bool) -> Result<Committed<Ruling>, Refusal> {
        let (row, compiled) = self.open(id).await?;
        let ask = Ask::new("governance:activate", "Bundle", id);
        let change = proposals::change_of("governance:activate", id, b"");
        let (ask, approved) = self.approved(caller, ask, &change).await?;
        self.ledger.permit(caller, std::slice::from_ref(&ask)).await?;
        self.no_lock_out(caller, &row.scope, &compiled, force)?;
        let activate = Enforce {
            to: Target::Bundle(id.to_owned()),
            approved,
            reason: None,
            actor: caller.actor().to_owned(),
            forced: force,
        };
        self.ledger.write(caller, &[ask], activate).await
    }

    /// Goes back to a bundle that was in force before, at once.
    pub(super) async fn rollback(
        &self,
        caller: &Caller,
        to: Option<String>,
        reason: String,
    ) -> Result<Committed<Ruling>, Refusal> {
        let ask = Ask::new("governance:rollback", "Bundle", to.as_deref().unwrap_or("previous"));
        self.ledger.permit(caller, std::slice::from_ref(&ask)).await?;
        if let Some(id) = &to {
            let (row, _) = self.open(id).await?;
            if row.activated.is_none() {
                let detail = format!("bundle {id} was never in force: it has to be approved and activated");
                return Err(Refusal::new(&problem::CONFLICT, detail));
            }
        }
        let to = to.map_or(Target::Previous, Target::Bundle);
        let actor = caller.actor().to_owned();
        let back = Enforce { to, approved: Approved::none(), reason: Some(reason), actor, forced: false };
        self.ledger.write(caller, &[ask], back).await
    }

    /// Lets a bundle decide for a part of the subjects; zero ends that.
    pub(super) async fn canary(
        &self,
        caller: &Caller,
        id: &str,
        percent: f64,
        stop_at: Option<f64>,
    ) -> Result<Committed<Ruling>, Refusal> {
        let stop_at = stop_at.unwrap_or(self.rules.settings.canary_new_denials);
        for (at, value) in [("/percent", percent), ("/stop_at", stop_at)] {
            if !(0.0..=100.0).contains(&value) {
                return Err(Refusal::malformed(at, format!("{} is a number from 0 to 100", &at[1..])));
            }
        }
        let (row, _) = self.open(id).await?;
        if row.scope != "application" {
            let detail = "a system bundle has no canary: who may do what in the daemon must not depend on a hash";
            return Err(Refusal::new(&problem::UNPROCESSABLE, detail));
        }
        let ask = Ask::new("governance:canary", "Bundle", id);
        self.ledger.permit(caller, std::slice::from_ref(&ask)).await?;
        let (id, actor) = (id.to_owned(), caller.actor().to_owned());
        let canary = SetCanary { id, percent, stop_at, actor, reason: None, since: None };
        self.ledger.write(caller, &[ask], canary).await
    }

    /// Under the candidate, the caller and at least one administrator can still go back.
    fn no_lock_out(&self, caller: &Caller, scope: &str, candidate: &Arc<Compiled>, force: bool) -> Result<(), Refusal> {
        let now = &self.rules.snapshot.force().active;
        let then = if scope == "system" {
            Force::new(candidate.clone(), now.application().cloned())
        } else {
            Force::new(now.system().clone(), Some(candidate.clone()))
        };
        let may = |who: &EntityName, scopes: &[String]| self.rules.may(&then, who, scopes, "governance:rollback");
        let mut clients = self.rules.snapshot.ids("Sop::Client", None, usize::MAX).into_iter();
        let client = |id| EntityName { kind: "Sop::Client".to_owned(), id };
        if !clients.any(|id| may(&client(id.clone()), &self.rules.scopes(&client(id)))) {
            let detail = "under this bundle no client at all could roll back; it cannot be brought into force";
            return Err(Refusal::new(&problem::LOCKS_OUT, detail));
        }
        if !force && !may(caller.principal(), caller.scopes()) {
            let detail = "under this bundle you could not roll back; `force` brings it into force all the same";
            return Err(Refusal::new(&problem::LOCKS_OUT, detail));
        }
        Ok(())
    }
}

/// Keeps a new bundle.
pub(super) struct Create {
    pub id: String,
    pub scope: &'static str,
    pub note: String,
    pub author: String,
    pub validated: bool,
    pub count: i32,
    pub shipped: Option<i32>,
    pub text: Text,
}

impl Create {
    pub fn row(&self, tx: &Tx<'_>) -> Bundle {
        Bundle {
            id: self.id.clone(),
            scope: self.scope.to_owned(),
            note: self.note.clone(),
            author: self.author.clone(),
            validated: self.validated,
            count: self.count,
            status: "draft".to_owned(),
            shipped: self.shipped,
            created: tx.index(),
            time: tx.now(),
            index: tx.index(),
            activated: None,
        }
    }
}

impl Command for Create {
    type Out = Shown;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Shown, Entry), Failure> {
        let row = self.row(tx);
        rows::put(tx.write(), &row, &self.text).await?;
        let digest = crypto::base64(crypto::sha256(&self.text.policies));
        let mut entry = Entry::ok("governance:bundle-create", format!("bundle/{}", self.id))
            .change("scope", self.scope)
            .change("note", self.note.clone())
            .change("policies", self.count)
            .change("validated", self.validated)
            .change("sha256", digest)
            .touch(Touch::key(MADE, self.id.as_bytes()));
        if let Some(tests) = &self.text.tests {
            entry = entry.change("tests_sha256", crypto::base64(crypto::sha256(tests)));
        }
        Ok((Shown::of(row, Some(&self.text)), entry))
    }
}

/// A proposal's id from a path.
pub(super) fn id_of(text: &str) -> Result<Uuid, Refusal> {
    Uuid::parse_str(text).map_err(|_| Refusal::not_found(format!("proposal {text}")))
}
