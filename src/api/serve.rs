//! The accept loops: TCP (with TLS, or on loopback) and unix sockets, one HTTP/1.1 connection a task, drained when the daemon stops.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::HttpBody as _;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::kernel::supervisor::{self, Stop};
use crate::kernel::web::LARGE;

use super::linger::Linger;
use super::quiet::Quiet;
use super::refused::{Layer, Refused};
use super::tls::Certificates;

/// The other end of a connection; `None` on a unix socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub Option<IpAddr>);

/// A socket that is bound and not yet served.
pub enum Listener {
    /// TCP, with TLS if there are certificates.
    Tcp(TcpListener, Option<Arc<Certificates>>),
    /// A unix socket, removed when the daemon stops.
    Unix(UnixListener, PathBuf),
}

/// What was bound.
pub struct Bound {
    /// The socket.
    pub listener: Listener,
    /// `https://10.0.0.7:7070`, `http://127.0.0.1:7070`, `unix:/run/sop.sock`.
    pub url: String,
}

impl Bound {
    /// Binds `ADDR:PORT` (port 0 takes any free one) or `unix:PATH`. Plain HTTP is refused on an address that is not loopback.
    ///
    /// # Errors
    /// With a sentence for the operator.
    pub async fn bind(listen: &str, tls: Option<Arc<Certificates>>) -> Result<Self, String> {
        if let Some(path) = listen.strip_prefix("unix:") {
            return bind_unix(Path::new(path));
        }
        let address: SocketAddr = match listen.parse() {
            Ok(address) => address,
            Err(_) => tokio::net::lookup_host(listen)
                .await
                .ok()
                .and_then(|mut found| found.next())
                .ok_or_else(|| format!("server.listen: {listen:?} is not ADDR:PORT or unix:PATH"))?,
        };
        if !address.ip().is_loopback() && tls.is_none() {
            return Err(format!(
                "server.listen: {address} is not a loopback address, and plain HTTP would show every token on the way; set server.tls_cert and server.tls_key, or listen on 127.0.0.1 or a unix socket"
            ));
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (listener, bound) = tcp(address).await?;
        Ok(Self { listener: Listener::Tcp(listener, tls), url: format!("{scheme}://{bound}") })
    }

    /// Binds for pages that show no one's data: plain, on any address.
    ///
    /// # Errors
    /// With a sentence for the operator.
    pub async fn bind_plain(listen: &str) -> Result<Self, String> {
        let address = listen.parse().map_err(|_| format!("server.metrics_listen: {listen:?} is not ADDR:PORT"))?;
        let (listener, bound) = tcp(address).await?;
        Ok(Self { listener: Listener::Tcp(listener, None), url: format!("http://{bound}") })
    }
}

async fn tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), String> {
    let listener = TcpListener::bind(address).await.map_err(|e| format!("{address} cannot be listened on: {e}"))?;
    let bound = listener.local_addr().map_err(|e| e.to_string())?;
    Ok((listener, bound))
}

fn bind_unix(path: &Path) -> Result<Bound, String> {
    // A socket file that nobody answers on was left by a daemon that was killed.
    if path.exists() && std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path).map_err(|e| format!("{} cannot be listened on: {e}", path.display()))?;
    let mode = std::fs::Permissions::from_mode(0o660);
    std::fs::set_permissions(path, mode).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Bound { url: format!("unix:{}", path.display()), listener: Listener::Unix(listener, path.to_owned()) })
}

/// Limits of a connection, and where it is told that one was no proper one.
#[derive(Clone)]
pub struct Connection {
    /// A request must arrive whole within this.
    pub arrival: Duration,
    /// Largest body.
    pub body: usize,
    /// What is refused.
    pub refused: Refused,
}

