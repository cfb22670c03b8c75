//! The command line: one file a subcommand.
//!
//! **Invariants.** Exit 0 is fine, 1 refused or failed, 2 wrong use. Answers go to stdout, everything else to stderr. `--json`
//! on each command gives one JSON document, or one a line where there are many.
//!
//! **Not here.** What a command means: all but `serve`, `check`, `migrate`, `verify`, `admin`, `audit resume` and `policy lint|test|diff` are calls of the HTTP API.
//!
//! **Why this way.** An operator's tool that used the database behind the daemon's back would have no place in the record. (What must be
//! done while no daemon runs goes through the ledger all the same.)

mod admin;
mod audit;
mod bench;
mod bundle;
mod change;
mod check;
mod client;
mod demo;
mod health;
mod nexus;
mod policy;
mod process;
mod serve;
mod state;
mod status;
mod token;
mod verify;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::kernel::supervisor::STACK;

/// The System Operations Protocol of LOGOS: governance, audit, token, state, nexus and health in one daemon.
#[derive(Parser)]
#[command(name = "sop", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Args, Clone)]
pub(crate) struct Global {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Data folder of the daemon; where its address and the admin credential are found
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    Serve(serve::ServeArgs),
    /// Show the effective configuration with the origin of each key, and try every connection
    Check,
    /// Bring the database's schema up to this binary, or say what is pending
    Migrate(check::MigrateArgs),
    /// Say how the running daemon is
    Status,
    /// Verify a log, from a running daemon or a saved folder, with nothing but its public key
    Verify(verify::VerifyArgs),
    /// Get back in after every administrator was lost
    #[command(subcommand)]
    Admin(admin::AdminCommand),
    /// Look into the record
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Read and change keys
    #[command(subcommand)]
    State(state::StateCommand),
    /// Clients, access tokens, operation tokens
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// The keys that sign access tokens
    #[command(subcommand)]
    Key(token::KeyCommand),
    /// Ask the policy; change it, from a draft to a rollback; see and change the entities it knows
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Decisions that were made, and why
    #[command(subcommand)]
    Decision(bundle::DecisionCommand),
    /// See services, send and take messages
    #[command(subcommand)]
    Nexus(nexus::NexusCommand),
    /// See how everything is
    #[command(subcommand)]
    Health(health::HealthCommand),
    /// Play a day of LOGOS against a daemon, and verify the record of it offline
    Demo(demo::DemoArgs),
    /// Measure a daemon of its own, beside a peer
    Bench(bench::BenchArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Parses the command line and runs it.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    // One TLS and one signature back-end for the process, chosen before anything can choose another.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // Sockets are looked at more often than the default of every 61 tasks: under load, an answer of the database waited for
    // as many requests to have had their turn.
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .event_interval(8)
        .thread_stack_size(STACK)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return fail(&e.into()),
    };
    let done = runtime.block_on(async {
        let global = cli.global;
        match cli.command {
            Command::Serve(args) => serve::run(&global, args).await,
            Command::Check => check::run(&global).await,
            Command::Migrate(args) => check::migrate(&global, args).await,
            Command::Admin(command) => admin::run(&global, command).await,
            Command::Status => status::run(&global).await,
            Command::Verify(args) => verify::run(&global, args).await,
            Command::Audit(command) => audit::run(&global, command).await,
            Command::State(command) => state::run(&global, command).await,
            Command::Token(command) => token::run(&global, command).await,
            Command::Key(command) => token::keys(&global, command).await,
            Command::Policy(command) => policy::run(&global, command).await,
            Command::Decision(command) => bundle::decision(&global, command).await,
            Command::Nexus(command) => nexus::run(&global, command).await,
            Command::Health(command) => health::run(&global, command).await,
            Command::Demo(args) => demo::run(&global, args).await,
            Command::Bench(args) => bench::run(&global, args).await,
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Cli::command(), "sop", &mut std::io::stdout());
                Ok(())
            }
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

#[allow(clippy::print_stderr)]
fn fail(e: &anyhow::Error) -> ExitCode {
    eprintln!("sop: {e:#}");
    if let Some(other) = e.downcast_ref::<OtherFailed>() {
        return ExitCode::from(other.code());
    }
    if e.is::<WrongUse>() { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// A command that was run for the user failed: its exit code is ours; 128 and the signal, where a signal ended it.
#[derive(Debug, thiserror::Error)]
#[error("{program} ended with {status}")]
pub(crate) struct OtherFailed {
    pub program: String,
    pub status: ExitStatus,
}

impl OtherFailed {
    fn code(&self) -> u8 {
        let code = self.status.code().or(self.status.signal().map(|s| 128 + s)).unwrap_or(1);
        u8::try_from(code).unwrap_or(1)
    }
}

/// Used in a way that cannot be seen from the arguments alone: exit 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WrongUse(pub String);

/// Prints an answer on stdout. A closed pipe (`sop ... | head`) is no failure.
pub(crate) fn say(text: impl std::fmt::Display) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
