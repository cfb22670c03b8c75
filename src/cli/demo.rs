//! `sop demo`: a day of LOGOS against a real daemon, and then the proof of it, checked offline.

mod cast;
mod protocol;
mod stage;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::audit::note::VerifierKey;
use crate::audit::proof::Proof;
use crate::kernel::Clock;

use super::client::Client;
use super::process::{Sop, folder};
use super::verify::{self, Source};
use super::{Global, audit, say};
use cast::{Cast, Role};
use protocol::Protocol;
use stage::{Stage, Watcher};

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// How fast the day goes by; 1 is an hour in 400 ms
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Only these protocols: SOP,ARP,...
    #[arg(long, value_delimiter = ',')]
    protocols: Vec<String>,
    /// File of who there is; the shipped config/logos/logos.toml without it
    #[arg(long, value_name = "FILE")]
    logos: Option<PathBuf>,
}

/// An hour of the day at speed 1.
const HOUR: Duration = Duration::from_millis(400);
/// Receipts that are checked at the end.
const RECEIPTS: usize = 25;

pub(crate) async fn run(global: &Global, args: DemoArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.speed > 0.0 && args.speed.is_finite(), "--speed is more than 0");
    let cast = Cast::load(args.logos.as_deref(), &args.protocols)?;
    let (own, admin) = match running(global).await {
        Some(admin) => (None, admin),
        None => {
            let own = Sop::start("demo").await?;
            let found = Client::find(&Global { data_dir: Some(own.dir().to_owned()), ..global.clone() }).await?;
            (Some(own), found)
        }
    };
    let stage = Stage::new(global.json);
    match &own {
        Some(own) => stage.line("", "a daemon of its own, on a new database", &format!("http://{}", own.address())),
        None => stage.line("", "the daemon that runs", admin.url()),
    }
    let hour = HOUR.div_f64(args.speed);
    let played = Day { stage: &stage, admin: &admin, cast: &cast, hour, refused: AtomicUsize::new(0) }.play().await;
    let resident = own.as_ref().and_then(Sop::resident);
    let done = match played {
        Ok(played) => prove(global, &stage, admin, &played, resident).await,
        Err(e) => Err(e),
    };
    if let Some(own) = own {
        own.stop().await;
    }
    done
}

/// The daemon that is named by the environment or the data folder, if it answers.
async fn running(global: &Global) -> Option<Client> {
    let client = Client::find(global).await.ok()?;
    client.json(client.request(Method::GET, "/version")).await.is_ok().then_some(client)
}

struct Day<'a> {
    stage: &'a Stage,
    admin: &'a Client,
    cast: &'a Cast,
    hour: Duration,
    refused: AtomicUsize,
}

/// What the day came to.
struct Played {
    /// What was changed, for receipts.
    indexes: Vec<i64>,
    /// Decisions that refused.
    refused: usize,
}

