//! Concurrent clients of two daemons on one private PostgreSQL, while daemons are killed and frozen and the database is killed
//! under them: what they were answered must be what one map, one operation at a time, would have answered, and what the record
//! says. `SOAK` is how many seconds of it (20), `SOAK_SEED` the seed of the throws.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder, Response};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sop::kernel::crypto;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::crash::verify;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::dice::Dice;
use crate::support::history::{Answer, Asked, Holds, Key, Operation, Record, Saw, Wrong, check};
use crate::support::{PATIENCE, record, until};

const KEYS: usize = 5;
const WORKERS: usize = 10;
/// A history is checked so often at least, that a long run ends where it goes wrong.
const EPISODE: Duration = Duration::from_secs(20);

/// A request.
enum Want {
    Get(Key),
    Put(Key, u64, Option<Holds>),
    Delete(Key, Option<i64>),
    /// Puts one key, and puts or deletes another, if a key is as it was; else reads both.
    Txn(Vec<(Key, Holds)>, [(Key, Option<u64>); 2]),
    /// Reads several keys by a transaction.
    Look(Vec<Key>),
    List,
}

/// What came of it, with what was seen and between which indexes.
type Told = (Answer, Vec<Saw>, i64, i64);

fn header(answer: &Response, name: &str) -> i64 {
    answer.headers()[name].to_str().unwrap().trim_matches('"').parse().unwrap()
}

/// The key of a list's item and what it says of it.
fn item(item: &Value) -> Saw {
    let (key, index) = (item["key"].as_str().unwrap(), item["index"].as_i64().unwrap());
    Saw { key: key.rsplit('/').next().unwrap().parse().unwrap(), index, value: Some(value(item)) }
}

fn value(item: &Value) -> u64 {
    let bytes = crypto::from_base64(item["value"].as_str().unwrap()).unwrap();
    String::from_utf8(bytes).unwrap().parse().unwrap()
}

fn absent(key: Key) -> Saw {
    Saw { key, index: 0, value: None }
}

/// What is there of these keys; the others are not.
fn among(keys: &[Key], items: impl Iterator<Item = Saw>) -> Vec<Saw> {
    let mut seen: BTreeMap<Key, Saw> = keys.iter().map(|key| (*key, absent(*key))).collect();
    seen.extend(items.map(|saw| (saw.key, saw)));
    seen.into_values().collect()
}

impl Want {
    fn asked(&self) -> Asked {
        let (when, change) = match self {
            Self::Get(_) | Self::Look(_) | Self::List => (Vec::new(), Vec::new()),
            Self::Put(key, value, when) => (when.iter().map(|w| (*key, *w)).collect(), vec![(*key, Some(*value))]),
            Self::Delete(key, at) => (vec![(*key, at.map_or(Holds::Exists, Holds::At))], vec![(*key, None)]),
            Self::Txn(when, change) => (when.clone(), change.to_vec()),
        };
        Asked { when, change }
    }

    async fn request(&self, client: &Client, base: &str) -> RequestBuilder {
        let path = |key: &Key| format!("/v1/state/kv/{base}{key}");
        let name = |key: &Key| format!("{base}{key}");
        let txn = async |body: Value| client.request(Method::POST, "/v1/state/txn").await.json(&body);
        let gets = |keys: &mut dyn Iterator<Item = &Key>| -> Vec<Value> {
            keys.map(|key| json!({"get": {"key": name(key)}})).collect()
        };
        match self {
            Self::Get(key) => client.request(Method::GET, &path(key)).await,
            Self::Put(key, value, when) => {
                let put = client.request(Method::PUT, &path(key)).await.body(value.to_string());
                match when {
                    Some(Holds::At(index)) => put.header("if-match", format!("\"{index}\"")),
                    Some(_) => put.header("if-none-match", "*"),
                    None => put,
                }
            }
            Self::Delete(key, at) => {
                let delete = client.request(Method::DELETE, &path(key)).await;
                if let Some(index) = at { delete.header("if-match", format!("\"{index}\"")) } else { delete }
            }
            Self::Txn(when, change) => {
                let condition = |(key, holds): &(Key, Holds)| {
                    let (target, operand) = match holds {
                        Holds::Value(value) => ("value", json!(crypto::base64(value.to_string()))),
                        Holds::At(index) => ("index", json!(index)),
                        other => ("exists", json!(*other == Holds::Exists)),
                    };
                    json!({"key": name(key), "target": target, "op": "eq", "operand": operand})
                };
                let mut then = gets(&mut change.iter().map(|c| &c.0));
                then.extend(change.iter().map(|(key, value)| match value {
                    Some(v) => json!({"put": {"key": name(key), "value": crypto::base64(v.to_string())}}),
                    None => json!({"delete": {"key": name(key)}}),
                }));
                let otherwise = gets(&mut change.iter().map(|c| &c.0));
                let when: Vec<Value> = when.iter().map(condition).collect();
                txn(json!({"if": when, "then": then, "else": otherwise})).await
            }
            Self::Look(keys) => txn(json!({"then": gets(&mut keys.iter())})).await,
            Self::List => client.request(Method::GET, &format!("/v1/state/kv?prefix={base}")).await,
        }
    }

