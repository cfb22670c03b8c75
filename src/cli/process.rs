//! A daemon of a command's own, in a folder that is thrown away.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// The daemon. It ends with the command, whichever way.
pub(super) struct Sop {
    child: Child,
    dir: PathBuf,
    address: String,
}

impl Sop {
    /// Starts it on a free port; `purpose` is in the folder's name.
    pub async fn start(purpose: &str) -> anyhow::Result<Self> {
        Self::with(purpose, &[]).await
    }

    /// Another on the same database.
    pub async fn beside(&self, purpose: &str) -> anyhow::Result<Self> {
        let (run, key) = (self.dir.join("run"), self.dir.join("master.key"));
        let url = format!("postgres:///sop?host={}&user=sop&port=5432", run.display());
        Self::with(
            purpose,
            &[("SOP__DATABASE__URL", url), ("SOP__SECRETS__MASTER_KEY_FILE", key.display().to_string())],
        )
        .await
    }

    async fn with(purpose: &str, env: &[(&str, String)]) -> anyhow::Result<Self> {
        let dir = folder(purpose)?;
        let mut child = Command::new("/proc/self/exe")
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(&dir)
            .env("SOP__SERVER__RATE", "1000000")
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let out = child.stdout.take().context("the daemon has no output")?;
        let line =
            BufReader::new(out).lines().next_line().await?.context("the daemon did not start; `sop serve` says why")?;
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

    /// Its resident memory, KiB.
    pub fn resident(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.trim().strip_suffix("kB")?.trim().parse().ok()
    }

    /// How long it and its PostgreSQL have been at work, on all cores together.
    pub fn worked(&self) -> Duration {
        let own = self.child.id();
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let ticks = processes.filter_map(|process| {
            let pid = process.file_name().to_str()?.parse::<u32>().ok()?;
            let there = std::fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&self.dir));
            if !there && Some(pid) != own {
                return None;
            }
            // After the name, which may have blanks in it: state, ppid, ..., utime and stime as the 12th and 13th.
            let stat = std::fs::read_to_string(process.path().join("stat")).ok()?;
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
            Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
        });
        let hz = rustix::param::clock_ticks_per_second();
        Duration::from_secs_f64(ticks.sum::<u64>() as f64 / hz as f64)
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

/// A new folder for `purpose`.
pub(super) fn folder(purpose: &str) -> anyhow::Result<PathBuf> {
    let dir = PathBuf::from(format!("/tmp/sop-{purpose}-{}", uuid::Uuid::new_v4().simple()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}
