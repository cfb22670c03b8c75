//! What is asked for when an operation token is issued, and its faults.

use serde::Deserialize;

use crate::kernel::web::faulty;
use crate::kernel::{Fault, Refusal, Timestamp, ids};

use super::model::{Operation, OperationKind};
use super::operations::fresh;

/// Most tokens of one batch.
const MOST: usize = 1000;

/// An operation token that is asked for.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    kind: OperationKind,
    /// What it is for
    operation: String,
    /// Who may use it: a client's id, or a service's name; the issuing client's without it
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
    /// The token of a todo, of which this is a step's
    #[serde(default)]
    pub todo: Option<String>,
}

/// Operation tokens that are asked for together.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = WantedBatch)]
pub struct Batch {
    /// 1-1000 of them; all are issued, or none
    pub items: Vec<Wanted>,
    /// The token of a todo, of which these are its steps'
    #[serde(default)]
    pub todo: Option<String>,
}

impl Wanted {
    fn faults(&self, at: &str, faults: &mut Vec<Fault>) {
        let named = [
            ("operation", Some(&self.operation)),
            ("audience", self.audience.as_ref()),
            ("resource", self.resource.as_ref()),
            ("subject", self.subject.as_ref()),
        ];
        for (name, value) in named {
            if let Some(fault) = value.and_then(|v| ids::id_fault(v)) {
                faults.push(Fault::new(format!("{at}/{name}"), fault));
            }
        }
        if self.purpose.as_ref().is_some_and(|p| p.len() > 4096) {
            faults.push(Fault::new(format!("{at}/purpose"), "purpose has at most 4096 bytes"));
        }
        if self.max_uses.is_some_and(|uses| !(1..=1_000_000).contains(&uses)) {
            faults.push(Fault::new(format!("{at}/max_uses"), "max_uses is from 1 to 1000000"));
        }
        if self.expires_in.is_some_and(|seconds| !(1.0..=2_592_000.0).contains(&seconds)) {
            faults.push(Fault::new(format!("{at}/expires_in"), "expires_in is from 1 to 2592000 seconds"));
        }
    }

    fn make(self, issuer: &str, now: Timestamp) -> Result<Operation, Refusal> {
        let (uses, seconds) = self.kind.defaults();
        let expires_in = self.expires_in.unwrap_or(seconds as f64);
        Ok(Operation {
            id: ids::new_id(now),
            token: Some(fresh()?),
            kind: self.kind.as_str().to_owned(),
            status: "active".to_owned(),
            operation: self.operation,
            audience: self.audience.unwrap_or_else(|| issuer.to_owned()),
            resource: self.resource,
            subject: self.subject,
            purpose: self.purpose,
            issuer: issuer.to_owned(),
            parent: None,
            max_uses: self.max_uses.unwrap_or(uses),
            uses: 0,
            issued_at: now,
            expires_at: Timestamp::from_millis(now.millis() + (expires_in * 1000.0) as i64),
        })
    }

    /// Checks it and makes the token.
    ///
    /// # Errors
    /// 400 with every fault.
    pub fn token(self, issuer: &str, now: Timestamp) -> Result<Operation, Refusal> {
        let mut faults = Vec::new();
        self.faults("", &mut faults);
        match faulty(faults) {
            Some(refusal) => Err(refusal),
            None => self.make(issuer, now),
        }
    }
}

impl Batch {
    /// Checks them and makes the tokens.
    ///
    /// # Errors
    /// 400 with every fault.
    pub fn tokens(self, issuer: &str, now: Timestamp) -> Result<Vec<Operation>, Refusal> {
        let mut faults = Vec::new();
        if !(1..=MOST).contains(&self.items.len()) {
            faults.push(Fault::new("/items", format!("1 to {MOST} tokens are wanted")));
        }
        for (i, wanted) in self.items.iter().enumerate() {
            wanted.faults(&format!("/items/{i}"), &mut faults);
            if wanted.todo.is_some() {
                faults.push(Fault::new(format!("/items/{i}/todo"), "name the todo once, beside items"));
            }
        }
        match faulty(faults) {
            Some(refusal) => Err(refusal),
            None => self.items.into_iter().map(|wanted| wanted.make(issuer, now)).collect(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(in crate::token) fn operation(v: Value) -> Operation {
        wanted(v).unwrap()
    }

    fn wanted(v: Value) -> Result<Operation, Refusal> {
        serde_json::from_value::<Wanted>(v).unwrap().token("me", Timestamp::from_millis(0))
    }

    #[test]
    fn defaults_and_bounds() {
        let o = operation(json!({"kind": "todo", "operation": "x"}));
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
            let batch: Batch =
                serde_json::from_value(json!({"items": [{"kind": "test", "operation": "x"}, bad]})).unwrap();
            let r = batch.tokens("me", Timestamp::from_millis(0)).err().unwrap();
            assert_eq!(r.errors()[0].pointer, format!("/items/1{at}"));
        }
        let none: Batch = serde_json::from_value(json!({"items": []})).unwrap();
        assert_eq!(none.tokens("me", Timestamp::from_millis(0)).err().unwrap().errors()[0].pointer, "/items");
    }
}
