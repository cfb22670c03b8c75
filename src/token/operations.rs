//! Operation tokens: limited use, bound to an operation, an audience and, if asked, a resource and a subject. Counted exactly.
//!
//! A use is a hot command: it is decided in memory on what the writer knows of the token ([`Standing`]), so that one token can be
//! used by many at once. Everything else is ordinary SQL, and touches the token.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::crypto::{self, sha256};
use crate::kernel::problem::Problem;
use crate::kernel::web::{Ask, Caller, block};
use crate::kernel::{BoxFuture, Refusal, Timestamp, problem};
use crate::ledger::hot::{self, At, Column, Decided, Fact, Hot, HotKey, Loaded, Row};
use crate::ledger::{Command, Committed, Entry, Failure, Outcome, Permit, Touch, Tx};

use super::model::{Operation, OperationKind};
use super::store::operations as store;
use super::{GENERATIONS, Token, VERIFICATIONS};

/// What every operation token begins with, so that one found in the open is known for what it is.
const PREFIX: &str = "sopt_";
/// The kind of touch of an operation token; the key is its digest.
const TOUCH: &str = "operation-token";

/// A new token's text.
///
/// # Errors
/// When the operating system has no randomness.
pub(super) fn fresh() -> Result<String, Refusal> {
    Ok(format!("{PREFIX}{}", crypto::base64url(crypto::random::<32>()?)))
}

/// The digest a token is kept under.
#[must_use]
pub fn digest(token: &str) -> [u8; 32] {
    sha256(token.as_bytes())
}

/// What the writer knows of a token.
pub(super) struct Standing {
    pub token: Arc<Operation>,
    pub uses: i64,
}

impl Standing {
    /// Why it cannot be used for this by whoever it is for, if so. `times` is how often.
    fn refusal(&self, operation: Option<&str>, resource: Option<&str>, times: i64, now: Timestamp) -> Option<Refusal> {
        let o = &*self.token;
        let refuse = |problem: &'static Problem, detail: String| {
            Some(Refusal::new(problem, detail).with("id", o.id.to_string()))
        };
        if operation.is_some_and(|wanted| wanted != o.operation) {
            return refuse(&problem::DENIED, "this operation token is for another operation".to_owned());
        }
        if operation.is_some() && o.resource.is_some() && o.resource.as_deref() != resource {
            return refuse(&problem::DENIED, "this operation token is for another resource".to_owned());
        }
        let status = o.status_at(now);
        if status != "active" {
            return refuse(&problem::GONE, format!("this operation token is {status}"));
        }
        match o.max_uses - self.uses {
            0 => refuse(&problem::EXHAUSTED, format!("all {} uses of this operation token are spent", o.max_uses)),
            left if left < times => refuse(
                &problem::EXHAUSTED,
                format!("{left} uses of this operation token are left and {times} are wanted"),
            ),
            _ => None,
        }
    }
}

fn unknown() -> Refusal {
    Refusal::not_found("such operation token")
}

/// Who uses a token.
pub(super) struct User {
    /// The client.
    pub client: String,
    /// A service it has registered, and uses the token as.
    pub service: Option<String>,
    /// May use tokens of any audience.
    pub administrator: bool,
}

impl User {
    pub fn of(caller: &Caller, service: Option<String>) -> Self {
        let administrator = caller.scopes().iter().any(|s| s == "admin");
        Self { client: caller.actor().to_owned(), service, administrator }
    }

    fn check(&self, o: &Operation) -> Result<(), Refusal> {
        if self.administrator || o.audience == self.client || self.service.as_ref() == Some(&o.audience) {
            return Ok(());
        }
        Err(Refusal::new(&problem::DENIED, "this operation token is for another audience").with("id", o.id.to_string()))
    }
}

/// Tokens that are asked for together: all are issued, or none.
#[derive(Clone)]
pub(super) struct Issue {
    pub tokens: Vec<Operation>,
}