    /// `None` if nothing is known.
    async fn understood(&self, answer: Response) -> Option<Told> {
        const ANY: i64 = i64::MAX;
        let (status, index) = (answer.status().as_u16(), header(&answer, "sop-index"));
        let said = |at: i64, value: u64, key: Key| Saw { key, index: at, value: Some(value) };
        let told = match (self, status) {
            (Self::Get(key), 200) => {
                let at = header(&answer, "etag");
                (Answer::Read, vec![said(at, answer.text().await.ok()?.parse().unwrap(), *key)], index, ANY)
            }
            (Self::Get(key), 404) => (Answer::Read, vec![absent(*key)], index, ANY),
            (Self::Put(..) | Self::Delete(..), 200) => {
                let body: Value = answer.json().await.ok()?;
                assert_eq!(body["index"].as_i64(), Some(index), "the header and the body name one index");
                (Answer::Done(index), Vec::new(), 0, ANY)
            }
            (Self::Delete(key, None), 404) => (Answer::Refused, vec![absent(*key)], 0, ANY),
            (Self::Put(key, ..) | Self::Delete(key, _), 412) => {
                let body: Value = answer.json().await.ok()?;
                let saw = Saw { key: *key, index: body["index"].as_i64().unwrap(), value: None };
                (Answer::Refused, vec![saw], 0, ANY)
            }
            (Self::Txn(_, change), 200) => {
                let body: Value = answer.json().await.ok()?;
                let items = body["results"].as_array().unwrap().iter().filter_map(|r| r["get"]["items"].get(0));
                let saw = among(&change.map(|c| c.0), items.map(item));
                match (body["succeeded"].as_bool().unwrap(), body["index"].as_i64().unwrap()) {
                    (true, at) => (Answer::Done(at), saw, 0, ANY),
                    // Without a change it is of the index that it names.
                    (false, at) => (Answer::Refused, saw, at, at),
                }
            }
            (Self::Look(keys), 200) => {
                let body: Value = answer.json().await.ok()?;
                let items = body["results"].as_array().unwrap().iter().filter_map(|r| r["get"]["items"].get(0));
                let at = body["index"].as_i64().unwrap();
                (Answer::Read, among(keys, items.map(item)), at, at)
            }
            (Self::List, 200) => {
                let body: Value = answer.json().await.ok()?;
                let all: Vec<Key> = (0..KEYS).collect();
                (Answer::Read, among(&all, body["items"].as_array().unwrap().iter().map(item)), index, index)
            }
            // It says whether it may have been done all the same.
            (_, 503) => {
                let text = answer.text().await.ok()?;
                let unknown = text.contains("is not known");
                (if unknown { Answer::Unknown } else { Answer::Never }, Vec::new(), 0, ANY)
            }
            // One that was being counted when its daemon froze is counted against the time when that woke up.
            (_, 429) => (Answer::Never, Vec::new(), 0, ANY),
            (_, 504) => return None,
            (_, other) => {
                let of = format!("{} {:?}", answer.url(), answer.headers());
                panic!("{other} of {of}: {}", answer.text().await.unwrap_or_default());
            }
        };
        Some(told)
    }
}

/// What all workers share in an episode.
#[derive(Clone)]
struct Scene {
    client: Arc<Client>,
    urls: [watch::Receiver<String>; 2],
    base: String,
    clock: Instant,
    values: Arc<AtomicU64>,
    /// Answers of each daemon that are more than that it cannot.
    answers: Arc<[AtomicU64; 2]>,
    stop: Arc<AtomicBool>,
}

