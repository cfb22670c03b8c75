//! `sop`: parse, run, exit code.

use std::process::ExitCode;

/// The C library's allocator took a fifth of the daemon's time under load, much of it in giving memory back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    sop::cli::run()
}