fn facts(entry: Entry, o: &Operation) -> Entry {
    entry
        .change("kind", o.kind.clone())
        .change("operation", o.operation.clone())
        .change("audience", o.audience.clone())
        .change("max_uses", o.max_uses)
}

/// The entry of an issue. Of several it names each.
fn issued(action: &'static str, tokens: &[Operation]) -> Entry {
    if let [one] = tokens {
        return facts(Entry::ok(action, format!("operation/{}", one.id)), one);
    }
    let named = |o: &Operation| serde_json::json!({"id": o.id, "kind": o.kind, "operation": o.operation, "audience": o.audience});
    Entry::ok(action, "operation/batch").change("tokens", tokens.iter().map(named).collect::<Vec<_>>())
}

impl Command for Issue {
    type Out = Vec<Operation>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Vec<Operation>, Entry), Failure> {
        store::put(tx.write(), &self.tokens).await?;
        Ok((self.tokens.clone(), issued("token:operation-issue", &self.tokens)))
    }
}

/// Tokens for the steps of a todo: each is one use of the todo's token, no wider than it, and ends with it.
pub(super) struct Steps {
    pub todo: [u8; 32],
    pub user: User,
    pub tokens: Vec<Operation>,
}

/// Whether `name` is `of`, or something under it.
fn beneath(name: &str, of: &str) -> bool {
    name.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '.', ':']))
}

/// Narrows a step to its todo.
fn narrow(step: &mut Operation, todo: &Operation) -> Result<(), Refusal> {
    let wider = |what: &str| {
        let detail = format!("a step's {what} is the todo's own, or beneath it: {} is not", step.operation);
        Refusal::new(&problem::DENIED, detail).with("id", todo.id.to_string())
    };
    if !beneath(&step.operation, &todo.operation) {
        return Err(wider("operation"));
    }
    match (&step.resource, &todo.resource) {
        (Some(step), Some(todo)) if !beneath(step, todo) => return Err(wider("resource")),
        (None, Some(todo)) => step.resource = Some(todo.clone()),
        _ => {}
    }
    match (&step.subject, &todo.subject) {
        (Some(step), Some(todo)) if step != todo => return Err(wider("subject")),
        (None, Some(todo)) => step.subject = Some(todo.clone()),
        _ => {}
    }
    step.expires_at = step.expires_at.min(todo.expires_at);
    step.parent = Some(todo.id);
    Ok(())
}

impl Command for Steps {
    type Out = Vec<Operation>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Vec<Operation>, Entry), Failure> {
        let standing = store::standings(tx.read(), &[self.todo.to_vec()]).await?.pop();
        let (_, standing) = standing.ok_or_else(unknown)?;
        let todo = standing.token.clone();
        self.user.check(&todo)?;
        if todo.kind != OperationKind::Todo.as_str() {
            let detail = "only a todo's token issues tokens for its steps";
            return Err(Refusal::new(&problem::DENIED, detail).with("id", todo.id.to_string()).into());
        }
        let count = i64::try_from(self.tokens.len()).unwrap_or(i64::MAX);
        if let Some(refusal) = standing.refusal(None, None, count, tx.now()) {
            return Err(refusal.into());
        }
        let mut tokens = self.tokens.clone();
        tokens.iter_mut().try_for_each(|step| narrow(step, &todo))?;
        store::set_uses(tx.write(), todo.id, standing.uses + count).await?;
        store::put(tx.write(), &tokens).await?;
        let entry = issued("token:operation-step", &tokens)
            .change("todo", todo.id.to_string())
            .change("use", standing.uses + count)
            .touch(Touch::key(TOUCH, self.todo));
        Ok((tokens, entry))
    }
}

/// A use of a token.
pub(super) struct Use {
    pub digest: [u8; 32],
    pub operation: String,
    pub resource: Option<String>,
    pub user: User,
    /// Where it came from: a block of addresses.
    pub from: String,
}

