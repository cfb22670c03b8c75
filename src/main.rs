//! `sop`: parse, run, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    sop::cli::run()
}
