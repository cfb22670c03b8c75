//! `sop admin`: the way back in, for an operator at the machine.

use anyhow::anyhow;
use clap::Subcommand;
use serde_json::json;

use crate::boot;

use super::{Global, say, serve};

#[derive(Subcommand)]
pub(crate) enum AdminCommand {
    /// Make a new administrator although there is one, and put its credential into admin.json; the daemon must not run
    Recover,
}

pub(crate) async fn run(global: &Global, command: AdminCommand) -> anyhow::Result<()> {
    let AdminCommand::Recover = command;
    let done = boot::recover(&serve::load(global, None)?).await.map_err(|e| anyhow!(e))?;
    if global.json {
        say(json!({"client_id": done.client_id, "file": done.file.display().to_string(), "index": done.index}));
    } else {
        say(format!(
            "client {} is an administrator, by entry {}; its secret is in {}",
            done.client_id,
            done.index,
            done.file.display()
        ));
    }
    Ok(())
}