/// What a use answers.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Used {
    id: Uuid,
    uses: i64,
    remaining: i64,
    status: String,
}

impl Command for Use {
    type Out = Used;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Used, Entry), Failure> {
        hot::alone(self, tx).await
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &OPERATIONS, key: self.digest.to_vec() })
    }

    fn decide(&mut self, fact: Option<&Fact>, at: At) -> Result<Decided<Used>, Refusal> {
        let standing: &Standing = fact.and_then(|f| f.downcast_ref()).ok_or_else(unknown)?;
        let o = &standing.token;
        self.user.check(o)?;
        if let Some(refusal) = standing.refusal(Some(&self.operation), self.resource.as_deref(), 1, at.now) {
            return Err(refusal);
        }
        let uses = standing.uses + 1;
        let mut entry = Entry::ok("token:operation-use", format!("operation/{}", o.id))
            .change("operation", o.operation.clone())
            .change("use", uses)
            .change("from", self.from.clone())
            .touch(Touch::key(TOUCH, self.digest));
        let said = [
            ("resource", &self.resource),
            ("subject", &o.subject),
            ("purpose", &o.purpose),
            ("as", &self.user.service),
        ];
        for (name, value) in said {
            if let Some(value) = value {
                entry = entry.change(name, value.clone());
            }
        }
        let after: Fact = Arc::new(Standing { token: o.clone(), uses });
        let value = Used { id: o.id, uses, remaining: o.max_uses - uses, status: o.status.clone() };
        Ok(Decided { value, entry, after: Some(after), row: Some(Box::new((o.id, uses))) })
    }
}

/// The kind of hot command that uses are.
struct Operations;

static OPERATIONS: Operations = Operations;

impl Hot for Operations {
    fn name(&self) -> &'static str {
        TOUCH
    }

    fn parts(&self, _: &[Column]) -> &'static str {
        store::USES
    }

    fn columns(&self, rows: Vec<Row>) -> Vec<Column> {
        store::columns(rows.into_iter().filter_map(|r| r.downcast().ok()).map(|used| *used).collect())
    }

    fn load<'a>(&'a self, conn: &'a mut PgConnection, keys: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded> {
        Box::pin(async move {
            let found = store::standings(conn, keys).await?;
            Ok(found.into_iter().map(|(key, standing)| (key, Arc::new(standing) as Fact)).collect())
        })
    }
}

/// Completes or revokes a token; the tokens of its steps are revoked with it.
pub(super) struct End {
    pub id: Uuid,
    pub action: &'static str,
    pub status: &'static str,
}

impl Command for End {
    type Out = Operation;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Operation, Entry), Failure> {
        let found = store::by_id(tx.read(), self.id).await?;
        let (mut o, digest) = found.ok_or_else(|| Refusal::not_found(format!("operation token {}", self.id)))?;
        let status = o.status_at(tx.now());
        if status != "active" {
            return Err(Refusal::new(&problem::GONE, format!("this operation token is {status}")).into());
        }
        let steps = store::descendants(tx.read(), o.id).await?;
        self.status.clone_into(&mut o.status);
        store::set_status(tx.write(), &[o.id], self.status).await?;
        let entry = Entry::ok(self.action, format!("operation/{}", o.id)).change("uses", o.uses);
        if steps.is_empty() {
            return Ok((o, entry.touch(Touch::key(TOUCH, digest))));
        }
        store::set_status(tx.write(), &steps, "revoked").await?;
        Ok((o, entry.change("steps_revoked", steps.len()).touch(Touch::all(TOUCH))))
    }
}

