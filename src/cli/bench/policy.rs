//! The measurements of policies: bundles that are made, who they are about, and what is asked. The figures themselves are in
//! `decide.rs`; Cerbos is asked the same beside us.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::load::{self, Request};
use super::server::free_port;
use crate::cli::client::Client;
use crate::cli::process::{Sop, folder};

/// Users of each size of bundle.
const USERS: usize = 10_000;
/// Questions of a batch.
pub(super) const BATCH: usize = 50;
const SCHEMA: &str = "entity group; entity user in [group] { level?: Long }; entity doc { level: Long };
    action view, edit appliesTo { principal: [user], resource: [doc], context: { mfa?: Bool } };";

/// A daemon with two who may change its policy: one drafts and proposes, the other approves.
pub(super) struct Office<'a> {
    pub ours: &'a Sop,
    pub client: &'a Client,
    other: Client,
    /// What each request carries.
    pub headers: String,
}

impl<'a> Office<'a> {
    pub async fn open(ours: &'a Sop, client: &'a Client) -> anyhow::Result<Self> {
        let request = client.request(Method::POST, "/oauth2/register").json(&json!({"scope": "admin"}));
        let made = client.json(request).await?;
        let text = |name: &str| made[name].as_str().unwrap_or_default().to_owned();
        let other = Client::at(client.url(), &text("client_id"), &text("client_secret")).await?;
        let token = client.token().context("the bench has no token")?;
        let headers = format!("Authorization: Bearer {token}\r\nContent-Type: application/json\r\n");
        Ok(Self { ours, client, other, headers })
    }

    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.client.json(self.client.request(Method::POST, path).json(body)).await
    }

    /// Drafts a bundle; its id.
    pub async fn draft(&self, policies: &str) -> anyhow::Result<String> {
        let body = json!({"policies": policies, "schema": SCHEMA, "note": "bench"});
        let made = self.post("/v1/governance/bundles", &body).await?;
        made["id"].as_str().map(str::to_owned).context("a bundle has no id")
    }

    /// Has it proposed and approved.
    pub async fn approve(&self, bundle: &str) -> anyhow::Result<()> {
        let proposal = self.post(&format!("/v1/governance/bundles/{bundle}/propose"), &json!({})).await?;
        let path = format!("/v1/governance/proposals/{}/approve", proposal["id"].as_str().unwrap_or_default());
        self.other.json(self.other.request(Method::POST, &path).json(&json!({}))).await?;
        Ok(())
    }

    /// Has it proposed and approved, and brings it into force.
    pub async fn activate(&self, bundle: &str) -> anyhow::Result<()> {
        self.approve(bundle).await?;
        self.post(&format!("/v1/governance/bundles/{bundle}/activate"), &json!({})).await?;
        Ok(())
    }

    /// Puts entities: the n-th is made by the function, as its path and its body.
    pub async fn put(
        &self,
        count: usize,
        entity: impl Fn(usize) -> (String, String) + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        let headers = self.headers.clone();
        let request = Request::new(move |n| {
            let (path, body) = entity(n);
            load::http("PUT", &format!("/v1/governance/entities/{path}"), &headers, &body)
        });
        load::fill(self.ours.address(), &request, 64, count).await
    }

    /// A bundle of so many policies, each for a group of its own, and users who are each in one of the groups.
    pub async fn of_size(&self, policies: usize) -> anyhow::Result<String> {
        self.put(USERS, move |n| {
            let parents = json!({"parents": [{"type": "group", "id": format!("g{}", n % policies)}]});
            (format!("user/{}", user(policies, n)), parents.to_string())
        })
        .await?;
        self.draft(&groups(policies, "<=")).await
    }

    /// Single questions to a bundle of that size.
    pub fn evaluation(&self, policies: usize) -> Request {
        let headers = self.headers.clone();
        Request::new(move |n| load::http("POST", "/access/v1/evaluation", &headers, &question(policies, n)))
    }

    /// Batches of questions: about one subject and many resources, or each about another subject.
    pub fn evaluations(&self, policies: usize, alone: bool) -> Request {
        let headers = self.headers.clone();
        Request::new(move |n| {
            let all = n * BATCH..(n + 1) * BATCH;
            let body = if alone {
                format!(r#"{{"evaluations":[{}]}}"#, all.map(|i| question(policies, i)).collect::<Vec<_>>().join(","))
            } else {
                let items: Vec<String> = all.map(|i| format!(r#"{{"resource":{}}}"#, resource(i))).collect();
                let (subject, items) = (subject(policies, n), items.join(","));
                format!(r#"{{"subject":{subject},"action":{{"name":"view"}},"evaluations":[{items}]}}"#)
            };
            load::http("POST", "/access/v1/evaluations", &headers, &body)
        })
    }
}

/// Policies that each let a group view what is not above the viewer's level.
pub(super) fn groups(count: usize, compare: &str) -> String {
    let one = |n: usize| {
        format!(
            "@id(\"view-{n}\") permit (principal in group::\"g{n}\", action == Action::\"view\", resource)\nwhen {{ principal has level && resource.level {compare} principal.level }};\n"
        )
    };
    (0..count).map(one).collect()
}

fn user(policies: usize, n: usize) -> String {
    format!("u{policies}-{}", n % USERS)
}

/// The levels of the n-th question's subject and resource: each pair is as likely as any other.
pub(super) const fn levels(n: usize) -> (usize, usize) {
    (n / 10 % 10, n % 10)
}

fn subject(policies: usize, n: usize) -> String {
    format!(r#"{{"type":"user","id":"{}","properties":{{"level":{}}}}}"#, user(policies, n), levels(n).0)
}

fn resource(n: usize) -> String {
    format!(r#"{{"type":"doc","id":"d{n}","properties":{{"level":{}}}}}"#, levels(n).1)
}

fn question(policies: usize, n: usize) -> String {
    format!(r#"{{"subject":{},"action":{{"name":"view"}},"resource":{}}}"#, subject(policies, n), resource(n))
}

/// Cerbos, its npm package in `target/peers/cerbos`: `tests/peers/cerbos` has its configuration and its policy.
pub(super) struct Cerbos {
    #[allow(dead_code)]
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Cerbos {
    pub async fn start() -> anyhow::Result<Self> {
        let at = PathBuf::from("target/peers/cerbos");
        let program = std::fs::canonicalize(at.join("node_modules/@cerbos/cerbos-linux-x64/cerbos-linux-x64"));
        super::fits("cerbos (its npm package in target/peers/cerbos)", program.is_ok())?;
        let (http, grpc) = (free_port().await?, free_port().await?);
        let dir = folder("bench-cerbos")?;
        let child = Command::new(program?)
            .args(["server", "--config", "config.yaml", "--log-level", "error"])
            .arg(format!("--set=server.httpListenAddr=127.0.0.1:{http}"))
            .arg(format!("--set=server.grpcListenAddr=127.0.0.1:{grpc}"))
            .current_dir(&at)
            .env("TMPDIR", &dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let started = Self { child, dir, address: format!("127.0.0.1:{http}") };
        for _ in 0..200 {
            if TcpStream::connect(&started.address).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Ok(started);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("cerbos did not start")
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// The same question: who, in which group, of which level; what, of which level. It keeps nobody, so the group is said too.
    pub fn requests(&self) -> Request {
        Request::new(|n| {
            let (who, what) = levels(n);
            let body = format!(
                r#"{{"principal":{{"id":"{}","roles":["g0"],"attr":{{"level":{who}}}}},"resources":[{{"actions":["view"],"resource":{{"kind":"doc","id":"d{n}","attr":{{"level":{what}}}}}}}]}}"#,
                user(1, n)
            );
            load::http("POST", "/api/check/resources", "Content-Type: application/json\r\n", &body)
        })
    }
}

impl Drop for Cerbos {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
