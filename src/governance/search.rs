//! AuthZEN search: which subjects, resources or actions a question would be permitted for. Each element is put to the very engine
//! that a single question is put to, so the two cannot disagree; what is the same for all of them is prepared once (`series`).

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use cedar_policy::ActionConstraint;
use serde_json::{Map, Value, json};

use crate::kernel::Refusal;
use crate::kernel::web::{Ask, Caller, EntityName, cursor};
use crate::ledger::Entry;

use super::Governance;
use super::authzen::{self, Evaluation};
use super::engine::Force;
use super::series::{Series, Varies};
use super::spread::{CORES, spread};

/// Elements of a page at most, where the request does not say.
const PAGE: usize = 100;
/// The most it may ask for.
const MOST: usize = 1000;
/// Candidates taken from memory at a time: few at first, for often a page is soon full.
const STEPS: Range<usize> = 128..2048;
/// How long a page is looked for before what was found is answered, with a token to go on.
const PATIENCE: Duration = Duration::from_millis(30);

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    Subject,
    Resource,
    Action,
}

impl For {
    const fn name(self) -> &'static str {
        match self {
            Self::Subject => "subject",
            Self::Resource => "resource",
            Self::Action => "action",
        }
    }
}

/// A search as it was asked.
pub(super) struct Search {
    wanted: For,
    /// The question, with whatever is looked for to be filled in.
    asked: Evaluation,
    limit: usize,
    /// The last element that was looked at.
    after: Option<String>,
}

impl Search {
    /// Reads a search.
    ///
    /// # Errors
    /// 400 with a pointer.
    pub fn read(wanted: For, body: &Value) -> Result<Self, Refusal> {
        let mut whole = body.as_object().cloned().ok_or_else(|| Refusal::malformed("", "an object is wanted"))?;
        // What is looked for has a type and no id; an id that is given all the same is ignored, as the standard says.
        match wanted {
            For::Action => drop(whole.insert("action".into(), json!({"name": "?"}))),
            For::Subject | For::Resource => {
                if let Some(thing) = whole.get_mut(wanted.name()).and_then(Value::as_object_mut) {
                    thing.insert("id".into(), "?".into());
                }
            }
        }
        let mut asked = authzen::evaluation(&Value::Object(whole))?;
        (asked.explain, asked.asked) = (false, String::new());
        let page = match body.get("page") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(page)) => page.clone(),
            Some(_) => return Err(Refusal::malformed("/page", "an object is wanted")),
        };
        let limit = match page.get("limit").or(page.get("size")) {
            None => PAGE,
            Some(n) => match n.as_u64() {
                Some(n @ 1..) => usize::try_from(n).unwrap_or(MOST).min(MOST),
                _ => return Err(Refusal::malformed("/page/limit", "limit is a whole number from 1")),
            },
        };
        let after = match page.get("token") {
            None => None,
            Some(Value::String(token)) if token.is_empty() => None,
            Some(Value::String(token)) => {
                Some(cursor::decode(token).map_err(|_| Refusal::malformed("/page/token", "no token of this daemon"))?)
            }
            Some(_) => return Err(Refusal::malformed("/page/token", "a string is wanted")),
        };
        Ok(Self { wanted, asked, limit, after })
    }

    /// The question about one element.
    fn about(&self, id: &str) -> Evaluation {
        let mut asked = self.asked.clone();
        match self.wanted {
            For::Subject => id.clone_into(&mut asked.subject.name.id),
            For::Resource => id.clone_into(&mut asked.resource.name.id),
            For::Action => id.clone_into(&mut asked.action.0),
        }
        asked
    }

    fn shown(&self, id: String) -> Value {
        match self.wanted {
            For::Subject => json!({"type": self.asked.subject.name.kind, "id": id}),
            For::Resource => json!({"type": self.asked.resource.name.kind, "id": id}),
            For::Action => json!({"name": id}),
        }
    }
}

impl Governance {
    /// One page of a search. It is an entry: who looked for what, and how many were found.
    pub(super) async fn search(&self, caller: &Caller, mut search: Search) -> Result<(Value, i64), Refusal> {
        search.asked = self.rules.vouched(search.asked)?;
        let permit = self.ledger.permit(caller, &[Ask::new("governance:evaluate", "Bundle", "active")]).await?;
        let (found, looked, next) = tokio::task::block_in_place(|| self.page(&mut search));
        let entry = Entry::ok("governance:search", "bundle/active")
            .change("for", search.wanted.name())
            .change("looked_at", looked)
            .change("found", found.len());
        let done = self.ledger.record(caller, permit, entry).await?;
        let count = found.len();
        let results: Vec<Value> = found.into_iter().map(|id| search.shown(id)).collect();
        let next = next.map(|last| cursor::encode(&last)).unwrap_or_default();
        let body = json!({
            "results": results, "page": {"next_token": next, "count": count},
            "context": {"index": done.index, "looked_at": looked},
        });
        Ok((body, done.index))
    }