impl Listener {
    /// Serves until told to stop; then takes no more connections and lets requests in flight finish, for `drain` at most.
    pub async fn serve(self, router: Router, limits: Connection, drain: Duration, stop: Stop) {
        let tracker = TaskTracker::new();
        match &self {
            Self::Tcp(listener, tls) => loop {
                let accepted = tokio::select! { a = listener.accept() => a, () = stop.cancelled() => break };
                match accepted {
                    Ok((stream, peer)) => {
                        // Without this an answer waits for the acknowledgement of the one before it.
                        let _ = stream.set_nodelay(true);
                        let peer = Peer(Some(peer.ip()));
                        match tls {
                            None => spawn(&tracker, stream, peer, router.clone(), limits.clone(), stop.clone()),
                            Some(tls) => {
                                let (tls, router, stop) = (tls.acceptor(), router.clone(), stop.clone());
                                let limits = limits.clone();
                                supervisor::detach(tracker.track_future(async move {
                                    // A handshake that takes its time keeps nobody but itself waiting.
                                    match tokio::time::timeout(limits.arrival, tls.accept(stream)).await {
                                        Ok(Ok(stream)) => connection(stream, peer, router, limits, stop).await,
                                        Ok(Err(e)) => {
                                            tracing::debug!(error = %e, "a TLS handshake failed");
                                            limits.refused.note(peer.0, Layer::Transport, "tls-handshake");
                                        }
                                        Err(_) => limits.refused.note(peer.0, Layer::Transport, "tls-timeout"),
                                    }
                                }));
                            }
                        }
                    }
                    Err(e) => refused(&e).await,
                }
            },
            Self::Unix(listener, _) => loop {
                let accepted = tokio::select! { a = listener.accept() => a, () = stop.cancelled() => break };
                match accepted {
                    Ok((stream, _)) => {
                        spawn(&tracker, stream, Peer(None), router.clone(), limits.clone(), stop.clone())
                    }
                    Err(e) => refused(&e).await,
                }
            },
        }
        tracker.close();
        if tokio::time::timeout(drain, tracker.wait()).await.is_err() {
            tracing::warn!(open = tracker.len(), "connections were cut after {drain:?}");
        }
        if let Self::Unix(_, path) = &self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Accepting fails when files run out; a pause lets some close.
async fn refused(e: &std::io::Error) {
    tracing::warn!(error = %e, "a connection could not be accepted");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn spawn<S>(tracker: &TaskTracker, stream: S, peer: Peer, router: Router, limits: Connection, stop: Stop)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let work = connection(stream, peer, router, limits, stop);
    supervisor::detach(tracker.track_future(work));
}

/// Not an `async fn`: that would keep room for what it was given and for what it made of it, both, as long as the connection
/// is open, and ten thousand are.
fn connection<S>(
    stream: S,
    peer: Peer,
    router: Router,
    limits: Connection,
    stop: Stop,
) -> impl Future<Output = ()> + Send + 'static
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (refused, arrival) = (limits.refused, limits.arrival);
    let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let router = router.clone();
        async move {
            let mut request = request.map(|body| {
                if body.is_end_stream() {
                    return axum::body::Body::empty();
                }
                axum::body::Body::new(Linger::new(body, limits.body.saturating_mul(LARGE), arrival))
            });
            request.extensions_mut().insert(peer);
            // Hyper keeps the room of this future until the next request; what an answer took is given back with it.
            Box::pin(router.oneshot(request)).await
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    // Answers are gathered into one write. `pipeline_flush` would do so too, and take the limit off what waits to be written:
    // an answer without end, to a client that does not read, would be held in memory.
    http.timer(TokioTimer::new()).header_read_timeout(arrival).max_buf_size(64 * 1024).writev(false);
    let mut connection = Quiet::new(http.serve_connection(TokioIo::new(stream), service));
    async move {
        tokio::select! {
            done = &mut connection => ended(done, peer, &refused),
            () = stop.cancelled() => {
                connection.inner().graceful_shutdown();
                ended(connection.await, peer, &refused);
            }
        }
    }
}

fn ended(done: Result<(), hyper::Error>, peer: Peer, refused: &Refused) {
    if let Err(e) = done {
        if e.is_parse() || e.is_parse_too_large() {
            refused.note(peer.0, Layer::Transport, "not-http");
        } else if e.is_timeout() {
            refused.note(peer.0, Layer::Transport, "too-slow");
        }
        tracing::debug!(error = %e, "a connection ended");
    }
}