impl Token {
    /// Issues tokens, all or none; with `todo`, the token of one, as its steps'.
    pub(super) async fn issue_operations(
        &self,
        caller: &Caller,
        tokens: Vec<Operation>,
        todo: Option<String>,
    ) -> Result<Committed<Vec<Operation>>, Refusal> {
        self.spend(caller.actor(), GENERATIONS, self.allowance(caller.actor()).generations, tokens.len())?;
        let done = match todo {
            None => {
                self.ledger
                    .write(caller, &[Ask::new("token:operation-issue", "Operation", "new")], Issue { tokens })
                    .await?
            }
            Some(todo) => {
                let todo = digest(&todo);
                let ask = Ask::new("token:operation-step", "Operation", "new");
                let step = |service| Steps { todo, user: User::of(caller, service), tokens: tokens.clone() };
                self.as_any_audience(caller, ask, step).await?
            }
        };
        for o in done.value.iter().filter(|_| !done.replayed) {
            self.counted.operations.with_label_values(&[&o.kind]).inc();
        }
        Ok(done)
    }

    pub(super) async fn use_operation(
        &self,
        caller: &Caller,
        token: &str,
        operation: String,
        resource: Option<String>,
    ) -> Result<Committed<Used>, Refusal> {
        self.spend(caller.actor(), VERIFICATIONS, self.allowance(caller.actor()).verifications, 1)?;
        let digest = digest(token);
        let ask = Ask::new("token:operation-use", "Operation", operation.clone());
        let from = block(caller.request().peer);
        let used = |service| {
            let user = User::of(caller, service);
            Use { digest, operation: operation.clone(), resource: resource.clone(), user, from: from.clone() }
        };
        let done = self.as_any_audience(caller, ask, used).await;
        let outcome = done.as_ref().map_or_else(|r| r.problem().slug, |_| "ok");
        self.counted.uses.with_label_values(&[outcome]).inc();
        done
    }

    /// Writes a command of somebody who shows an operation token; as one of the services they are, if it is for that. That the
    /// policy let it through and the token itself did not is a denial too, and recorded.
    async fn as_any_audience<C: Command>(
        &self,
        caller: &Caller,
        ask: Ask,
        command: impl Fn(Option<String>) -> C,
    ) -> Result<Committed<C::Out>, Refusal> {
        let action = ask.action;
        let asks = [ask];
        let mut done = self.ledger.write(caller, &asks, command(None)).await;
        let audience = |r: &Refusal| r.problem() == &problem::DENIED && r.index().is_none();
        if let Err(r) = &done
            && audience(r)
            && let Some(service) = self.service_of(caller, r).await?
        {
            done = self.ledger.write(caller, &asks, command(Some(service))).await;
        }
        match done {
            Err(r) if audience(&r) => {
                let id = shown_id(&r).map(|id| id.to_string()).unwrap_or_default();
                let entry =
                    Entry::ok(action, format!("operation/{id}")).outcome(Outcome::Denied).reason(r.detail().to_owned());
                let recorded = self.ledger.record(caller, Permit::granted(), entry).await?;
                Err(r.recorded_at(recorded.index))
            }
            done => done,
        }
    }

    /// The service that the refused token is for, if the caller is it.
    async fn service_of(&self, caller: &Caller, refused: &Refusal) -> Result<Option<String>, Refusal> {
        let (Some(id), Some(services)) = (shown_id(refused), self.services.get()) else { return Ok(None) };
        let Some((o, _)) = store::by_id(&mut *self.reader().await?, id).await.map_err(|e| self.store.refusal(e))?
        else {
            return Ok(None);
        };
        let other = o.audience != caller.actor();
        Ok((other && services.provides(caller.actor(), &o.audience).await?).then_some(o.audience))
    }

    pub(super) async fn end_operation(
        &self,
        caller: &Caller,
        id: Uuid,
        complete: bool,
    ) -> Result<Committed<Operation>, Refusal> {
        let (action, status) =
            if complete { ("token:operation-complete", "completed") } else { ("token:operation-revoke", "revoked") };
        let ask = Ask::new(action, "Operation", id.to_string());
        self.ledger.write(caller, &[ask], End { id, action, status }).await
    }