    /// Elements that are permitted, how many were looked at, and the last of them where there may be more.
    fn page(&self, search: &mut Search) -> (Vec<String>, usize, Option<String>) {
        let began = self.rules.clock.elapsed();
        let late = || self.rules.clock.elapsed().saturating_sub(began) > PATIENCE;
        let (mut found, mut looked, mut step) = (Vec::new(), 0, STEPS.start);
        let asked = search.asked.clone();
        let varies = match search.wanted {
            For::Subject => Some(Varies::Subject),
            For::Resource => Some(Varies::Resource),
            For::Action => None,
        };
        let series = varies.and_then(|varies| Series::new(&self.rules.snapshot, &asked, varies));
        loop {
            let candidates = self.candidates(search, step);
            let permitted = |id: &String| {
                let quickly = series.as_ref().and_then(|series| series.permits(id));
                quickly.unwrap_or_else(|| self.permitted(search, id))
            };
            let allowed = spread(&candidates, CORES, late, permitted);
            let all = allowed.len() == candidates.len();
            let last = all && candidates.len() < step;
            for (id, allowed) in candidates.into_iter().zip(allowed) {
                looked += 1;
                search.after = Some(id.clone());
                if allowed {
                    found.push(id);
                }
                if found.len() == search.limit {
                    let more = !self.candidates(search, 1).is_empty();
                    return (found, looked, search.after.clone().filter(|_| more));
                }
            }
            if last {
                return (found, looked, None);
            }
            if !all || late() {
                let more = !self.candidates(search, 1).is_empty();
                return (found, looked, search.after.clone().filter(|_| more));
            }
            step = (step * 2).min(STEPS.end);
        }
    }

    /// Whether the question about this element would be permitted. What cannot be decided is not: the same question alone is an
    /// error or a denial.
    fn permitted(&self, search: &Search, id: &str) -> bool {
        self.rules.evaluate(&search.about(id)).is_ok_and(|e| e.answered.allowed)
    }

    /// The next elements to look at, in order.
    fn candidates(&self, search: &Search, most: usize) -> Vec<String> {
        let kind = match search.wanted {
            For::Subject => &search.asked.subject.name.kind,
            For::Resource => &search.asked.resource.name.kind,
            For::Action => {
                let in_force = self.rules.snapshot.force();
                let names = actions(in_force.of(&search.asked.subject.name), &search.asked.subject.name);
                let later = |n: &String| search.after.as_ref().is_none_or(|after| n > after);
                return names.into_iter().filter(later).take(most).collect();
            }
        };
        self.rules.snapshot.ids(kind, search.after.as_deref(), most)
    }
}

/// Actions that can be asked about for this subject: those of the schema, else those that policies name.
fn actions(force: &Force, subject: &EntityName) -> BTreeSet<String> {
    let known = force.schema();
    let applies = |uid: &&cedar_policy::EntityUid| {
        known.schema.principals_for_action(uid).is_some_and(|mut principals| principals.next().is_some())
    };
    let mut names: BTreeSet<(String, String)> = known
        .schema
        .actions()
        .filter(applies)
        .map(|uid| (uid.type_name().to_string(), uid.id().unescaped().to_owned()))
        .collect();
    if !known.validated || force.application().is_some_and(|a| !a.validated) {
        for rule in force.application().into_iter().flat_map(|a| &a.rules) {
            let uids = match rule.policy.action_constraint() {
                ActionConstraint::Any => Vec::new(),
                ActionConstraint::Eq(uid) => vec![uid],
                ActionConstraint::In(uids) => uids,
            };
            names.extend(uids.iter().map(|u| (u.type_name().to_string(), u.id().unescaped().to_owned())));
        }
    }
    // A name stands for the action that an evaluation of it would take.
    let taken = |(kind, name): &(String, String)| force.action_type(&subject.kind, name) == kind;
    names.into_iter().filter(taken).map(|(_, name)| name).collect()
}
