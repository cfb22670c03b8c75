//! A proxy that knows when PostgreSQL commits, so that a test can break a connection just before, just after, or in the middle.
//!
//! A fault is armed by the test, hits one statement of one connection, and is asked afterwards whether it did:
//! ```ignore
//! let fault = proxy.arm(Fault::cut_after().committing("ledger.entries"));
//! client.put(..).await;
//! fault.hit().await;
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

use super::PATIENCE;
use super::postgres::Database;
use super::reaper;
use super::wire::{self, Session, Statement};

const SOCKET: &str = ".s.PGSQL.5432";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// The server has not seen the statement.
    Before,
    /// The server runs it, holds its locks, and waits for the Sync.
    Within,
    /// The server has answered; the client does not know.
    After,
}

/// What is to happen, and to which statement.
#[derive(Clone, Debug)]
pub struct Fault {
    point: Point,
    cut: bool,
    hold: bool,
    from: String,
    on: Option<String>,
    committing: Option<String>,
    nth: usize,
}

impl Fault {
    fn at(point: Point, cut: bool, hold: bool) -> Self {
        Self { point, cut, hold, from: "sop/".into(), on: None, committing: None, nth: 1 }
    }

    /// The connection is cut; the server never receives the statement.
    pub fn cut_before() -> Self {
        Self::at(Point::Before, true, false)
    }

    /// The server has done it and said so; the connection is cut before the client hears.
    pub fn cut_after() -> Self {
        Self::at(Point::After, true, false)
    }

    /// The client freezes between Execute and Sync until released: the server is `active` and keeps its locks.
    pub fn stall() -> Self {
        Self::at(Point::Within, false, true)
    }

    /// Everything on the connection waits before the statement until released.
    pub fn hold_before() -> Self {
        Self::at(Point::Before, false, true)
    }

    /// The answer waits until released.
    pub fn hold_after() -> Self {
        Self::at(Point::After, false, true)
    }

    /// A cut waits until released, so that the test can let others go on in between.
    pub fn paused(mut self) -> Self {
        self.hold = true;
        self
    }

    /// A statement whose SQL has this in it.
    pub fn on(mut self, sql: &str) -> Self {
        self.on = Some(sql.to_ascii_lowercase());
        self
    }

    /// The end of a transaction whose SQL has this in it, be it a `COMMIT` or one statement alone.
    pub fn committing(mut self, sql: &str) -> Self {
        self.committing = Some(sql.to_ascii_lowercase());
        self
    }

    /// Connections whose application name starts so (`sop/` by default).
    pub fn from(mut self, name: &str) -> Self {
        self.from = name.into();
        self
    }

    /// Not the first that fits but this one (from 1).
    pub fn nth(mut self, nth: usize) -> Self {
        self.nth = nth;
        self
    }

    fn fits(&self, application: &str, statement: &Statement) -> bool {
        let has = |part: &Option<String>, text: &str| {
            part.as_ref().is_none_or(|part| text.to_ascii_lowercase().contains(part.as_str()))
        };
        application.starts_with(&self.from)
            && (self.point != Point::Within || statement.extended)
            && (self.committing.is_none() || statement.commits)
            && has(&self.on, &statement.sql)
            && has(&self.committing, &statement.transaction)
    }
}

/// What a fault met.
#[derive(Clone, Debug)]
pub struct Hit {
    pub application: String,
    pub sql: String,
    /// The server's last command tag (`COMMIT`, `ROLLBACK`, `INSERT 0 1`), where the fault is after the answer.
    pub tag: Option<String>,
}

/// A fault that waits for its statement. Dropping it lets go what it holds and disarms it.
pub struct Armed {
    shared: Arc<Shared>,
    pending: Arc<Mutex<Vec<Arc<Shared>>>>,
}

struct Shared {
    fault: Fault,
    seen: Mutex<usize>,
    hit: watch::Sender<Option<Hit>>,
    gate: Semaphore,
}

