//! One protocol: a client of the daemon like any other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::cli::client::Client;
use crate::kernel::supervisor::{Stop, detach};

use super::cast::{Question, Role};
use super::stage::Stage;
use super::{lower, text};

/// Seconds an instance lives without a heartbeat, and a message is left with who pulled it.
const TTL: f64 = 3.0;
/// How often it gives a sign of life.
const BEAT: Duration = Duration::from_millis(500);

/// A protocol that plays.
pub(super) struct Protocol {
    role_id: String,
    lower: String,
    scope: String,
    client: Arc<Client>,
    client_id: String,
    up: Arc<AtomicBool>,
    indexes: Mutex<Vec<i64>>,
}

impl Protocol {
    /// Becomes a client, gets a token, and has what it needs: its topic, its group, its check.
    pub async fn boot(admin: &Client, role: &Role, stage: &Stage) -> anyhow::Result<Self> {
        let wanted = json!({"client_name": role.name, "scope": role.scope});
        let made = admin.json(admin.request(Method::POST, "/oauth2/register").json(&wanted)).await?;
        let (id, secret) = (text(&made, "client_id")?, text(&made, "client_secret")?);
        let client = Client::at(admin.url(), id, secret).await?;
        let own = lower(role);
        for (path, body) in [
            (format!("/v1/nexus/topics/to-{own}"), json!({"retention": 86_400})),
            (format!("/v1/nexus/topics/to-{own}/groups/inbox"), json!({"ack_wait": TTL})),
            (
                format!("/v1/health/checks/{own}"),
                json!({"kind": "ttl", "interval": 60, "severity": "critical", "service": own}),
            ),
        ] {
            client.json(client.request(Method::PUT, &path).json(&body)).await?;
        }
        stage.line("boot", &role.id, &format!("{} is client {id} with scope {}", role.name, role.scope));
        Ok(Self {
            role_id: role.id.clone(),
            lower: own,
            scope: role.scope.clone(),
            client: Arc::new(client),
            client_id: id.to_owned(),
            up: Arc::new(AtomicBool::new(false)),
            indexes: Mutex::default(),
        })
    }

