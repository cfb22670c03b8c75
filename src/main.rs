//! `sop`: parse, run, exit code.

use std::process::ExitCode;

/// The C library's allocator took a fifth of the daemon's time under load, much of it in giving memory back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Of the 8 KiB that each direction of a connection takes, a few hundred bytes are used. With huge pages all of it is memory:
    // a fifth more of what ten thousand watchers take. Where the kernel does not let us, it costs just that.
    let _ = nix::sys::prctl::set_thp_disable(true);
    sop::cli::run()
}
