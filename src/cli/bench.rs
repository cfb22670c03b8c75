//! `sop bench`: an honest load generator. Keep-alive connections, a warm-up, interleaved rounds with a peer, medians.

mod decide;
mod disk;
mod load;
mod policy;
mod record;
mod server;
mod state;
mod store;
mod token;

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use reqwest::Method;
use serde_json::json;

use super::client::Client;
use super::process::Sop;
use super::{Global, say};
use load::{Figures, Request};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Puts of 80 bytes over 10,000 keys, every layer on
    StatePut,
    /// Linearizable gets of them
    StateGet,
    /// Transactions of one comparison and eight puts
    StateTxn,
    /// The same with two gets in the place of puts
    StateTxnGets,
    /// Puts, pages and reads as of an index, with 1,000 keys and with a million
    StateKeys,
    /// 1,000 watchers, 100 events a second, each for 100 of them
    StateWatch,
    /// 10,000 watchers that hear nothing
    StateIdle,
    /// 10,000 leases, renewed every three seconds
    StateLeases,
    /// One lock that sixteen clients want
    StateLocks,
    /// AuthZEN evaluations, durable before they are answered, by an application's bundle
    Evaluate,
    /// The same with bundles of 1, 1,000 and 10,000 policies
    EvaluateSizes,
    /// The same in batches of 50
    Evaluations,
    /// AuthZEN search over 100,000 entities
    Search,
    /// A million recorded decisions, decided again by another bundle
    Replay,
    /// Evaluations with and without a bundle in shadow
    Shadow,
    /// A bundle of 10,000 policies: validated, and swapped while it is asked
    Swap,
    /// Access tokens by client_credentials
    Token,
    /// Introspection of an access token
    Introspect,
    /// Uses of 10,000 operation tokens, in turn
    OperationUse,
    /// Uses of one operation token
    OperationHot,
    /// How long the auth layer takes to verify an access token, with a million revoked ones
    Verification,
    /// CloudEvents of 80 bytes to one topic, acknowledged when durable
    Publish,
    /// CloudEvents of 80 bytes to the record, one a request
    Event,
    /// The same in batches of 100
    Events,
    /// Search, receipts and verification through the daemon, over a log of about a million entries
    Record,
    /// Receipts and tiles of a log of ten million leaves
    Proofs,
    /// From the answer to a put to the signed checkpoint that covers it, at 1,000 entries a second
    Checkpoint,
    /// A saved log, checked offline
    Verify,
}

/// What is measured beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// etcd's JSON gateway
    Etcd,
    /// A bare INSERT behind axum, on the same PostgreSQL
    Bare,
    /// Cerbos, which records nothing (tests/peers/cerbos, installed into target/peers/cerbos)
    Cerbos,
    /// npm's oidc-provider, in memory (tests/peers/oidc-provider, installed into target/peers/oidc-provider)
    Oidc,
}

/// The peer while it runs.
enum Beside {
    Etcd(Box<server::Etcd>),
    Bare(store::Bare),
    Oidc(Box<token::Oidc>),
    Cerbos(Box<policy::Cerbos>),
}

impl Beside {
    async fn start(peer: Peer, ours: &Sop) -> anyhow::Result<Self> {
        Ok(match peer {
            Peer::Etcd => Self::Etcd(Box::new(server::Etcd::start().await?)),
            Peer::Bare => Self::Bare(store::Bare::start(ours.dir()).await?),
            Peer::Oidc => Self::Oidc(Box::new(token::Oidc::start().await?)),
            Peer::Cerbos => Self::Cerbos(Box::new(policy::Cerbos::start().await?)),
        })
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Etcd(_) => "etcd",
            Self::Bare(_) => "bare INSERT",
            Self::Oidc(_) => "oidc-provider",
            Self::Cerbos(_) => "Cerbos",
        }
    }

    /// Where it is and what it is asked; `None` where it has nothing like it.
    fn requests(&self, what: What) -> Option<(&str, Request)> {
        match self {
            Self::Etcd(etcd) => etcd_requests(what).map(|r| (etcd.address(), r)),
            Self::Bare(bare) if what == What::StatePut => {
                let put = |n: usize| load::http("PUT", &format!("/bench/{}", n % KEYS), "", &value(n));
                Some((bare.address(), Request::new(put)))
            }
            Self::Bare(_) => None,
            Self::Oidc(oidc) => oidc.requests(what).map(|r| (oidc.address(), r)),
            Self::Cerbos(cerbos) if what == What::Evaluate => Some((cerbos.address(), cerbos.requests())),
            Self::Cerbos(_) => None,
        }
    }
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    what: What,
    /// How many clients at once
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128")]
    clients: Vec<usize>,
    /// Seconds a round
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Rounds of each, interleaved; the median is shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Share the load between so many daemons on one database
    #[arg(long, default_value_t = 1)]
    daemons: usize,
    /// Measure this beside us, in the same run
    #[arg(long)]
    peer: Option<Peer>,
}

