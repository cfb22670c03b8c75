//! The real daemon as a child process.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{PATIENCE, reaper, soon};

/// How to start one; kept, so that it can be started again on the same folder and database.
#[derive(Clone)]
pub struct Launch {
    pub dir: PathBuf,
    url: String,
    env: Vec<(String, String)>,
    config: Option<PathBuf>,
    small: Option<u32>,
}

impl Launch {
    /// In a new data folder, on the database at this URL (of `Database::url` or `url_via`).
    pub fn on(url: String) -> Self {
        Self { dir: reaper::folder("d"), url, env: Vec::new(), config: None, small: None }
    }

    /// With a configuration key: `SOP__TOKEN__TTL`.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// The same folder, on another database.
    pub fn database(mut self, url: String) -> Self {
        self.url = url;
        self
    }

    /// Its folder is a file system of its own, of so many MiB, which goes with the daemon. Only root can do this.
    pub fn small(mut self, megabytes: u32) -> Self {
        self.small = Some(megabytes);
        self
    }

    /// With a configuration file.
    pub fn config(mut self, file: PathBuf) -> Self {
        self.config = Some(file);
        self
    }

    /// A second daemon on the database of the first, with the same master key.
    pub fn beside(first: &Daemon, url: String) -> Self {
        let key = first.launch.dir.join("master.key");
        Self::on(url).env("SOP__SECRETS__MASTER_KEY_FILE", &key.display().to_string())
    }

    /// On a private PostgreSQL in its data folder.
    pub fn alone() -> Self {
        Self { dir: reaper::folder("d"), url: String::new(), env: Vec::new(), config: None, small: None }
    }

    /// Runs another command on the same folder and database: whether it was content, and what it said.
    pub async fn run(&self, args: &[&str]) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sop"));
        command.args(["--data-dir"]).arg(&self.dir).args(args);
        command.env("SOP__DATABASE__URL", &self.url).envs(self.env.clone()).kill_on_drop(true);
        let done = soon("it ends", command.output()).await.expect("sop runs");
        (done.status.success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
    }

    /// Starts it although it will not: what it says.
    pub async fn refused(self) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sop"));
        command
            .args(["serve", "--data-dir"])
            .arg(&self.dir)
            .env("SOP__DATABASE__URL", &self.url)
            .envs(self.env.clone());
        let done = soon("it ends", command.kill_on_drop(true).output()).await.expect("sop runs");
        assert!(!done.status.success(), "it was content");
        String::from_utf8_lossy(&done.stderr).into_owned()
    }

    /// Starts it and waits for the line that says where it listens.
    pub async fn start(self) -> Daemon {
        self.tried().await.unwrap_or_else(|log| panic!("the daemon does not listen:\n{log}"))
    }

    /// Starts it as a service manager does: again, when it ended because what it needs was away.
    pub async fn managed(self) -> Daemon {
        let began = std::time::Instant::now();
        loop {
            match self.clone().tried().await {
                Ok(daemon) => return daemon,
                Err(log) => assert!(began.elapsed() < PATIENCE, "it does not listen:\n{log}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn program(&self) -> Command {
        let Some(megabytes) = self.small else { return Command::new(env!("CARGO_BIN_EXE_sop")) };
        // A name space of mounts that only it and its children are in; it stays the same process through both `exec`.
        let mut command = Command::new("unshare");
        let script = r#"mount -t tmpfs -o size="$1"m none "$2" && shift 2 && exec "$@""#;
        command.args(["--mount", "sh", "-c", script, "sh", &megabytes.to_string()]).arg(&self.dir);
        command.arg(env!("CARGO_BIN_EXE_sop"));
        command
    }

    /// Starts it; what it said if it does not listen.
    async fn tried(self) -> Result<Daemon, String> {
        let mut child = self
            .program()
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(&self.dir)
            .args(self.config.iter().flat_map(|file| ["--config".into(), file.clone()]))
            .env("SOP__DATABASE__URL", &self.url)
            .envs(self.env.clone())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("sop runs");
        let pid = child.id().expect("it has just started");
        reaper::up(pid);
        let log = Arc::new(Mutex::new(String::new()));
        let (mut stderr, kept) = (child.stderr.take().expect("piped"), log.clone());
        tokio::spawn(async move {
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = stderr.read(&mut chunk).await {
                kept.lock().expect("lock").push_str(&String::from_utf8_lossy(&chunk[..n]));
            }
        });
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let listening = async {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(url) = line.strip_prefix("listening ") {
                    return Some(url.to_owned());
                }
            }
            None
        };
        let url = tokio::time::timeout(PATIENCE, listening).await.ok().flatten();
        let Some(url) = url else {
            let _ = child.kill().await;
            reaper::down(pid);
            return Err(log.lock().expect("lock").clone());
        };
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Daemon { launch: self, child, pid, url, log })
    }
}

/// A running daemon; killed when dropped, and its log shown if the test failed.
pub struct Daemon {
    pub launch: Launch,
    child: Child,
    pid: u32,
    pub url: String,
    log: Arc<Mutex<String>>,
}

impl Daemon {
    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// SIGSTOP.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGHUP.
    pub fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// SIGCONT.
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("it ran");
    }

    /// SIGTERM; how it ended.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        soon("it ends after SIGTERM", self.child.wait()).await.expect("its status")
    }

    /// Kills it if it runs and starts it on the same folder and database.
    pub async fn restart(mut self) -> Self {
        if self.child.try_wait().expect("its status").is_none() {
            self.kill().await;
        }
        self.launch.clone().start().await
    }

    /// What it said on stderr so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("lock").clone()
    }

    /// The first administrator's `(client_id, client_secret)`, if this daemon's folder has it.
    pub fn admin(&self) -> Option<(String, String)> {
        let name = self.launch.dir.join("admin.json");
        let seen = PathBuf::from(format!("/proc/{}/root", self.pid)).join(name.strip_prefix("/").ok()?);
        let text = std::fs::read(if self.launch.small.is_some() { seen } else { name }).ok()?;
        let json: serde_json::Value = serde_json::from_slice(&text).ok()?;
        Some((json["client_id"].as_str()?.to_owned(), json["client_secret"].as_str()?.to_owned()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        reaper::down(self.pid);
        if std::thread::panicking() {
            eprintln!("--- the daemon at {} said:\n{}", self.url, self.log());
        }
    }
}

/// Whether a process was ended by SIGKILL.
pub fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(9)
}
