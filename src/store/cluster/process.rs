//! The processes of the private cluster: finding the programs, running them as someone who is not root, knowing whether the
//! server lives.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, getuid, kill_process};

/// The oldest PostgreSQL that serves.
const OLDEST: u32 = 14;

/// Where `postgres` and `initdb` are.
pub(super) fn programs(given: Option<&Path>) -> Result<PathBuf, String> {
    let has = |dir: &Path| dir.join("postgres").is_file() && dir.join("initdb").is_file();
    if let Some(dir) = given {
        return if has(dir) {
            Ok(dir.into())
        } else {
            Err(format!("database.bin_dir: {} has no postgres and initdb", dir.display()))
        };
    }
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path().join("bin"))))
        .filter(|(version, dir)| *version >= OLDEST && has(dir))
        .collect();
    found.sort();
    let others = ["/usr/local/pgsql/bin", "/usr/bin", "/usr/local/bin"].map(PathBuf::from);
    let found = found.pop().map(|(_, dir)| dir).or_else(|| others.into_iter().find(|d| has(d)));
    found.ok_or_else(|| {
        format!("no PostgreSQL server programs ({OLDEST} or later) were found: install them (Debian: apt-get install postgresql), or set database.url or database.bin_dir")
    })
}

/// Bytes that a session of PostgreSQL keeps between statements, at most.
const KEPT: &str = "16777216";

/// As whom the server runs.
#[derive(Clone, Debug)]
pub(super) struct RunAs {
    name: String,
    /// Set when privileges must be dropped.
    ids: Option<(u32, u32)>,
    /// The user this process runs as.
    own: String,
}

impl RunAs {
    /// Root runs it as the service user; anyone else as themselves.
    pub fn choose(service_user: &str) -> Result<Self, String> {
        let users = std::fs::read_to_string("/etc/passwd").map_err(|e| format!("/etc/passwd cannot be read: {e}"))?;
        let users: Vec<Vec<&str>> = users.lines().map(|l| l.split(':').collect()).collect();
        let uid = getuid();
        let own = users
            .iter()
            .find(|u| u.get(2) == Some(&uid.as_raw().to_string().as_str()))
            .map_or("root", |u| u[0])
            .to_owned();
        if !uid.is_root() {
            return Ok(Self { name: own.clone(), ids: None, own });
        }
        let user = users.iter().find(|u| u.first() == Some(&service_user));
        let ids = user.and_then(|u| Some((u.get(2)?.parse().ok()?, u.get(3)?.parse().ok()?)));
        let ids = ids.ok_or_else(|| format!("started as root, PostgreSQL must run as another user, and there is no user {service_user} (database.service_user)"))?;
        Ok(Self { name: service_user.to_owned(), ids: Some(ids), own })
    }

    /// The system users that may connect as `sop`.
    pub fn names(&self) -> Vec<&str> {
        if self.name == self.own { vec![&self.own] } else { vec![&self.own, &self.name] }
    }

    fn apply(&self, command: &mut Command) {
        if let Some((uid, gid)) = self.ids {
            command.uid(uid).gid(gid);
        }
    }
}

/// Makes a folder that belongs to the server's user.
pub(super) fn own_folder(dir: &Path, mode: u32, user: &RunAs) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{} cannot be made: {e}", dir.display());
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(failed)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    match user.ids {
        Some((uid, gid)) => std::os::unix::fs::chown(dir, Some(uid), Some(gid)).map_err(failed),
        None => Ok(()),
    }
}

/// Makes a cluster: UTF-8, locale C (text sorts by its bytes, whatever the system's libraries), page checksums.
pub(super) async fn init(bin: &Path, dir: &Path, sync: bool, user: &RunAs) -> Result<(), String> {
    let mut command = Command::new(bin.join("initdb"));
    command.arg("-D").arg(dir).args([
        "-U",
        "sop",
        "-E",
        "UTF8",
        "--locale=C",
        "-k",
        "--auth-local=peer",
        "--auth-host=reject",
        "--no-instructions",
    ]);
    if !sync {
        command.arg("--no-sync");
    }
    user.apply(&mut command);
    command.current_dir("/").stdin(Stdio::null());
    let done =
        tokio::process::Command::from(command).output().await.map_err(|e| format!("initdb cannot be run: {e}"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let hint = if said.contains("Permission denied") || said.contains("could not access") {
        format!("; the folders above {} must let the user {} through", dir.display(), user.name)
    } else {
        String::new()
    };
    Err(format!("initdb failed: {}{hint}", said.trim()))
}

/// A running server: our child, or one that an earlier daemon left.
pub(super) struct Postmaster {
    pid: Pid,
    child: Option<Child>,
}

impl Postmaster {
    pub fn spawn(bin: &Path, data: &Path, log: &Path, settings: &[(&str, &str)], user: &RunAs) -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("PostgreSQL cannot be started: {e}");
        let log: File = OpenOptions::new().create(true).append(true).open(log).map_err(failed)?;
        let mut command = Command::new(bin.join("postgres"));
        command.arg("-D").arg(data);
        for (name, value) in settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        user.apply(&mut command);
        // What a statement took is kept for the next: given back to the system each time, it is mapped and cleared anew, which
        // takes a tenth of the time of a session that writes (measured). The C library of others does not read these.
        command.env("MALLOC_TRIM_THRESHOLD_", KEPT).env("MALLOC_MMAP_THRESHOLD_", KEPT);
        // A group of its own: a signal to the daemon's group (a terminal's interrupt) must not reach it before we stop it.
        command.process_group(0).current_dir("/").stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(failed)?).stderr(log);
        let child = command.spawn().map_err(failed)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("PostgreSQL has no process id")?;
        Ok(Self { pid, child: Some(child) })
    }

    /// The server that runs on this cluster, if one does: its lock file names a process that is a postgres in that folder.
    pub fn adopt(data: &Path) -> Option<Self> {
        let pid = Pid::from_raw(lock_file(data)?)?;
        alive(pid, data).then_some(Self { pid, child: None })
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<String> {
        match &mut self.child {
            Some(child) => child.try_wait().ok().flatten().map(|s| s.to_string()),
            None => (!running(self.pid)).then(|| "gone".to_owned()),
        }
    }

    /// Stops it: a fast shutdown, and after ten seconds an immediate one.
    pub async fn stop(mut self, data: &Path) {
        for (signal, wait) in [(Signal::INT, 10), (Signal::QUIT, 5)] {
            if kill_process(self.pid, signal).is_err() {
                return;
            }
            for _ in 0..wait * 200 {
                // An adopted one is not our child and stays a zombie until process 1 reaps it: the lock file says that it has ended.
                if self.ended().is_some() || lock_file(data).is_none() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tracing::warn!(pid = self.pid(), "PostgreSQL did not stop in {wait} s");
        }
    }
}

fn lock_file(data: &Path) -> Option<i32> {
    std::fs::read_to_string(data.join("postmaster.pid")).ok()?.lines().next()?.trim().parse().ok()
}

fn alive(pid: Pid, data: &Path) -> bool {
    let of = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let program = std::fs::read_link(of.join("exe")).ok();
    let folder = std::fs::read_link(of.join("cwd")).ok();
    let is_postgres =
        program.and_then(|p| p.file_name().map(|n| n.to_string_lossy().starts_with("postgres"))).unwrap_or(false);
    is_postgres && folder.is_some_and(|f| std::fs::canonicalize(data).is_ok_and(|d| d == f))
}

/// Whether a process that is not our child runs: it is there and is no zombie.
fn running(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(')').next().and_then(|s| s.trim().chars().next()).is_some_and(|state| state != 'Z' && state != 'X')
}