struct Worker {
    scene: Scene,
    dice: Dice,
    /// The daemon it always goes to, or either.
    home: Option<usize>,
    /// What it last saw of each key.
    last: [Option<(u64, i64)>; KEYS],
}

impl Worker {
    fn want(&mut self) -> Want {
        let dice = &mut self.dice;
        let (key, other) = (dice.up_to(KEYS), dice.up_to(KEYS - 1));
        let other = (key + 1 + other) % KEYS;
        let mut value = || self.scene.values.fetch_add(1, Ordering::Relaxed);
        let last = self.last[key];
        match dice.up_to(100) {
            0..34 => Want::Get(key),
            34..46 => Want::Put(key, value(), None),
            46..58 => Want::Put(key, value(), Some(last.map_or(Holds::Absent, |v| Holds::At(v.1)))),
            58..63 => Want::Delete(key, None),
            63..67 => Want::Delete(key, last.map(|v| v.1)),
            67..86 => {
                let holds = last.map_or(Holds::Absent, |v| [Holds::Value(v.0), Holds::At(v.1)][dice.up_to(2)]);
                let second = (dice.up_to(3) > 0).then(&mut value);
                Want::Txn(vec![(key, holds)], [(key, Some(value())), (other, second)])
            }
            86..93 => Want::Look(vec![key, other]),
            _ => Want::List,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.scene.clock.elapsed().as_nanos()).unwrap()
    }

    async fn act(&mut self) -> Operation {
        let want = self.want();
        // Who writes alone takes turns without the lock; who does not, under it.
        let alone = self.scene.clock.elapsed().as_millis() / 1500 % 2 == 1;
        let which = if alone { 0 } else { self.home.unwrap_or_else(|| self.dice.up_to(2)) };
        let client = self.scene.client.clone_at(&self.scene.urls[which].borrow().clone());
        let request = want.request(&client, &self.scene.base).await.timeout(Duration::from_secs(3));
        let from = self.now();
        let told = match request.send().await {
            Ok(answer) => {
                let well = u64::from(answer.status().as_u16() < 500);
                self.scene.answers[which].fetch_add(well, Ordering::Relaxed);
                want.understood(answer).await
            }
            // Nobody has heard of it.
            Err(error) if error.is_connect() => Some((Answer::Never, Vec::new(), 0, i64::MAX)),
            Err(_) => None,
        };
        let (answer, saw, least, most) = told.unwrap_or((Answer::Unknown, Vec::new(), 0, i64::MAX));
        for saw in &saw {
            match saw.value {
                Some(value) => self.last[saw.key] = Some((value, saw.index)),
                None if saw.index == 0 => self.last[saw.key] = None,
                None => {}
            }
        }
        let asked = want.asked();
        if let Answer::Done(index) = answer {
            for (key, value) in &asked.change {
                self.last[*key] = value.map(|v| (v, index));
            }
        }
        let answered = !matches!(answer, Answer::Unknown | Answer::Never);
        Operation { asked, answer, saw, least, most, from, to: if answered { self.now() } else { u64::MAX } }
    }

    async fn work(mut self) -> Vec<Operation> {
        let mut done = Vec::new();
        while !self.scene.stop.load(Ordering::Acquire) {
            let op = self.act().await;
            if matches!(op.answer, Answer::Unknown | Answer::Never) {
                // A daemon that is being started takes a moment.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            // What only reads and was not answered says nothing.
            if !op.asked.change.is_empty() || matches!(op.answer, Answer::Read) {
                done.push(op);
            }
        }
        done
    }
}

const FAULTS: [&str; 7] =
    ["kill 0", "kill 1", "freeze 0", "freeze 1", "kill postmaster", "kill a backend", "end all sessions"];

/// Two daemons and the PostgreSQL that the first manages.
struct Stage {
    daemons: Vec<Daemon>,
    urls: [watch::Sender<String>; 2],
    database: PgConnectOptions,
}

fn kill(pid: &str) {
    let _ = kill_process(Pid::from_raw(pid.trim().parse().unwrap()).unwrap(), Signal::KILL);
}

impl Stage {
    async fn set() -> Self {
        let one = Launch::alone().start().await;
        let sockets = one.launch.dir.join("run");
        let two = Launch::beside(&one, format!("postgres:///sop?host={}&user=sop", sockets.display())).start().await;
        let database = PgConnectOptions::new_without_pgpass().socket(&sockets).username("sop").database("sop");
        let urls = [watch::channel(one.url.clone()).0, watch::channel(two.url.clone()).0];
        Self { daemons: vec![one, two], urls, database }
    }

