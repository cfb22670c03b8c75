//! What a bench measures: a daemon of our own, and a peer; both end with it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// A daemon in a folder that is thrown away.
pub(super) struct Sop {
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Sop {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = folder("sop")?;
        let mut child = Command::new("/proc/self/exe")
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(&dir)
            .env("SOP__SERVER__RATE", "1000000")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let out = child.stdout.take().context("the daemon has no output")?;
        let line = BufReader::new(out).lines().next_line().await?.context("the daemon did not start")?;
        let address =
            line.strip_prefix("listening http://").context("the daemon did not say where it listens")?.to_owned();
        Ok(Self { child, dir, address })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Stops it and throws its folder away.
    pub async fn stop(mut self) {
        if let Some(pid) = self.child.id().and_then(|p| Pid::from_raw(p.cast_signed())) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await;
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// etcd, one member, on loopback.
pub(super) struct Etcd {
    #[allow(dead_code)]
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Etcd {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = folder("etcd")?;
        let (client, peer) = (free_port().await?, free_port().await?);
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let spawned = Command::new("etcd")
            .args(["--name", "bench", "--log-level", "error", "--data-dir"])
            .arg(&dir)
            .args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)])
            .args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)])
            .args(["--initial-cluster", &format!("bench={}", url(peer))])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        super::fits("etcd (Debian: apt-get install etcd-server)", spawned.is_ok())?;
        let started = Self { child: spawned?, dir, address: format!("127.0.0.1:{client}") };
        for _ in 0..200 {
            if TcpStream::connect(&started.address).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Ok(started);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("etcd did not start")
    }

    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn folder(name: &str) -> anyhow::Result<PathBuf> {
    let dir = PathBuf::from(format!("/tmp/sop-bench-{name}-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

async fn free_port() -> anyhow::Result<u16> {
    Ok(tokio::net::TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port())
}
