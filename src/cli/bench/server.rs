//! The peer that is measured beside us; it ends with the bench.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::bail;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::super::process::folder;

/// etcd, one member, on loopback.
pub(super) struct Etcd {
    #[allow(dead_code)]
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Etcd {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = folder("bench-etcd")?;
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

/// A port of loopback that nobody listens on now.
pub(super) async fn free_port() -> anyhow::Result<u16> {
    Ok(tokio::net::TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port())
}
