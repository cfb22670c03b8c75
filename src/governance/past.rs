//! Decisions that were made: read back, listed, found by id, explained with the bundles and entities of their time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller, EntityName};
use crate::kernel::{Refusal, Timestamp};

use super::authzen::{self, Evaluation, Thing};
use super::engine::Force;
use super::explain::{self, Explanation};
use super::snapshot::{self, Given, Held, Slice};
use super::store::decisions::{self as rows, Kept, Outline};
use super::{Governance, decisions, rules, sieve, store};

/// Entries looked at in one go.
const STEP: i64 = 512;
/// How long a page is looked for before what was found is answered, with where to go on.
const PATIENCE: Duration = Duration::from_millis(300);
/// Entries after which a decision that entries carry is not looked for any further: its time says where to begin.
const NEAR: i64 = 20_000;
/// How much the clocks of two daemons may differ, milliseconds.
const SKEW: i64 = 5_000;

/// The origin of what segments hold.
const AUTHZEN: &str = "authzen";

/// A decision as it was recorded.
#[derive(Clone, Debug)]
pub(super) struct Past {
    pub id: String,
    pub index: i64,
    pub position: Option<usize>,
    pub origin: &'static str,
    pub actor: String,
    pub allowed: bool,
    pub policies: Vec<String>,
    pub bundles: Vec<String>,
    pub at: i64,
    /// What was asked; `None` where the record does not have all of it.
    pub asked: Option<Evaluation>,
    pub subject: EntityName,
    pub action: String,
    pub resource: EntityName,
}

/// A decision as the API shows it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
#[schema(as = RecordedDecision)]
pub struct Shown {
    /// Its id
    pub decision_id: String,
    /// Its entry
    pub index: i64,
    /// Its place among the records of the entry, if that is a segment
    pub position: Option<usize>,
    /// When it was made
    #[schema(value_type = String)]
    pub time: Option<Timestamp>,
    /// `api` or `authzen`
    pub origin: String,
    /// Who asked
    pub actor: String,
    /// What was decided
    pub decision: bool,
    /// About whom
    #[schema(value_type = Object)]
    pub subject: EntityName,
    /// To do what
    pub action: String,
    /// To what
    #[schema(value_type = Object)]
    pub resource: EntityName,
    /// The policies that determined it
    pub policies: Vec<String>,
    /// The bundle: the application's, else the system's
    pub bundle: Option<String>,
    /// All bundles it was put to
    pub bundles: Vec<String>,
    /// It reflects every change up to here
    pub at: i64,
}

impl From<Past> for Shown {
    fn from(p: Past) -> Self {
        let ms = Uuid::parse_str(&p.id).ok().and_then(|id| millis(&id));
        Self {
            time: ms.map(Timestamp::from_millis),
            decision_id: p.id,
            index: p.index,
            position: p.position,
            origin: p.origin.to_owned(),
            actor: p.actor,
            decision: p.allowed,
            subject: p.subject,
            action: p.action,
            resource: p.resource,
            policies: p.policies,
            bundle: p.bundles.last().cloned(),
            bundles: p.bundles,
            at: p.at,
        }
    }
}

/// The time in an id.
fn millis(id: &Uuid) -> Option<i64> {
    let (seconds, nanos) = id.get_timestamp()?.to_unix();
    Some(i64::try_from(seconds).ok()? * 1000 + i64::from(nanos / 1_000_000))
}

/// Which decisions a list is of.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// `api` or `authzen`
    #[serde(default)]
    pub origin: Option<String>,
    /// Id of whom it is about
    #[serde(default)]
    pub subject: Option<String>,
    /// What was to be done
    #[serde(default)]
    pub action: Option<String>,
    /// Beginning of the resource's id
    #[serde(default)]
    pub resource: Option<String>,
    /// What was decided
    #[serde(default)]
    pub decision: Option<bool>,
    /// A policy that determined it
    #[serde(default)]
    pub policy: Option<String>,
    /// A bundle it was put to
    #[serde(default)]
    pub bundle: Option<String>,
    /// Not before this index
    #[serde(default)]
    #[param(minimum = 0)]
    pub from: Option<i64>,
    /// Not after this index
    #[serde(default)]
    #[param(minimum = 0)]
    pub to: Option<i64>,
    /// How many
    #[serde(default)]
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<i64>,
    /// The cursor of the page before
    #[serde(default)]
    pub after: Option<String>,
}

