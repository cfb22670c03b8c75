//! A shell that outlives the run by a moment: it reads what to stop from a pipe, and the end of the pipe is the end of the
//! run, a killed one included.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock};

const SCRIPT: &str = r#"
base=$1
list=" "
while read -r verb pid; do
    case $verb in
        up) list="$list$pid " ;;
        down) list="${list%% $pid *} ${list#* $pid }" ;;
    esac
done
for pid in $list; do
    case "$(readlink "/proc/$pid/exe")" in
        */sop | */sop\ *) kill -KILL "$pid" ;;
    esac
done
# By what runs there and not by lock files: those of a daemon with a disk of its own are in a name space of its own.
servers() {
    for at in /proc/[0-9]*; do
        case "$(readlink "$at/cwd")" in
            "$base"/*) case "$(readlink "$at/exe")" in */postgres*) echo "${at#/proc/}" ;; esac ;;
        esac
    done
}
tries=0
while pids=$(servers) && [ -n "$pids" ] && [ $tries -lt 100 ]; do
    [ $((tries % 20)) = 0 ] && kill -QUIT $pids
    tries=$((tries + 1))
    sleep 0.05
done
rm -rf "$base"
"#;

struct Run {
    base: PathBuf,
    pipe: Mutex<ChildStdin>,
}

fn run() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        let tmp = std::env::temp_dir();
        // A socket's path has 107 bytes at most.
        let tmp = if tmp.as_os_str().len() > 40 { PathBuf::from("/tmp") } else { tmp };
        sweep(&tmp);
        let base = tmp.join(format!("sop-suite-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(&base).expect("a folder for the run");
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "sop-suite-reaper"])
            .arg(&base)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("sh");
        let pipe = Mutex::new(shell.stdin.take().expect("piped"));
        Run { base, pipe }
    })
}

/// The run's folder; every socket, cluster and data folder is below it, and it is gone when the run is.
pub fn base() -> &'static Path {
    &run().base
}

/// A folder of its own below the run's.
pub fn folder(kind: &str) -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let dir = base().join(format!("{kind}{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(&dir).expect("a folder below the run's");
    dir
}

/// This process is to be killed when the run ends.
pub fn up(pid: u32) {
    let _ = writeln!(run().pipe.lock().expect("lock"), "up {pid}");
}

/// This one ended already.
pub fn down(pid: u32) {
    let _ = writeln!(run().pipe.lock().expect("lock"), "down {pid}");
}

/// Stops and removes what a run left whose reaper was killed too.
fn sweep(tmp: &Path) {
    for entry in fs::read_dir(tmp).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix("sop-suite-").and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if Path::new(&format!("/proc/{pid}")).exists() {
            continue;
        }
        // The same script with an empty pipe: it stops what lives below the folder and removes it. A reaper that is
        // still at it does the same, and neither minds.
        let _ = Command::new("sh")
            .args(["-c", SCRIPT, "sop-suite-reaper"])
            .arg(entry.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}