    pub(super) async fn operation(&self, caller: &Caller, id: Uuid) -> Result<Operation, Refusal> {
        self.ledger.permit(caller, &[Ask::new("token:operation-read", "Operation", id.to_string())]).await?;
        let found = store::by_id(&mut *self.reader().await?, id).await.map_err(|e| self.store.refusal(e))?;
        let (found, _) = found.ok_or_else(|| Refusal::not_found(format!("operation token {id}")))?;
        Ok(found.at(self.clock.now()))
    }

    pub(super) async fn operations(
        &self,
        caller: &Caller,
        todo: Option<Uuid>,
        after: Option<Uuid>,
        limit: usize,
    ) -> Result<Vec<Operation>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("token:operation-read", "Operation", "")]).await?;
        let take = i64::try_from(limit).unwrap_or(1000) + 1;
        let found =
            store::list(&mut *self.reader().await?, todo, after, take).await.map_err(|e| self.store.refusal(e))?;
        let now = self.clock.now();
        Ok(found.into_iter().map(|o| o.at(now)).collect())
    }
}

/// The id of the token that was refused.
fn shown_id(refused: &Refusal) -> Option<Uuid> {
    refused.extra().get("id").and_then(|v| v.as_str()).and_then(|id| id.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::wanted::tests::operation;
    use proptest::prelude::*;
    use serde_json::json;

    fn used(o: &Operation, uses: i64, user: &str, now: i64) -> Result<Used, &'static str> {
        let fact: Fact = Arc::new(Standing { token: Arc::new(o.clone()), uses });
        let user = User { client: user.to_owned(), service: None, administrator: false };
        let mut command =
            Use { digest: [0; 32], operation: o.operation.clone(), resource: None, user, from: "unix".into() };
        let at = At { index: 1, now: Timestamp::from_millis(now), position: 0 };
        command.decide(Some(&fact), at).map(|d| d.value).map_err(|r| r.problem().slug)
    }

    proptest! {
        #[test]
        fn a_use_is_counted_or_refused(max in 1i64..50, uses in 0i64..50, now in 0i64..200_000) {
            prop_assume!(uses <= max);
            let o = operation(json!({"kind": "test", "operation": "x", "max_uses": max, "expires_in": 100}));
            let expected = if now >= 100_000 { Err("gone") } else if uses == max { Err("exhausted") } else { Ok(uses + 1) };
            prop_assert_eq!(used(&o, uses, "me", now).map(|u| u.uses), expected);
            prop_assert_eq!(used(&o, uses, "you", now).map(|u| u.uses), Err("denied"));
        }
    }

    #[test]
    fn a_step_is_no_wider_than_its_todo() {
        let todo = operation(
            json!({"kind": "todo", "operation": "todo:7", "resource": "r", "subject": "s", "expires_in": 10}),
        );
        let step = |more: serde_json::Value| {
            let mut step = operation(more);
            narrow(&mut step, &todo).map(|()| step).map_err(|r| r.problem().slug)
        };
        let narrowed = step(json!({"kind": "operation", "operation": "todo:7/fetch"})).unwrap();
        assert_eq!((narrowed.resource.as_deref(), narrowed.subject.as_deref()), (Some("r"), Some("s")));
        assert_eq!((narrowed.expires_at, narrowed.parent), (todo.expires_at, Some(todo.id)));
        assert!(step(json!({"kind": "operation", "operation": "todo:7", "resource": "r/1", "subject": "s"})).is_ok());
        for wider in [
            json!({"kind": "operation", "operation": "todo:77"}),
            json!({"kind": "operation", "operation": "todo"}),
            json!({"kind": "operation", "operation": "todo:7", "resource": "rs"}),
            json!({"kind": "operation", "operation": "todo:7", "subject": "t"}),
        ] {
            assert_eq!(step(wider.clone()).err(), Some("denied"), "{wider}");
        }
    }
}
