//! Evaluations: each decided, all recorded, and then answered.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Refusal, problem};

use super::Governance;
use super::authzen::{Evaluation, Semantic};
use super::decisions::Record;
use super::rules::Evaluated;

/// A decision as it was recorded, and is answered.
#[derive(Serialize)]
pub(super) struct Recorded {
    #[serde(rename = "decision")]
    pub allowed: bool,
    pub context: Said,
}

/// What is said of a decision.
#[derive(Default, Serialize)]
pub(super) struct Said {
    #[serde(skip_serializing_if = "Option::is_none")]
    decision_id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policies: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bundle: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    explanation: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ignored: Vec<String>,
    /// The entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<i64>,
    /// Its place in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stale: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
}

impl Recorded {
    fn new(id: Uuid, evaluated: Evaluated) -> Self {
        let (answered, why) = (evaluated.answered, evaluated.why);
        let context = Said {
            decision_id: Some(id),
            policies: Some(answered.policies),
            bundle: evaluated.bundles.last().cloned(),
            errors: answered.errors,
            explanation: why.map(|w| json!({"reason": w.reason, "policies": w.policies, "missed": w.missed})),
            ignored: evaluated.ignored,
            ..Said::default()
        };
        Self { allowed: answered.allowed, context }
    }

    fn refused(status: u16, message: &str) -> Self {
        let error = Some(json!({"status": status, "message": message}));
        Self { allowed: false, context: Said { error, ..Said::default() } }
    }
}

/// The index that an answer reflects at least, of a caller who may ask.
#[derive(Clone, Copy)]
pub(super) struct AsOf(i64);

/// What was decided and is to be recorded.
#[derive(Default)]
struct Made {
    records: Vec<Record>,
    /// Each answer, with the place of its record.
    answers: Vec<(Recorded, Option<usize>)>,
    /// What may be answered while the store is away, and how old what is known may be.
    spare: Vec<Option<(Duration, Record)>>,
}

impl Governance {
    /// Evaluates one question, of a caller who may ask; it is recorded before the answer.
    ///
    /// # Errors
    /// What is wrong with the question.
    pub(super) async fn evaluate_one(
        &self,
        caller: &Caller,
        at: AsOf,
        asked: Evaluation,
        away: Option<Refusal>,
    ) -> Result<Recorded, Refusal> {
        let mut made = Made::default();
        self.decide(caller, at, asked, &mut made)?;
        let mut answers = self.record(made, away).await?;
        answers.pop().ok_or_else(|| Refusal::internal("an evaluation without an answer"))
    }

    /// Evaluates, one after the other, as far as the semantic says; all are recorded before the answer. What is wrong with a
    /// question is said in its place.
    pub(super) async fn evaluate(
        &self,
        caller: &Caller,
        at: AsOf,
        items: Vec<Result<Evaluation, Refusal>>,
        semantic: Semantic,
        away: Option<Refusal>,
    ) -> Result<Vec<Recorded>, Refusal> {
        let mut made = Made::default();
        for item in items {
            let decided = item.and_then(|asked| self.decide(caller, at, asked, &mut made));
            let allowed = decided.unwrap_or_else(|refusal| {
                let refused = Recorded::refused(refusal.problem().status, refusal.detail());
                made.answers.push((refused, None));
                false
            });
            match semantic {
                Semantic::DenyOnFirstDeny if !allowed => break,
                Semantic::PermitOnFirstPermit if allowed => break,
                _ => {}
            }
        }
        self.record(made, away).await
    }

    /// Whether the caller may ask, as of which index. Looked at before what is asked is read: ten thousand questions are work,
    /// and nobody causes it who may not.
    ///
    /// # Errors
    /// 403 when not.
    pub(super) async fn may_evaluate(&self, caller: &Caller) -> Result<AsOf, Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:evaluate", "Bundle", "active")]).await?;
        Ok(AsOf(self.ledger.index()))
    }

    /// Decides one question; whether it is allowed.
    fn decide(&self, caller: &Caller, AsOf(at): AsOf, asked: Evaluation, made: &mut Made) -> Result<bool, Refusal> {
        let asked = self.rules.vouched(asked)?;
        let mut evaluated = self.rules.answer(&asked)?;
        let allowed = evaluated.answered.allowed;
        self.rules.count("authzen", &evaluated.bundles, allowed);
        evaluated.at = evaluated.at.max(at);
        let record = Record::new(&self.rules.clock, caller, &asked, &evaluated)?;
        made.spare.push(evaluated.stale_ok.map(|age| (age, record.clone())));
        made.answers.push((Recorded::new(record.id, evaluated), Some(made.records.len())));
        made.records.push(record);
        Ok(allowed)
    }

    /// Records what was decided, and says in each answer where it is.
    async fn record(&self, made: Made, away: Option<Refusal>) -> Result<Vec<Recorded>, Refusal> {
        let Made { records, answers, spare } = made;
        let places = match away {
            None if records.is_empty() => Vec::new(),
            None => match self.recorder.keep(records).await {
                Ok(places) => places,
                Err(away) => return self.while_away(answers, &spare, away),
            },
            Some(away) => return self.while_away(answers, &spare, away),
        };
        let placed = answers.into_iter().map(|(mut recorded, place)| {
            if let Some(place) = place.and_then(|i| places.get(i)) {
                recorded.context.index = Some(place.index);
                recorded.context.position = Some(place.position);
            }
            recorded
        });
        Ok(placed.collect())
    }

    /// Answers without the store what policies allow to be answered so: kept on this disk first.
    fn while_away(
        &self,
        answers: Vec<(Recorded, Option<usize>)>,
        spare: &[Option<(Duration, Record)>],
        away: Refusal,
    ) -> Result<Vec<Recorded>, Refusal> {
        let (age, at) = (self.ledger.staleness(), self.ledger.index());
        let fits = |place: Option<usize>| {
            let spare = place.and_then(|i| spare.get(i)).and_then(Option::as_ref);
            spare.filter(|(most, _)| away.problem() == &problem::UNAVAILABLE && age <= *most).map(|(_, record)| record)
        };
        let kept: Vec<&Record> = answers.iter().filter_map(|(_, place)| fits(*place)).collect();
        if kept.is_empty() {
            return Err(away);
        }
        tokio::task::block_in_place(|| self.spool.keep(&kept))?;
        self.rules.metrics.stale.inc_by(kept.len() as u64);
        let answered = answers.into_iter().map(|(mut recorded, place)| {
            if fits(place).is_some() {
                recorded.context.stale = Some(json!({"index": at, "age": age.as_secs_f64()}));
            } else if place.is_some() {
                recorded = Recorded::refused(problem::UNAVAILABLE.status, away.detail());
            }
            recorded
        });
        Ok(answered.collect())
    }
}