    /// Asks the database about the sessions of daemons; it may be away, then there are none.
    async fn sessions(&self, sql: &'static str) -> Vec<i32> {
        let Ok(mut conn) = PgConnection::connect_with(&self.database).await else { return Vec::new() };
        sqlx::query_scalar(sql).fetch_all(&mut conn).await.unwrap_or_default()
    }

    async fn strike(&mut self, fault: &str, dice: &mut Dice) {
        let which = usize::from(fault.ends_with('1'));
        match fault {
            "kill 0" | "kill 1" => {
                let mut daemon = self.daemons.remove(which);
                daemon.kill().await;
                // What was struck before may still be on its way up.
                let daemon = daemon.launch.clone().managed().await;
                self.urls[which].send_replace(daemon.url.clone());
                self.daemons.insert(which, daemon);
            }
            "freeze 0" | "freeze 1" => {
                self.daemons[which].freeze();
                tokio::time::sleep(Duration::from_millis(500 + dice.throw() % 1000)).await;
                self.daemons[which].thaw();
            }
            "kill postmaster" => {
                let file = self.daemons[0].launch.dir.join("pg/postmaster.pid");
                // It may be on its way up.
                if let Some(pid) = std::fs::read_to_string(file).ok().and_then(|f| f.lines().next().map(str::to_owned))
                {
                    kill(&pid);
                }
            }
            "kill a backend" => {
                let sql = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'sop/%' ORDER BY pid";
                let all = self.sessions(sql).await;
                if let Some(pid) = all.get(dice.up_to(all.len().max(1))) {
                    kill(&pid.to_string());
                }
            }
            _ => {
                let sql = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'sop/%' AND pg_terminate_backend(pid)";
                self.sessions(sql).await;
            }
        }
    }