impl Filter {
    fn fits(&self, p: &Past) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|w| w == value);
        is(&self.origin, p.origin)
            && is(&self.subject, &p.subject.id)
            && is(&self.action, &p.action)
            && self.resource.as_ref().is_none_or(|r| p.resource.id.starts_with(r.as_str()))
            && self.decision.is_none_or(|d| d == p.allowed)
            && self.policy.as_ref().is_none_or(|w| p.policies.contains(w))
            && self.bundle.as_ref().is_none_or(|w| p.bundles.contains(w))
    }
}

fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(one) => vec![one.clone()],
        many => many.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
    }
}

/// The decisions of an entry, in order.
pub(super) fn of_entry(kept: &Kept) -> Vec<Past> {
    if let Some(records) = &kept.records {
        let each = decisions::unframe(records).into_iter().enumerate();
        return each.filter_map(|(position, record)| of_record(kept.index, position, record)).collect();
    }
    kept.details.as_deref().and_then(|d| of_details(kept.index, &kept.leaf, d)).into_iter().collect()
}

/// What a record says, as far as it is read back.
#[derive(Deserialize)]
struct Record<'a> {
    id: String,
    actor: String,
    decision: bool,
    policies: Vec<String>,
    bundle: Texts,
    at: i64,
    #[serde(borrow)]
    request: Cow<'a, str>,
}

/// One text, as older versions wrote it, or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Texts {
    Several(Vec<String>),
    One(String),
}

fn of_record(index: i64, position: usize, record: &[u8]) -> Option<Past> {
    let record: Record<'_> = serde_json::from_slice(record).ok()?;
    let asked = authzen::read(record.request.as_bytes()).ok()?;
    Some(Past {
        id: record.id,
        index,
        position: Some(position),
        origin: AUTHZEN,
        actor: record.actor,
        allowed: record.decision,
        policies: record.policies,
        bundles: match record.bundle {
            Texts::Several(all) => all,
            Texts::One(one) => vec![one],
        },
        at: record.at,
        subject: asked.subject.name.clone(),
        action: asked.action.0.clone(),
        resource: asked.resource.name.clone(),
        asked: Some(asked),
    })
}

/// What a record is about, for the sieve of its segment.
pub(super) fn about(record: &[u8]) -> Option<sieve::Things> {
    let past = of_record(0, 0, record)?;
    let about = sieve::About {
        subject: &past.subject.id,
        action: &past.action,
        resource: &past.resource.id,
        policies: &past.policies,
        bundles: &past.bundles,
        allowed: past.allowed,
    };
    Some(about.things())
}

/// Most entries carry none, so this looks before it reads.
fn of_details(index: i64, leaf: &[u8], details: &[u8]) -> Option<Past> {
    let details: Value = serde_json::from_slice(details).ok()?;
    let decision = details.get("decision")?;
    let leaf: Value = serde_json::from_slice(leaf).ok()?;
    let name = |v: &Value| serde_json::from_value::<EntityName>(v.clone()).ok();
    let (subject, resource) = (name(&decision["principal"])?, name(&decision["resource"])?);
    let action = decision["action"].as_str()?.to_owned();
    let context = decision["context"].as_object().cloned();
    let thing = |name: &EntityName| Thing { name: name.clone(), properties: Map::new() };
    let asked = context.map(|context| Evaluation {
        subject: thing(&subject),
        action: (action.clone(), Map::new()),
        resource: thing(&resource),
        context,
        explain: false,
        asked: String::new(),
    });
    Some(Past {
        id: decision["id"].as_str()?.to_owned(),
        index,
        position: None,
        origin: "api",
        actor: details["actor"].as_str().unwrap_or_default().to_owned(),
        allowed: leaf["outcome"] != "denied",
        policies: texts(&decision["policies"]),
        bundles: texts(&decision["bundle"]),
        at: decision["at"].as_i64()?,
        asked,
        subject,
        action,
        resource,
    })
}

