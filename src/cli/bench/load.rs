//! The load: one keep-alive connection a client, one request at a time on each, latencies of all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::kernel::Clock;
use crate::kernel::supervisor::detach;

/// How long a round runs before it counts.
const WARM_UP: Duration = Duration::from_secs(1);

/// Makes the n-th request of a round.
#[derive(Clone)]
pub(super) struct Request(Arc<dyn Fn(usize) -> Vec<u8> + Send + Sync>);

impl Request {
    pub fn new(make: impl Fn(usize) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self(Arc::new(make))
    }
}

/// A request as it goes over the wire.
pub(super) fn http(method: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}

/// What a round came to.
#[derive(Clone, Debug)]
pub(super) struct Figures {
    pub rate: f64,
    pub p50: f64,
    pub p99: f64,
    pub failed: usize,
    /// The smallest part that one of several daemons had.
    pub share: f64,
}

impl Figures {
    /// The median of each figure.
    pub fn median(rounds: Vec<Self>) -> Self {
        let middle = |f: fn(&Self) -> f64| {
            let mut all: Vec<f64> = rounds.iter().map(f).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        Self {
            rate: middle(|r| r.rate),
            p50: middle(|r| r.p50),
            p99: middle(|r| r.p99),
            failed: rounds.iter().map(|r| r.failed).sum(),
            share: middle(|r| r.share),
        }
    }

    /// Of daemons that shared the load at the same time.
    pub fn shared(each: Vec<Self>) -> Self {
        let rate: f64 = each.iter().map(|r| r.rate).sum();
        let most = |f: fn(&Self) -> f64| each.iter().map(f).fold(0.0, f64::max);
        Self {
            rate,
            p50: most(|r| r.p50),
            p99: most(|r| r.p99),
            failed: each.iter().map(|r| r.failed).sum(),
            share: each.iter().map(|r| r.rate / rate).fold(1.0, f64::min),
        }
    }
}

/// One round: so many clients for so long, after a warm-up.
pub(super) async fn round(
    address: &str,
    request: &Request,
    clients: usize,
    length: Duration,
) -> anyhow::Result<Figures> {
    let clock = Clock::system();
    let began = clock.elapsed() + WARM_UP;
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for _ in 0..clients {
        let (address, request, clock, next) = (address.to_owned(), request.clone(), clock.clone(), next.clone());
        tasks.push(detach(async move { client(&address, &request, &clock, &next, began, length).await }));
    }
    let (mut all, mut failed) = (Vec::new(), 0);
    for task in tasks {
        let (latencies, f) = task.await??;
        all.extend(latencies);
        failed += f;
    }
    if all.is_empty() {
        bail!("nothing was answered");
    }
    all.sort_unstable();
    let at = |q: f64| all[((all.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e3;
    Ok(Figures { rate: all.len() as f64 / length.as_secs_f64(), p50: at(0.5), p99: at(0.99), failed, share: 1.0 })
}

/// Sends so many requests, with so many clients, each of which must succeed.
pub(super) async fn fill(address: &str, request: &Request, clients: usize, count: usize) -> anyhow::Result<()> {
    let next = Arc::new(AtomicUsize::new(0));
    let each = (0..clients).map(|_| {
        let (address, request, next) = (address.to_owned(), request.clone(), next.clone());
        detach(async move {
            let (mut stream, mut buffer) = (connect(&address).await?, Vec::new());
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= count {
                    return anyhow::Ok(());
                }
                stream.write_all(&(request.0)(n)).await?;
                let status = answer(&mut stream, &mut buffer).await?;
                if !(200..300).contains(&status) {
                    bail!("{status} to request {n}: {}", String::from_utf8_lossy(&buffer));
                }
            }
        })
    });
    for done in each.collect::<Vec<_>>() {
        done.await??;
    }
    Ok(())
}

/// A request of a load that does not wait for answers.
#[derive(Clone, Copy)]
pub(super) struct Timed {
    /// Which request of all.
    pub number: usize,
    /// When it was to be sent.
    pub due: Duration,
    /// From being sent to its answer.
    pub took: Duration,
    /// From when it was due: with what it had to wait for an answer to another.
    pub late: Duration,
}

/// So many requests a second for so long, whether the answers keep up or not.
pub(super) async fn paced(
    address: &str,
    request: &Request,
    clients: usize,
    rate: f64,
    length: Duration,
) -> anyhow::Result<Vec<Timed>> {
    let clock = Clock::system();
    let (began, next) = (clock.elapsed(), Arc::new(AtomicUsize::new(0)));
    let each = (0..clients).map(|_| {
        let (address, request, clock, next) = (address.to_owned(), request.clone(), clock.clone(), next.clone());
        detach(async move {
            let (mut stream, mut buffer, mut all) = (connect(&address).await?, Vec::new(), Vec::new());
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let due = Duration::from_secs_f64(n as f64 / rate);
                if due >= length {
                    return anyhow::Ok(all);
                }
                let mut from = began + due;
                let now = clock.elapsed();
                if now < from {
                    tokio::time::sleep(from - now).await;
                    from = clock.elapsed();
                }
                let sent = clock.elapsed();
                stream.write_all(&(request.0)(n)).await?;
                let status = answer(&mut stream, &mut buffer).await?;
                if !(200..300).contains(&status) {
                    bail!("{status}: {}", String::from_utf8_lossy(&buffer));
                }
                let now = clock.elapsed();
                all.push(Timed { number: n, due, took: now.saturating_sub(sent), late: now.saturating_sub(from) });
            }
        })
    });
    let mut all = Vec::new();
    for client in each.collect::<Vec<_>>() {
        all.extend(client.await??);
    }
    Ok(all)
}

/// A quantile of latencies, milliseconds.
pub(super) fn quantile(latencies: impl IntoIterator<Item = Duration>, q: f64) -> f64 {
    let mut all: Vec<Duration> = latencies.into_iter().collect();
    all.sort_unstable();
    let at = (all.len().saturating_sub(1) as f64 * q) as usize;
    all.get(at).map_or(f64::NAN, |d| d.as_secs_f64() * 1e3)
}

/// A client of its own: one connection, one request at a time, whose answers are read.
pub(super) struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Wire {
    pub async fn to(address: &str) -> anyhow::Result<Self> {
        Ok(Self { stream: connect(address).await?, buffer: Vec::new() })
    }

    /// The JSON that a request is answered with, which must succeed.
    pub async fn json(&mut self, request: &[u8]) -> anyhow::Result<serde_json::Value> {
        self.stream.write_all(request).await?;
        let status = answer(&mut self.stream, &mut self.buffer).await?;
        if !(200..300).contains(&status) {
            bail!("{status}: {}", String::from_utf8_lossy(&self.buffer));
        }
        let body = self.buffer.windows(4).position(|w| w == b"\r\n\r\n").map_or(0, |end| end + 4);
        Ok(serde_json::from_slice(&self.buffer[body..])?)
    }
}

async fn connect(address: &str) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("{address} does not answer"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn client(
    address: &str,
    request: &Request,
    clock: &Clock,
    next: &AtomicUsize,
    began: Duration,
    length: Duration,
) -> anyhow::Result<(Vec<Duration>, usize)> {
    let mut stream = connect(address).await?;
    let (mut latencies, mut failed, mut buffer) = (Vec::new(), 0, Vec::with_capacity(4096));
    loop {
        let bytes = (request.0)(next.fetch_add(1, Ordering::Relaxed));
        let sent = clock.elapsed();
        if sent >= began + length {
            return Ok((latencies, failed));
        }
        stream.write_all(&bytes).await?;
        let status = answer(&mut stream, &mut buffer).await?;
        if sent >= began {
            match status {
                200..300 => latencies.push(clock.elapsed().saturating_sub(sent)),
                _ => failed += 1,
            }
        }
    }
}

/// Reads one answer whole; its status.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> anyhow::Result<u16> {
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            bail!("the connection was closed in the middle of an answer");
        }
        let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let head = std::str::from_utf8(&buffer[..end]).context("the head of an answer is not text")?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("an answer has no status")?;
        let length = head.lines().find_map(|l| {
            let (name, value) = l.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
        });
        let whole = end + 4 + length.context("an answer has no length")?;
        while buffer.len() < whole {
            if stream.read_buf(buffer).await? == 0 {
                bail!("the connection was closed in the middle of an answer");
            }
        }
        return Ok(status);
    }
}