impl Day<'_> {
    /// Plays the day.
    async fn play(&self) -> anyhow::Result<Played> {
        let watcher = Watcher::start(self.admin, "/v1/state/watch").await?;
        let services = Watcher::start(self.admin, &format!("/v1/nexus/services/{}/watch", self.failing())).await?;
        let mut all = Vec::new();
        for role in &self.cast.protocols {
            let protocol = Protocol::boot(self.admin, role, self.stage).await?;
            protocol.wait_for(&role.after, &all, self.stage).await?;
            protocol.ready().await?;
            all.push(protocol);
        }
        let alive = protocol::keep_alive(&all);
        for hour in 0..24u32 {
            self.hour(hour, &mut all, &services).await?;
            tokio::time::sleep(self.hour).await;
        }
        alive.end().await;
        let (mut indexes, refused) = (Vec::new(), self.refused.load(Ordering::Relaxed));
        while let Some(protocol) = all.pop() {
            indexes.extend(protocol.shut_down(self.admin, self.stage).await?);
        }
        self.stage.line(
            "24:00",
            "SOP",
            &format!("{} changes of keys were watched as they happened", watcher.seen("put")),
        );
        Ok(Played { indexes, refused })
    }

    fn failing(&self) -> String {
        self.cast.failure.protocol.to_lowercase()
    }

    async fn hour(&self, hour: u32, all: &mut [Protocol], services: &Watcher) -> anyhow::Result<()> {
        let clock = format!("{hour:02}:00");
        let failure = &self.cast.failure;
        if let Some(failing) = all.iter_mut().find(|p| p.id() == failure.protocol) {
            if hour == failure.at {
                failing.fail(self.admin, &failure.why).await?;
                let why = failing.why(self.admin).await?;
                self.stage.line(&clock, failing.id(), &format!("fails with a message in its hands; {why}"));
            }
            if hour == failure.back {
                services.until("expire", Duration::from_secs(20)).await?;
                self.stage.line(
                    &clock,
                    failing.id(),
                    "was silent for its whole time and is out of the registry; it comes back",
                );
                failing.come_back().await?;
            }
        }
        let ring: Vec<String> = all.iter().map(|p| p.id().to_owned()).collect();
        let turns = all.iter().enumerate().filter(|(_, p)| p.is_up()).map(|(i, p)| {
            let next = &ring[(i + 1) % ring.len()];
            p.hour(hour, next)
        });
        for said in join_all(turns).await {
            for (who, what) in said? {
                self.stage.line(&clock, &who, &what);
            }
        }
        self.question(hour, &clock, all).await?;
        self.operation(hour, &clock, all).await
    }

    /// Every third hour somebody asks what they may; every time it is refused, it is tried all the same.
    async fn question(&self, hour: u32, clock: &str, all: &[Protocol]) -> anyhow::Result<()> {
        if !hour.is_multiple_of(3) || self.cast.questions.is_empty() {
            return Ok(());
        }
        let question = &self.cast.questions[(hour as usize / 3) % self.cast.questions.len()];
        let Some(who) = all.iter().find(|p| p.id() == question.who && p.is_up()) else { return Ok(()) };
        let allowed = who.ask(question).await?;
        if !allowed {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        let verdict = if allowed { "may" } else { "may not" };
        self.stage.line(clock, &question.who, &format!("asks: {} on {}? It {verdict}", question.action, question.name));
        if !allowed && question.action == "state:put" {
            let refusal = who.try_put(&question.name).await?;
            self.stage.line(clock, &question.who, &format!("tries it all the same: {refusal}"));
        }
        Ok(())
    }

    /// Every fourth hour an operation is allowed once, used, and refused the next time.
    async fn operation(&self, hour: u32, clock: &str, all: &[Protocol]) -> anyhow::Result<()> {
        if hour % 4 != 1 || self.cast.operations.is_empty() {
            return Ok(());
        }
        let operation = &self.cast.operations[(hour as usize / 4) % self.cast.operations.len()];
        let Some(user) = all.iter().find(|p| p.id() == operation.user && p.is_up()) else { return Ok(()) };
        let issuer = all.iter().find(|p| p.may("token") && p.is_up()).map_or(self.admin, Protocol::client);
        let body = json!({"kind": operation.kind, "operation": operation.name, "audience": user.client_id(),
                          "max_uses": operation.uses, "purpose": "the day of the demo"});
        let issued = issuer.json(issuer.request(Method::POST, "/v1/token/operations").json(&body)).await?;
        let token = issued["token"].as_str().context("an operation token has no secret")?;
        let mut said = String::new();
        for n in 1..=operation.uses + 1 {
            let status = user.use_token(token, &operation.name).await?;
            said = match (n <= operation.uses, status) {
                (true, 200) => format!("{n} of {} uses", operation.uses),
                (false, 409) => format!("{said}; the next is refused, 409"),
                (_, other) => bail!("use {n} of {} was answered {other}", operation.name),
            };
        }
        self.stage.line(clock, user.id(), &format!("{} by token: {said}", operation.name));
        Ok(())
    }
}

/// Fetches the log, checks it with nothing but the public key, and receipts of what was done.
async fn prove(
    global: &Global,
    stage: &Stage,
    client: Client,
    played: &Played,
    resident: Option<u64>,
) -> anyhow::Result<()> {
    let clock = Clock::system();
    let key_text = client.send(client.request(Method::GET, "/log/key")).await?.text().await?;
    let key = VerifierKey::parse(&key_text).context("the log's key cannot be read")?;
    let step = played.indexes.len().div_ceil(RECEIPTS).max(1);
    let mut receipts = Vec::new();
    for index in played.indexes.iter().step_by(step) {
        let path = format!("/v1/audit/entries/{index}/receipt");
        receipts.push((*index, client.send(client.request(Method::GET, &path)).await?.text().await?));
    }
    let dir = folder("demo-log")?;
    audit::save(client, &dir, true).await?;
    stage.line(
        "24:00",
        "",
        &format!("the log is fetched into {}; from here on the daemon is not asked", dir.display()),
    );
    let began = clock.elapsed();
    let verified = verify::log(&Source::Folder(dir.clone()), &key, None).await?;
    for (index, text) in &receipts {
        let proof = Proof::parse(text).map_err(anyhow::Error::msg)?;
        proof.verify(&key).map_err(anyhow::Error::msg)?;
        anyhow::ensure!(proof.index == u64::try_from(*index)?, "the receipt of entry {index} is of another");
    }
    let took = clock.elapsed().saturating_sub(began).as_secs_f64();
    let _ = std::fs::remove_dir_all(&dir);
    if global.json {
        say(
            json!({"verified": verified, "receipts": receipts.len(), "refused": played.refused, "seconds": took, "resident_kib": resident}),
        );
        return Ok(());
    }
    say(format!("\nverified offline with {key}"));
    say(format!("  {} entries, every leaf, tile and the root; {} details", verified.entries, verified.details));
    say(format!("  {} denials of requests, and {} decisions that said no", verified.denied, played.refused));
    say(format!("  {} receipts of single changes", receipts.len()));
    say(format!("  in {took:.2} s"));
    if let Some(kib) = resident {
        say(format!("  the daemon used {} MiB of memory", kib / 1024));
    }
    Ok(())
}

/// Reads a member that must be text.
fn text<'a>(value: &'a Value, name: &str) -> anyhow::Result<&'a str> {
    value[name].as_str().with_context(|| format!("an answer has no {name}"))
}

/// The lower-case name of a protocol, as services, topics and keys have it.
fn lower(role: &Role) -> String {
    role.id.to_lowercase()
}