/// The entities of an index, those that were looked for.
#[derive(Default)]
pub(super) struct World {
    pub entities: HashMap<EntityName, Arc<Held>>,
    pub index: i64,
}

impl rules::Entities for World {
    fn held(&self, name: &EntityName) -> Option<Arc<Held>> {
        self.entities.get(name).cloned()
    }

    fn slice(&self, roots: &[&EntityName], given: &Given<'_>) -> Result<Slice, Refusal> {
        let held = |name: &EntityName| snapshot::given(given, name).or_else(|| self.entities.get(name)).cloned();
        snapshot::slice(held, self.index, roots)
    }
}

impl Governance {
    /// Decisions, newest first: as many as were found in time, and where to go on.
    pub(super) async fn decisions(
        &self,
        caller: &Caller,
        filter: &Filter,
        after: Option<(i64, usize)>,
        limit: usize,
    ) -> Result<(Vec<Shown>, Option<(i64, usize)>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:decision-read", "Bundle", "decisions")]).await?;
        let began = self.rules.clock.elapsed();
        let mut conn = self.connection().await?;
        let first = filter.from.unwrap_or(0).max(0);
        let mut to = after.map_or(self.ledger.index(), |(index, _)| index).min(filter.to.unwrap_or(i64::MAX));
        let (mut found, wanted) = (Vec::new(), sieve::wanted(filter));
        while to >= first {
            let from = (to - STEP + 1).max(first);
            let outlines = rows::outlines(&mut conn, from, to).await.map_err(|e| self.store.refusal(e))?;
            for outline in outlines.iter().rev() {
                for p in self.possible(&mut conn, outline, filter, &wanted).await?.into_iter().rev() {
                    let place = (p.index, p.position.unwrap_or(0));
                    if after.is_some_and(|a| place >= a) || !filter.fits(&p) {
                        continue;
                    }
                    found.push(Shown::from(p));
                    if found.len() == limit {
                        return Ok((found, Some(place)));
                    }
                }
                if self.rules.clock.elapsed().saturating_sub(began) > PATIENCE && outline.index > first {
                    return Ok((found, Some((outline.index, 0))));
                }
            }
            to = from - 1;
        }
        Ok((found, None))
    }

    /// The decisions of an entry that a list can want. The records of a segment are read only if its sieve lets that pass.
    async fn possible(
        &self,
        conn: &mut PgConnection,
        outline: &Outline,
        filter: &Filter,
        wanted: &[u64],
    ) -> Result<Vec<Past>, Refusal> {
        let Outline { index, leaf, details, sieve } = outline;
        let Some(sieve) = sieve else {
            return Ok(details.as_deref().and_then(|d| of_details(*index, leaf, d)).into_iter().collect());
        };
        if filter.origin.as_deref().is_some_and(|origin| origin != AUTHZEN) || !sieve::passes(sieve, wanted) {
            return Ok(Vec::new());
        }
        let records = rows::records(conn, *index).await.map_err(|e| self.store.refusal(e))?;
        let kept = Kept { index: *index, leaf: Vec::new(), details: None, records };
        Ok(tokio::task::block_in_place(|| of_entry(&kept)))
    }