    pub fn id(&self) -> &str {
        &self.role_id
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    pub fn client_id(&self) -> &str {
        &self.client_id
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Whether it was registered with that scope.
    pub fn may(&self, scope: &str) -> bool {
        self.scope.split(' ').any(|s| s == scope)
    }

    /// Sees that those it depends on are well before it goes on.
    pub async fn wait_for(&self, after: &[String], all: &[Self], stage: &Stage) -> anyhow::Result<()> {
        for before in all.iter().filter(|p| after.contains(&p.role_id)) {
            let path = format!("/v1/health/services/{}", before.lower);
            let seen = self.client.json(self.client.request(Method::GET, &path)).await?;
            anyhow::ensure!(
                seen["status"] == "passing",
                "{} waits for {}, which is {}",
                self.role_id,
                before.role_id,
                seen["status"]
            );
        }
        if !after.is_empty() {
            stage.line("boot", &self.role_id, &format!("sees {} passing and goes on", after.join(", ")));
        }
        Ok(())
    }

    /// Registers its instance and says that it is well.
    pub async fn ready(&self) -> anyhow::Result<()> {
        register(&self.client, &self.lower).await?;
        self.report("passing", "ready").await?;
        self.up.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn report(&self, status: &str, output: &str) -> anyhow::Result<()> {
        let path = format!("/v1/health/checks/{}/report", self.lower);
        let body = json!({"status": status, "output": output});
        self.client.json(self.client.request(Method::POST, &path).json(&body)).await?;
        Ok(())
    }

    /// An hour of work: a key is written, a message goes to the next, what came is taken.
    pub async fn hour(&self, hour: u32, next: &str) -> anyhow::Result<Vec<(String, String)>> {
        if self.may("state") {
            let path = format!("/v1/state/kv/{}/hour", self.lower);
            let put = self.client.json(self.client.request(Method::PUT, &path).body(hour.to_string())).await?;
            let index = put["index"].as_i64().context("a put has no index")?;
            self.indexes.lock().unwrap_or_else(PoisonError::into_inner).push(index);
        }
        let event = json!({"specversion": "1.0", "id": uuid::Uuid::new_v4(), "source": format!("/logos/{}", self.lower),
                           "type": "logos.cross_protocol_message", "data": {"hour": hour}});
        let request =
            self.client.request(Method::POST, &format!("/v1/nexus/topics/to-{}/messages", next.to_lowercase()));
        let request = request.header("content-type", "application/cloudevents+json").body(event.to_string());
        self.client.json(request).await?;
        let got = self.pull().await?;
        let mut said = Vec::new();
        if !got.is_empty() {
            let ids: Vec<&Value> = got.iter().map(|m| &m["id"]).collect();
            let path = format!("/v1/nexus/topics/to-{}/groups/inbox/ack", self.lower);
            self.client.json(self.client.request(Method::POST, &path).json(&json!({"ids": ids}))).await?;
        }
        let again = got.iter().filter(|m| m["attempt"].as_i64() > Some(1)).count();
        if again > 0 {
            let waited = got.len() - again;
            let what =
                format!("takes what waited: {waited} new, and {again} that it had when it failed, delivered again");
            said.push((self.role_id.clone(), what));
        } else if hour.is_multiple_of(6) && !got.is_empty() {
            let wrote = if self.may("state") { "writes its hour, " } else { "" };
            said.push((self.role_id.clone(), format!("{wrote}tells {next}, takes its messages ({})", got.len())));
        }
        Ok(said)
    }

    async fn pull(&self) -> anyhow::Result<Vec<Value>> {
        let path = format!("/v1/nexus/topics/to-{}/groups/inbox/pull", self.lower);
        let mut got = self.client.json(self.client.request(Method::POST, &path).json(&json!({"max": 100}))).await?;
        Ok(got["messages"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// Takes a message, says that it is not well, and falls silent.
    pub async fn fail(&self, admin: &Client, why: &str) -> anyhow::Result<()> {
        let event = json!({"specversion": "1.0", "id": uuid::Uuid::new_v4(), "source": "/logos", "type": "logos.todo"});
        let request = admin.request(Method::POST, &format!("/v1/nexus/topics/to-{}/messages", self.lower));
        admin.json(request.header("content-type", "application/cloudevents+json").body(event.to_string())).await?;
        anyhow::ensure!(!self.pull().await?.is_empty(), "{} found no message to take", self.role_id);
        self.report("critical", why).await?;
        self.up.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// What the daemon says of it.
    pub async fn why(&self, admin: &Client) -> anyhow::Result<String> {
        let path = format!("/v1/health/services/{}", self.lower);
        let seen = admin.json(admin.request(Method::GET, &path)).await?;
        let open = admin.json(admin.request(Method::GET, "/v1/health/incidents?status=open")).await?;
        let open = open["items"].as_array().map_or(0, Vec::len);
        Ok(format!("{} is {}, {open} incident open", self.lower, text(&seen, "status")?))
    }

    /// Registers anew and is well again.
    pub async fn come_back(&self) -> anyhow::Result<()> {
        self.ready().await
    }

    /// Asks the policy.
    pub async fn ask(&self, q: &Question) -> anyhow::Result<bool> {
        let body = json!({"subject": {"type": "Sop::Client", "id": self.client_id}, "action": {"name": q.action},
                          "resource": {"type": format!("Sop::{}", q.kind), "id": q.name}});
        let answer = self.client.json(self.client.request(Method::POST, "/access/v1/evaluation").json(&body)).await?;
        answer["decision"].as_bool().context("an evaluation has no decision")
    }

    /// Tries to write what it may not; what it is told.
    pub async fn try_put(&self, key: &str) -> anyhow::Result<String> {
        let answer = self.client.request(Method::PUT, &format!("/v1/state/kv/{key}")).body("x").send().await?;
        let status = answer.status().as_u16();
        anyhow::ensure!(status == 403, "what the policy refuses was answered {status}");
        let problem: Value = answer.json().await?;
        Ok(format!("403, decision {}", text(&problem, "decision")?))
    }

    /// Uses an operation token; the status of the answer.
    pub async fn use_token(&self, token: &str, operation: &str) -> anyhow::Result<u16> {
        let body = json!({"token": token, "operation": operation});
        let answer = self.client.request(Method::POST, "/v1/token/operations/use").json(&body).send().await?;
        Ok(answer.status().as_u16())
    }

    /// Leaves the registry, and takes its check and its client along. The indexes of what it changed.
    pub async fn shut_down(self, admin: &Client, stage: &Stage) -> anyhow::Result<Vec<i64>> {
        self.up.store(false, Ordering::Relaxed);
        // Whoever fell silent has left already.
        let path = format!("/v1/nexus/services/{}/instances/1", self.lower);
        let _ = admin.send(admin.request(Method::DELETE, &path)).await;
        for path in [format!("/v1/health/checks/{}", self.lower), format!("/oauth2/register/{}", self.client_id)] {
            admin.send(admin.request(Method::DELETE, &path)).await?;
        }
        stage.line("24:00", &self.role_id, "has left");
        Ok(self.indexes.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn register(client: &Client, lower: &str) -> anyhow::Result<()> {
    let body = json!({"address": format!("demo:{lower}"), "ttl": TTL});
    let path = format!("/v1/nexus/services/{lower}/instances/1");
    client.json(client.request(Method::PUT, &path).json(&body)).await?;
    Ok(())
}

/// Signs of life, while they are given.
pub(super) struct Alive {
    stop: Stop,
    beats: Vec<tokio::task::JoinHandle<()>>,
}

impl Alive {
    /// No more of them: one that were still under way could register anew who has left.
    pub async fn end(self) {
        self.stop.cancel();
        for beat in self.beats {
            let _ = beat.await;
        }
    }
}

/// Gives signs of life for all that are up.
pub(super) fn keep_alive(all: &[Protocol]) -> Alive {
    let stop = Stop::new();
    let mut beats = Vec::new();
    for p in all {
        let (stop, client, up, lower) = (stop.clone(), p.client.clone(), p.up.clone(), p.lower.clone());
        beats.push(detach(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(BEAT) => {}
                }
                if up.load(Ordering::Relaxed) {
                    let path = format!("/v1/nexus/services/{lower}/instances/1/heartbeat");
                    // Who comes too late, on a machine that had no time for it, registers anew.
                    if client.json(client.request(Method::POST, &path).json(&json!({}))).await.is_err() {
                        let _ = register(&client, &lower).await;
                    }
                }
            }
        }));
    }
    Alive { stop, beats }
}