    /// Until both daemons take changes; the index of one that was before any that comes.
    async fn serve(&self, client: &Client) -> i64 {
        let mut last = 0;
        for daemon in &self.daemons {
            let (client, began) = (client.clone_at(&daemon.url), Instant::now());
            last = loop {
                let said = match client.put("lin/start", "v").await {
                    Ok(index) => break index,
                    Err(said) => said,
                };
                assert!(began.elapsed() < PATIENCE, "{} takes no changes: {said}", daemon.url);
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
        }
        last
    }

    /// Until both daemons have answered so much more.
    async fn go_on(&self, answers: &[AtomicU64; 2], more: u64) {
        let count = |which: usize| answers[which].load(Ordering::Relaxed);
        let before = [count(0), count(1)];
        until("both daemons to answer", async || (0..2).all(|d| count(d) >= before[d] + more)).await;
    }
}

/// All changes of the keys of an episode, as one daemon tells them who watches from `after` on.
async fn told(client: &Client, base: &str, mut after: i64) -> Record {
    let answer = client.request(Method::GET, "/v1/state/kv?limit=1").await.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let (head, mut record) = (header(&answer, "sop-index"), Record::default());
    while after < head {
        let (status, page) = client.get(&format!("/v1/state/watch?prefix={base}&after={after}&wait=5")).await;
        assert_eq!(status, 200, "{page}");
        for change in page["items"].as_array().unwrap() {
            let put = (change["event"] == "put").then(|| value(change));
            let key = change["key"].as_str().unwrap().rsplit('/').next().unwrap().parse().unwrap();
            record.0.entry(key).or_default().push((change["index"].as_i64().unwrap(), put));
        }
        after = page["index"].as_i64().unwrap();
    }
    record
}

/// Writes a history where it outlives the run, and says so.
fn complain(seed: u64, wrong: &Wrong, ops: &[Operation], record: &Record) -> ! {
    let mut text = format!("seed {seed}: {}\n", wrong.why);
    for o in &wrong.of {
        let _ = writeln!(text, "of operation {o}: {:?}", ops[*o]);
    }
    let said = text.clone();
    for (key, changes) in &record.0 {
        let _ = writeln!(text, "key {key} in the record: {changes:?}");
    }
    for (o, op) in ops.iter().enumerate() {
        let _ = writeln!(text, "{o}: {op:?}");
    }
    let file = std::env::temp_dir().join(format!("sop-history-{seed}.txt"));
    let kept = std::fs::write(&file, text).map_or_else(|e| e.to_string(), |()| file.display().to_string());
    panic!("this history is not linearizable; {said}SOAK_SEED={seed} throws alike, and all of it is in {kept}");
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|n| n.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn histories_under_kills_are_linearizable() {
    let began = Instant::now();
    let whole = Duration::from_secs(number("SOAK").unwrap_or(EPISODE.as_secs()));
    let of_time = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    let seed = number("SOAK_SEED").unwrap_or_else(|| u64::from(of_time()));
    println!("SOAK_SEED={seed}");
    let (mut dice, mut stage) = (Dice::new(seed), Stage::set().await);
    let mut faults: Vec<&str> = Vec::new();
    for episode in 0.. {
        let struck = act(&mut stage, &mut dice, episode, seed, &mut faults).await;
        println!("episode {episode}: {struck}");
        if began.elapsed() >= whole {
            break;
        }
    }
    verify(&stage.daemons[0]).await;
    if whole == EPISODE {
        record::check_on(&mut PgConnection::connect_with(&stage.database).await.unwrap()).await;
    }
}

/// One episode, on keys of its own; what happened in it. Each kind of fault is once in the first.
async fn act(stage: &mut Stage, dice: &mut Dice, episode: usize, seed: u64, faults: &mut Vec<&'static str>) -> String {
    // Its tokens are good for an episode.
    let client = Client::of(&stage.daemons[0]);
    let base = format!("lin/{episode}/");
    let start = stage.serve(&client).await;
    client.token().await;
    let scene = Scene {
        client: Arc::new(client),
        urls: [stage.urls[0].subscribe(), stage.urls[1].subscribe()],
        base,
        clock: Instant::now(),
        values: Arc::new(AtomicU64::new(1)),
        answers: Arc::new([AtomicU64::new(0), AtomicU64::new(0)]),
        stop: Arc::new(AtomicBool::new(false)),
    };
    let mut workers = JoinSet::new();
    for w in 0..WORKERS {
        let (scene, dice) = (scene.clone(), Dice::new(dice.throw()));
        let home = (w < 4).then_some(w % 2);
        workers.spawn(Worker { scene, dice, home, last: [None; KEYS] }.work());
    }
    let mut struck = Vec::new();
    while scene.clock.elapsed() < EPISODE || episode == 0 && struck.len() < FAULTS.len() {
        if faults.is_empty() {
            faults.extend(FAULTS);
        }
        let fault = faults.swap_remove(dice.up_to(faults.len()));
        stage.go_on(&scene.answers, 20).await;
        stage.strike(fault, dice).await;
        struck.push(fault);
    }
    stage.go_on(&scene.answers, 20).await;
    scene.stop.store(true, Ordering::Release);
    let mut ops: Vec<Operation> = workers.join_all().await.into_iter().flatten().collect();
    ops.sort_by_key(|op| op.from);
    stage.serve(&scene.client).await;
    let url = |which: usize| scene.urls[which].borrow().clone();
    let record = told(&scene.client.clone_at(&url(0)), &scene.base, start).await;
    let other = told(&scene.client.clone_at(&url(1)), &scene.base, start).await;
    let known = |op: &&Operation| !matches!(op.answer, Answer::Unknown | Answer::Never);
    let (answered, changes) = (ops.iter().filter(known).count(), record.0.values().map(Vec::len).sum::<usize>());
    if let Err(wrong) = check(&ops, &record) {
        complain(seed, &wrong, &ops, &record);
    }
    let newest = |r: &Record| r.0.values().filter_map(|c| c.last()).map(|c| c.0).max();
    // What was late may have come between the two answers.
    assert!(record == other || newest(&record) < newest(&other), "seed {seed}: two daemons tell two histories");
    assert!(answered > 300 && changes > 100, "{answered} answers, {changes} changes: too little to say");
    let unknown = ops.iter().filter(|op| op.answer == Answer::Unknown).count();
    format!("{answered} answers, {changes} changes, {unknown} of unknown fate; {struck:?}")
}