impl Armed {
    /// Waits until it happened and says to what.
    pub async fn hit(&self) -> Hit {
        let mut hit = self.shared.hit.subscribe();
        let found = tokio::time::timeout(PATIENCE, hit.wait_for(Option::is_some)).await;
        let found = found.unwrap_or_else(|_| panic!("the fault never happened: {:?}", self.shared.fault));
        found.expect("the proxy runs").clone().expect("hit")
    }

    /// Whether it happened.
    pub fn fired(&self) -> bool {
        self.shared.hit.borrow().is_some()
    }

    /// Lets go what it holds.
    pub fn release(&self) {
        self.shared.gate.add_permits(1);
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        self.pending.lock().expect("lock").retain(|other| !Arc::ptr_eq(other, &self.shared));
        self.release();
    }
}

/// A socket folder that looks like PostgreSQL's.
pub struct Proxy {
    sockets: PathBuf,
    pending: Arc<Mutex<Vec<Arc<Shared>>>>,
    _task: JoinSet<()>,
}

impl Proxy {
    /// Before the cluster of this database.
    pub fn before(database: &Database) -> Self {
        let sockets = reaper::folder("px");
        let listener = UnixListener::bind(sockets.join(SOCKET)).expect("bind");
        let server = database.cluster.sockets.join(SOCKET);
        let pending = Arc::new(Mutex::new(Vec::new()));
        let faults = pending.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(serve(client, server.clone(), faults.clone()));
            }
        });
        Self { sockets, pending, _task: task }
    }

    /// The folder to give as host.
    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// From now on the next statement that fits is hit.
    pub fn arm(&self, fault: Fault) -> Armed {
        let shared =
            Arc::new(Shared { fault, seen: Mutex::new(0), hit: watch::Sender::new(None), gate: Semaphore::new(0) });
        self.pending.lock().expect("lock").push(shared.clone());
        Armed { shared, pending: self.pending.clone() }
    }
}

/// What the two directions of a connection tell each other.
#[derive(Default)]
struct Link {
    state: Mutex<Answers>,
    answered: Notify,
    unmuted: Notify,
}

#[derive(Default)]
struct Answers {
    /// ReadyForQuery seen of the server.
    ready: u64,
    /// Nothing is passed to the client: it is kept.
    muted: bool,
    tag: Option<String>,
}

async fn serve(mut client: UnixStream, server: PathBuf, faults: Arc<Mutex<Vec<Arc<Shared>>>>) {
    let Ok(mut server) = UnixStream::connect(server).await else { return };
    let Some(application) = greet(&mut client, &mut server).await else { return };
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let link = Arc::new(Link::default());
    // Whoever ends first ends the connection: both sockets close when the futures are dropped.
    tokio::select! {
        () = ask(client_in, server_out, &application, &faults, &link) => {}
        () = answer(server_in, client_out, &link) => {}
    }
}

/// Passes the startup message; the application's name. No TLS on a unix socket.
async fn greet(client: &mut UnixStream, server: &mut UnixStream) -> Option<String> {
    loop {
        let mut head = [0; 8];
        client.read_exact(&mut head).await.ok()?;
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let code = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        if code == wire::SSL || code == wire::GSS {
            client.write_all(b"N").await.ok()?;
            continue;
        }
        let mut message = head.to_vec();
        message.resize(length.clamp(8, 65_536), 0);
        client.read_exact(&mut message[8..]).await.ok()?;
        server.write_all(&message).await.ok()?;
        return Some(wire::startup(&message, "application_name").unwrap_or_default());
    }
}

