//! `sop serve`: runs the daemon.

use anyhow::anyhow;
use clap::Args;

use crate::{boot, config};

use super::{Global, say};

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Where to serve: ADDR:PORT (port 0 takes any free one) or unix:PATH
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
}

pub(crate) async fn run(global: &Global, args: ServeArgs) -> anyhow::Result<()> {
    // Of the 8 KiB that each direction of a connection takes, a few hundred bytes are used. In huge pages all of it is memory:
    // 208 MiB for ten thousand watchers in the place of 152. Where the kernel does not let us, it costs just that.
    let _ = nix::sys::prctl::set_thp_disable(true);
    let loaded = load(global, args.listen)?;
    boot::serve(loaded, |url| say(format!("listening {url}"))).await.map_err(|e| anyhow!(e))
}

/// The configuration as the flags of the command line change it.
pub(super) fn load(global: &Global, listen: Option<String>) -> anyhow::Result<config::Loaded> {
    let mut flags = Vec::new();
    if let Some(dir) = &global.data_dir {
        flags.push(("data.dir".to_owned(), dir.display().to_string()));
    }
    if let Some(listen) = listen {
        flags.push(("server.listen".to_owned(), listen));
    }
    Ok(config::load(global.config.as_deref(), &flags)?)
}