/// Keys that are written and read.
const KEYS: usize = 10_000;

pub(crate) async fn run(global: &Global, args: BenchArgs) -> anyhow::Result<()> {
    // Ours is a daemon of its own in a folder that is thrown away, with PostgreSQL waiting for the disk as ever.
    let ours = Sop::start("bench").await?;
    // Whatever comes of it, the daemon is stopped, and with it its PostgreSQL.
    let measured = measure(global, &args, &ours).await;
    ours.stop().await;
    measured
}

async fn measure(global: &Global, args: &BenchArgs, ours: &Sop) -> anyhow::Result<()> {
    let client = Client::find(&Global { data_dir: Some(ours.dir().to_owned()), ..global.clone() }).await?;
    let requests = ours_requests(args.what, &client, ours).await?;
    if !global.json {
        say(format!("\n## {}\n", args.what.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()));
    }
    match args.what {
        What::Checkpoint => record::checkpoint(global, &client, args.seconds).await?,
        What::Record => record::large(global, ours, client, &requests, args.seconds).await?,
        What::Proofs => record::proofs(global, ours, client).await?,
        What::Verify => record::whole(global, ours, client, &requests, args.seconds).await?,
        What::Verification => token::verification(global, ours, client, args.seconds).await?,
        What::StateKeys => state::keys(global, args, ours, &client).await?,
        What::StateWatch => state::watchers(global, ours, &client, args.seconds * 2).await?,
        What::StateIdle => state::idle(global, ours, &client).await?,
        What::StateLeases => state::leases(global, ours, &client).await?,
        What::StateLocks => state::locks(global, ours, &client, args.seconds).await?,
        What::EvaluateSizes => decide::sizes(global, args, &policy::Office::open(ours, &client).await?).await?,
        What::Evaluations => decide::batches(global, args, &policy::Office::open(ours, &client).await?).await?,
        What::Search => decide::search(global, &policy::Office::open(ours, &client).await?).await?,
        What::Replay => decide::replay(global, &policy::Office::open(ours, &client).await?).await?,
        What::Shadow => decide::shadow(global, args, &policy::Office::open(ours, &client).await?).await?,
        What::Swap => decide::swap(global, args, &policy::Office::open(ours, &client).await?).await?,
        _ => load(global, args, ours, &requests).await?,
    }
    Ok(())
}

/// Rounds of load, interleaved with the peer's.
async fn load(global: &Global, args: &BenchArgs, ours: &Sop, requests: &Request) -> anyhow::Result<()> {
    let mut others = Vec::new();
    for _ in 1..args.daemons {
        others.push(ours.beside("bench").await?);
    }
    let peer = match args.peer {
        Some(peer) => Some(Beside::start(peer, ours).await?),
        None => None,
    };
    let theirs = peer.as_ref().and_then(|p| p.requests(args.what));
    if !global.json {
        say("| clients | who | a second | p50 ms | p99 ms | ratio |\n|---|---|---|---|---|---|");
    }
    for clients in args.clients.iter().copied() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            let length = Duration::from_secs(args.seconds);
            if others.is_empty() {
                a.push(load::round(ours.address(), requests, clients, length).await?);
            } else {
                let all = std::iter::once(ours).chain(&others);
                let each = all.map(|d| load::round(d.address(), requests, clients / args.daemons, length));
                a.push(Figures::shared(futures_util::future::try_join_all(each).await?));
            }
            if let Some((address, requests)) = &theirs {
                b.push(load::round(address, requests, clients, Duration::from_secs(args.seconds)).await?);
            }
        }
        let (a, b) = (Figures::median(a), (!b.is_empty()).then(|| Figures::median(b)));
        let who = if others.is_empty() {
            "sop".to_owned()
        } else {
            format!("sop x {}, smallest share {:.0} %", args.daemons, 100.0 * a.share)
        };
        show(global, clients, &who, &a, b.as_ref().map(|b| a.rate / b.rate));
        if let (Some(b), Some(peer)) = (&b, &peer) {
            show(global, clients, peer.name(), b, None);
        }
    }
    drop(peer);
    for other in others {
        other.stop().await;
    }
    Ok(())
}

/// A line of a table, or its figures.
fn row(global: &Global, json: &serde_json::Value, line: String) {
    say(if global.json { json.to_string() } else { line });
}

/// The head of a table.
fn head(global: &Global, names: &[&str]) {
    if !global.json {
        say(format!("| {} |\n|{}", names.join(" | "), "---|".repeat(names.len())));
    }
}