/// From the client to the server.
async fn ask(
    mut client: OwnedReadHalf,
    mut server: OwnedWriteHalf,
    application: &str,
    faults: &Mutex<Vec<Arc<Shared>>>,
    link: &Link,
) {
    let (mut buffer, mut out, mut session) = (Vec::new(), Vec::new(), Session::default());
    // The server says ReadyForQuery once after authentication, then once for each Query or Sync.
    let mut asked: u64 = 1;
    // A fault that waits for the Sync of its Execute.
    let mut held: Option<(Arc<Shared>, Statement)> = None;
    loop {
        while let Some((kind, message)) = wire::take(&mut buffer) {
            if let Some(statement) = session.read(kind, &message)
                && let Some(fault) = hit_by(faults, application, &statement)
            {
                if fault.fault.point == Point::Before {
                    if server.write_all(&out).await.is_err() {
                        return;
                    }
                    out.clear();
                    report(&fault, application, &statement, None);
                    if wait(&fault).await {
                        return;
                    }
                } else {
                    held = Some((fault, statement));
                }
            }
            let ends = matches!(kind, b'Q' | b'S');
            if ends && let Some((fault, statement)) = held.take() {
                if fault.fault.point == Point::Within {
                    if server.write_all(&out).await.is_err() {
                        return;
                    }
                    out.clear();
                    report(&fault, application, &statement, None);
                    if wait(&fault).await {
                        return;
                    }
                } else {
                    link.state.lock().expect("lock").muted = true;
                    out.extend_from_slice(&message);
                    asked += 1;
                    if server.write_all(&out).await.is_err() {
                        return;
                    }
                    out.clear();
                    let tag = answered(link, asked).await;
                    report(&fault, application, &statement, tag);
                    if wait(&fault).await {
                        return;
                    }
                    link.state.lock().expect("lock").muted = false;
                    link.unmuted.notify_one();
                    continue;
                }
            }
            asked += u64::from(ends);
            out.extend_from_slice(&message);
        }
        if server.write_all(&out).await.is_err() {
            return;
        }
        out.clear();
        match client.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// From the server to the client. While a fault keeps the answers, they are read and counted but not passed.
async fn answer(mut server: OwnedReadHalf, mut client: OwnedWriteHalf, link: &Link) {
    let (mut buffer, mut out) = (Vec::new(), Vec::new());
    loop {
        tokio::select! {
            read = server.read_buf(&mut buffer) => if !matches!(read, Ok(n) if n > 0) { break },
            () = link.unmuted.notified() => {}
        }
        while let Some((kind, message)) = wire::take(&mut buffer) {
            let mut state = link.state.lock().expect("lock");
            match kind {
                b'C' => state.tag = Some(wire::text(&message[5..]).0),
                b'Z' => state.ready += 1,
                _ => {}
            }
            out.extend_from_slice(&message);
        }
        link.answered.notify_one();
        if link.state.lock().expect("lock").muted {
            continue;
        }
        if client.write_all(&out).await.is_err() {
            break;
        }
        out.clear();
    }
}

/// Waits until the server has said ReadyForQuery so often; its last command tag.
async fn answered(link: &Link, ready: u64) -> Option<String> {
    loop {
        {
            let state = link.state.lock().expect("lock");
            if state.ready >= ready {
                return state.tag.clone();
            }
        }
        link.answered.notified().await;
    }
}

/// The armed fault that this statement is the n-th to fit; it is armed no more.
fn hit_by(faults: &Mutex<Vec<Arc<Shared>>>, application: &str, statement: &Statement) -> Option<Arc<Shared>> {
    let mut faults = faults.lock().expect("lock");
    let at = faults.iter().position(|armed| {
        let mut seen = armed.seen.lock().expect("lock");
        *seen += usize::from(armed.fault.fits(application, statement));
        *seen == armed.fault.nth && armed.fault.fits(application, statement)
    })?;
    Some(faults.remove(at))
}

fn report(fault: &Shared, application: &str, statement: &Statement, tag: Option<String>) {
    let hit = Hit { application: application.to_owned(), sql: statement.sql.clone(), tag };
    fault.hit.send_replace(Some(hit));
}

/// Holds as long as the fault says; whether the connection is to be cut then.
async fn wait(fault: &Shared) -> bool {
    if fault.fault.hold {
        let _ = fault.gate.acquire().await;
    }
    fault.fault.cut
}
