//! Operation tokens: limited use, bound to an operation, an audience and, if asked, a resource. Counted exactly.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::kernel::crypto::{self, sha256};
use crate::kernel::{Fault, Refusal, Timestamp, ids, problem};
use crate::ledger::{Command, Entry, Failure, Tx};

use super::model::{Operation, OperationKind};
use super::store;

/// What every operation token begins with, so that one found in the open is known for what it is.
const PREFIX: &str = "sopt_";

/// What is asked for.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    kind: OperationKind,
    /// What it is for
    operation: String,
    /// Who may use it: a client's id; the issuing client's without it
    #[serde(default)]
    audience: Option<String>,
    /// On what; anything without it
    #[serde(default)]
    resource: Option<String>,
    /// On whose behalf
    #[serde(default)]
    subject: Option<String>,
    /// 1-1,000,000
    #[serde(default)]
    max_uses: Option<i64>,
    /// Seconds, 1-2,592,000
    #[serde(default)]
    expires_in: Option<f64>,
    /// Why
    #[serde(default)]
    purpose: Option<String>,
}

impl Wanted {
    /// Checks it and makes the token.
    ///
    /// # Errors
    /// 400 with every fault.
    pub fn issue(self, issuer: &str, now: Timestamp) -> Result<Issue, Refusal> {
        let (uses, seconds) = self.kind.defaults();
        let mut faults = Vec::new();
        let named = [
            ("operation", Some(&self.operation)),
            ("audience", self.audience.as_ref()),
            ("resource", self.resource.as_ref()),
            ("subject", self.subject.as_ref()),
        ];
        for (name, value) in named {
            if let Some(fault) = value.and_then(|v| ids::id_fault(v)) {
                faults.push(Fault::new(format!("/{name}"), fault));
            }
        }
        let max_uses = self.max_uses.unwrap_or(uses);
        if !(1..=1_000_000).contains(&max_uses) {
            faults.push(Fault::new("/max_uses", "max_uses is from 1 to 1000000"));
        }
        let expires_in = self.expires_in.unwrap_or(seconds as f64);
        if !(1.0..=2_592_000.0).contains(&expires_in) {
            faults.push(Fault::new("/expires_in", "expires_in is from 1 to 2592000 seconds"));
        }
        if let Some(refusal) = crate::kernel::web::faulty(faults) {
            return Err(refusal);
        }
        let token = format!("{PREFIX}{}", crypto::base64url(crypto::random::<32>()?));
        let operation = Operation {
            id: ids::new_id(now),
            token: Some(token),
            kind: self.kind.as_str().to_owned(),
            status: "active".to_owned(),
            operation: self.operation,
            audience: self.audience.unwrap_or_else(|| issuer.to_owned()),
            resource: self.resource,
            subject: self.subject,
            purpose: self.purpose,
            issuer: issuer.to_owned(),
            max_uses,
            uses: 0,
            issued_at: now,
            expires_at: Timestamp::from_millis(now.millis() + (expires_in * 1000.0) as i64),
        };
        Ok(Issue(operation))
    }
}

/// The digest a token is kept under.
#[must_use]
pub fn digest(token: &str) -> [u8; 32] {
    sha256(token.as_bytes())
}

/// Issues a token.
pub struct Issue(Operation);

impl Command for Issue {
    type Out = Operation;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Operation, Entry), Failure> {
        let digest = digest(self.0.token.as_deref().unwrap_or_default());
        store::put_operation(tx.write(), &self.0, &digest).await?;
        let entry = Entry::ok("token:operation-issue", format!("operation/{}", self.0.id))
            .change("kind", self.0.kind.clone())
            .change("operation", self.0.operation.clone())
            .change("audience", self.0.audience.clone())
            .change("max_uses", self.0.max_uses);
        Ok((self.0.clone(), entry))
    }
}

/// A use of a token.
pub(super) struct Use {
    pub digest: [u8; 32],
    pub operation: String,
    pub resource: Option<String>,
    pub user: String,
    /// May use tokens of any audience.
    pub administrator: bool,
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
        let found = store::operation_by_digest(tx.read(), &self.digest).await?;
        let o = found.ok_or_else(|| Refusal::not_found("such operation token"))?.at(tx.now());
        if o.audience != self.user && !self.administrator {
            return Err(Refusal::new(&problem::DENIED, "this operation token is for another audience")
                .with("id", o.id.to_string())
                .into());
        }
        let other = |what: &str| {
            Refusal::new(&problem::DENIED, format!("this operation token is for another {what}"))
                .with("id", o.id.to_string())
        };
        if o.operation != self.operation {
            return Err(other("operation").into());
        }
        if o.resource.is_some() && o.resource != self.resource {
            return Err(other("resource").into());
        }
        if o.status != "active" {
            return Err(Refusal::new(&problem::GONE, format!("this operation token is {}", o.status))
                .with("id", o.id.to_string())
                .into());
        }
        if o.uses >= o.max_uses {
            let detail = format!("all {} uses of this operation token are spent", o.max_uses);
            return Err(Refusal::new(&problem::EXHAUSTED, detail).with("id", o.id.to_string()).into());
        }
        let uses = o.uses + 1;
        store::set_operation(tx.write(), o.id, uses, &o.status).await?;
        let entry = Entry::ok("token:operation-use", format!("operation/{}", o.id))
            .change("operation", o.operation.clone())
            .change("use", uses);
        let entry = match &self.resource {
            Some(resource) => entry.change("resource", resource.clone()),
            None => entry,
        };
        Ok((Used { id: o.id, uses, remaining: o.max_uses - uses, status: o.status }, entry))
    }
}

/// Completes or revokes a token.
pub(super) struct End {
    pub id: Uuid,
    pub action: &'static str,
    pub status: &'static str,
}

impl Command for End {
    type Out = Operation;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Operation, Entry), Failure> {
        let found = store::operation_by_id(tx.read(), self.id).await?;
        let mut o = found.ok_or_else(|| Refusal::not_found(format!("operation token {}", self.id)))?.at(tx.now());
        if o.status != "active" {
            return Err(Refusal::new(&problem::GONE, format!("this operation token is {}", o.status)).into());
        }
        self.status.clone_into(&mut o.status);
        store::set_operation(tx.write(), o.id, o.uses, &o.status).await?;
        let entry = Entry::ok(self.action, format!("operation/{}", o.id)).change("uses", o.uses);
        Ok((o, entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn wanted(v: Value) -> Result<Issue, Refusal> {
        serde_json::from_value::<Wanted>(v).unwrap().issue("me", Timestamp::from_millis(0))
    }

    #[test]
    fn defaults_and_bounds() {
        let o = wanted(json!({"kind": "todo", "operation": "x"})).unwrap().0;
        assert_eq!((o.max_uses, o.expires_at.seconds(), o.audience.as_str()), (100, 172_800, "me"));
        assert!(o.token.unwrap().starts_with("sopt_"));
        for (bad, at) in [
            (json!({"kind": "test", "operation": ""}), "/operation"),
            (json!({"kind": "test", "operation": "x", "max_uses": 0}), "/max_uses"),
            (json!({"kind": "test", "operation": "x", "max_uses": 1_000_001}), "/max_uses"),
            (json!({"kind": "test", "operation": "x", "expires_in": 0.5}), "/expires_in"),
            (json!({"kind": "test", "operation": "x", "audience": "a\u{0}"}), "/audience"),
        ] {
            let r = wanted(bad.clone()).err().unwrap();
            assert_eq!((r.problem().status, r.errors()[0].pointer.as_str()), (400, at), "{bad}");
        }
    }
}