fn show(global: &Global, clients: usize, who: &str, f: &Figures, ratio: Option<f64>) {
    if global.json {
        say(
            json!({"clients": clients, "who": who, "rate": f.rate, "p50_ms": f.p50, "p99_ms": f.p99, "failed": f.failed, "ratio": ratio}),
        );
        return;
    }
    let ratio = ratio.map(|r| format!("{r:.2}")).unwrap_or_default();
    let failed = if f.failed > 0 { format!(" ({} failed)", f.failed) } else { String::new() };
    say(format!("| {clients} | {who} | {:.0}{failed} | {:.2} | {:.2} | {ratio} |", f.rate, f.p50, f.p99));
}

/// The requests of a measurement: client `c`'s `n`-th is made by the function.
async fn ours_requests(what: What, client: &Client, ours: &Sop) -> anyhow::Result<Request> {
    let token = client.token().context("the bench has no token")?.to_owned();
    let bearer = format!("Authorization: Bearer {token}\r\n");
    Ok(match what {
        What::Publish => {
            client
                .send(client.request(Method::PUT, "/v1/nexus/topics/bench").json(&json!({"retention": 3600})))
                .await?;
            let headers = format!("{bearer}Content-Type: application/cloudevents+json\r\n");
            let run = uuid::Uuid::new_v4();
            Request::new(move |n| {
                let body = format!(
                    r#"{{"specversion":"1.0","id":"{run}-{n}","source":"/bench","type":"t","data":{{"n":{n},"text":"{}"}}}}"#,
                    "x".repeat(60)
                );
                load::http("POST", "/v1/nexus/topics/bench/messages", &headers, &body)
            })
        }
        What::Event | What::Events => {
            let batch = what == What::Events;
            let kind = if batch { "application/cloudevents-batch+json" } else { "application/cloudevents+json" };
            let headers = format!("{bearer}Content-Type: {kind}\r\n");
            Request::new(move |n| {
                let one = |i: usize| {
                    let text = "x".repeat(60);
                    format!(
                        r#"{{"specversion":"1.0","id":"{n}-{i}","source":"/bench","type":"t","data":{{"n":{n},"text":"{text}"}}}}"#
                    )
                };
                let many = || format!("[{}]", (0..100).map(one).collect::<Vec<_>>().join(","));
                load::http("POST", "/v1/audit/events", &headers, &if batch { many() } else { one(0) })
            })
        }
        What::StatePut | What::Checkpoint | What::Verify | What::Record | What::Proofs => {
            Request::new(move |n| load::http("PUT", &format!("/v1/state/kv/bench/{}", n % KEYS), &bearer, &value(n)))
        }
        What::StateGet => {
            for n in 0..KEYS.min(1000) {
                let path = format!("/v1/state/kv/bench/{n}");
                client.send(client.request(Method::PUT, &path).body(value(n))).await?;
            }
            Request::new(move |n| load::http("GET", &format!("/v1/state/kv/bench/{}", n % KEYS.min(1000)), &bearer, ""))
        }
        What::Evaluate => {
            let office = policy::Office::open(ours, client).await?;
            let bundle = office.of_size(1).await?;
            office.activate(&bundle).await?;
            office.evaluation(1)
        }
        // These make their own.
        What::EvaluateSizes | What::Evaluations | What::Search | What::Replay | What::Shadow | What::Swap => {
            Request::new(|_| Vec::new())
        }
        What::StateKeys | What::StateWatch | What::StateIdle | What::StateLeases | What::StateLocks => {
            Request::new(|_| Vec::new())
        }
        What::StateTxn => state::transactions(client, 0)?,
        What::StateTxnGets => state::transactions(client, 2)?,
        What::Token | What::Introspect | What::OperationUse | What::OperationHot | What::Verification => {
            token::requests(what, client, ours.dir()).await?
        }
    })
}

fn etcd_requests(what: What) -> Option<Request> {
    use crate::kernel::crypto::base64;
    let headers = "Content-Type: application/json\r\n";
    let key = |n: usize| base64(format!("bench/{}", n % KEYS));
    match what {
        What::StatePut => Some(Request::new(move |n| {
            load::http("POST", "/v3/kv/put", headers, &json!({"key": key(n), "value": base64(value(n))}).to_string())
        })),
        What::StateGet => Some(Request::new(move |n| {
            load::http(
                "POST",
                "/v3/kv/range",
                headers,
                &json!({"key": base64(format!("bench/{}", n % 1000))}).to_string(),
            )
        })),
        What::StateTxn => Some(state::etcd_transactions(0)),
        What::StateTxnGets => Some(state::etcd_transactions(2)),
        _ => None,
    }
}

fn value(n: usize) -> String {
    format!(r#"{{"n":{n:08},"text":"{}"}}"#, "x".repeat(56))
}

/// A program that a bench started and that ends with it.
fn fits(name: &str, found: bool) -> anyhow::Result<()> {
    if !found {
        bail!("{name} is not installed, so it cannot be measured beside us");
    }
    Ok(())
}