    /// One decision.
    pub(super) async fn decision(&self, caller: &Caller, id: &str) -> Result<Past, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:decision-read", "Bundle", "decisions")]).await?;
        let missing = || Refusal::not_found(format!("decision {id}"));
        let uuid = Uuid::parse_str(id).map_err(|_| missing())?;
        let refusal = |e| self.store.refusal(e);
        let mut conn = self.connection().await?;
        for index in rows::holding(&mut conn, &[uuid]).await.map_err(refusal)? {
            let records = rows::records(&mut conn, index).await.map_err(refusal)?.unwrap_or_default();
            let found = decisions::find(&records, &uuid);
            if let Some(past) = found.and_then(|(position, record)| of_record(index, position, record)) {
                return Ok(past);
            }
        }
        let time = millis(&uuid).ok_or_else(missing)?;
        let mut from = not_before(&mut conn, time - SKEW, self.ledger.index()).await.map_err(refusal)?;
        let end = (from + NEAR).min(self.ledger.index());
        while from <= end {
            // Of segments it is none: they were looked at.
            let outlines = rows::outlines(&mut conn, from, from + STEP - 1).await.map_err(refusal)?;
            let carried = |o: &Outline| of_details(o.index, &o.leaf, o.details.as_deref()?);
            if let Some(past) = outlines.iter().filter_map(carried).find(|p| p.id == uuid.to_string()) {
                return Ok(past);
            }
            from += STEP;
        }
        Err(missing())
    }

    /// What decided it, with the bundles and entities of its time.
    pub(super) async fn explain(&self, past: &Past) -> Result<Explanation, Refusal> {
        self.explain_with(past, None).await
    }

    /// The same with another bundle in the place of the one that was.
    pub(super) async fn explain_with(&self, past: &Past, candidate: Option<&str>) -> Result<Explanation, Refusal> {
        let lost = "the record of this decision does not have the context it was asked in";
        let asked = past.asked.as_ref().ok_or_else(|| Refusal::not_found(format!("explanation: {lost}")))?;
        let force = self.force_of(&past.bundles, candidate).await?;
        let mut conn = self.connection().await?;
        let mut world = World { entities: HashMap::new(), index: past.at };
        // Level by level upwards, and along references, as far as a decision may reach.
        let mut level = vec![asked.subject.name.clone(), asked.resource.name.clone()];
        while !level.is_empty() && world.entities.len() <= snapshot::REACH {
            let rows = store::some_at(&mut conn, &level, past.at).await.map_err(|e| self.store.refusal(e))?;
            let held: Vec<(EntityName, Arc<Held>)> = rows.into_iter().filter_map(snapshot::read).collect();
            level = held.iter().flat_map(|(_, h)| h.parents.iter().chain(&h.refers).cloned()).collect();
            world.entities.extend(held);
            level.sort_unstable();
            level.dedup();
            level.retain(|n| !world.entities.contains_key(n));
        }
        explain::explain(&force, &world, asked)
    }

    /// These bundles, compiled; one of them in another's place, if it is given.
    pub(super) async fn force_of(&self, ids: &[String], candidate: Option<&str>) -> Result<Arc<Force>, Refusal> {
        let (mut system, mut application) = (self.rules.snapshot.library().shipped().clone(), None);
        for id in ids.iter().map(String::as_str).chain(candidate) {
            let (row, compiled) = self.open(id).await?;
            if row.scope == "system" { system = compiled } else { application = Some(compiled) }
        }
        Ok(Arc::new(Force::new(system, application)))
    }
}

/// The first index whose entry is not earlier than this time, by halving: no entry is earlier than the one before it.
async fn not_before(conn: &mut PgConnection, time: i64, head: i64) -> Result<i64, sqlx::Error> {
    let (mut low, mut high) = (0, head + 1);
    while low < high {
        let middle = (low + high) / 2;
        let Some((index, leaf)) = rows::leaf(conn, middle).await? else {
            high = middle;
            continue;
        };
        let leaf: Value = serde_json::from_slice(&leaf).unwrap_or_default();
        let then = leaf["time"].as_str().and_then(Timestamp::parse).map_or(i64::MAX, Timestamp::millis);
        if then < time { low = index + 1 } else { high = middle }
    }
    Ok(low)
}

/// An explanation as the API shows it.
pub(super) fn shown(past: &Past, e: Explanation) -> Value {
    json!({
        "decision_id": past.id, "decision": past.allowed, "bundle": past.bundles.last(), "bundles": past.bundles,
        "at": past.at, "policies": e.policies, "missed": e.missed, "reason": e.reason,
        // Decided again with what there was: it must be the same, or the record has not all of it.
        "reproduced": e.allowed == past.allowed,
    })
}
