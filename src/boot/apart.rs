//! What an operator at the machine can do while no daemon runs on the data folder: the ways back in.
//!
//! Both go through the ledger like everything else, so that the record says what was done.

use std::path::PathBuf;

use serde_json::json;

use crate::audit;
use crate::config::Loaded;
use crate::governance;
use crate::kernel::{crypto, jose, problem};
use crate::ledger::Ledger;
use crate::nexus;
use crate::store::{self, Store};

use super::{Ground, STOP_EACH, Views, files, said};

/// A new administrator.
pub struct Recovered {
    /// Its id.
    pub client_id: String,
    /// Where its secret is.
    pub file: PathBuf,
    /// The index of the entry.
    pub index: i64,
}

/// A record that goes on although something of it is lost or was changed.
pub struct Resumed {
    /// What was lost, and where the checkpoint is that had it.
    pub lost: Option<(audit::Lost, PathBuf)>,
    /// What was changed, and is accepted.
    pub accepted: Vec<String>,
    /// The index of the entry.
    pub index: i64,
}

/// Makes an administrator although there is one, and puts its credential into `admin.json`.
///
/// # Errors
/// With a sentence for the operator.
pub async fn recover(loaded: &Loaded) -> Result<Recovered, String> {
    apart(loaded, async |ground, store| {
        audit::must_write(store, &ground.config.data.dir).await?;
        let (ledger, views) = ledger(ground).await?;
        let token = ground.token(&ledger, views.clients, "http://127.0.0.1").await?;
        let client_id = uuid::Uuid::new_v4().to_string();
        let secret = crypto::base64url(crypto::random::<32>().map_err(said)?);
        let file = ground.config.data.dir.join("admin.json");
        let url = files::last_url(&ground.config.data.dir);
        let kept = json!({"url": url, "client_id": client_id, "client_secret": secret});
        // Written before it is registered: a crash in between leaves a secret without a client, and never the reverse.
        let beside = files::beside(&file, &kept)?;
        let index = token.recover_admin(&client_id, &secret).await.map_err(said)?;
        std::fs::rename(&beside, &file).map_err(|e| format!("{}: {e}", file.display()))?;
        Ok(Recovered { client_id, file, index })
    })
    .await
}

/// Goes on with a record that lost entries that were published, or in which something was changed. `None`: nothing is wrong.
///
/// # Errors
/// With a sentence for the operator.
pub async fn resume(loaded: &Loaded, reason: &str) -> Result<Option<Resumed>, String> {
    apart(loaded, async |ground, store| {
        let data = &ground.config.data.dir;
        let (lost, accepted) = (audit::lost(store, data).await?, audit::damaged(store).await?);
        if lost.is_none() && accepted.is_empty() {
            return Ok(None);
        }
        let (ledger, _) = ledger(ground).await?;
        let mut resumed = Resumed { lost: None, accepted: Vec::new(), index: -1 };
        if !accepted.is_empty() {
            resumed.index = audit::accept(&ledger, store, &accepted, reason).await.map_err(said)?.index;
            resumed.accepted = accepted;
        }
        if let Some(lost) = lost {
            let (done, aside) = audit::resume(&ledger, data, &lost, reason).await.map_err(said)?;
            resumed.index = done.index;
            resumed.lost = Some((lost, aside));
        }
        Ok(Some(resumed))
    })
    .await
}

/// Examines the whole record as it is stored, and writes nothing: how many entries, and what was changed.
///
/// # Errors
/// With a sentence for the operator.
pub async fn diagnose(loaded: &Loaded) -> Result<(i64, Vec<audit::Finding>), String> {
    apart(loaded, async |ground, store| {
        let halt = audit::check_at_start(store, &ground.config.data.dir).await?;
        let records = vec![governance::records(store), nexus::records(store)];
        let (entries, mut found) = audit::diagnose(store, records).await.map_err(said)?;
        // What only the checkpoint in the data folder tells.
        if let Some(halt) = halt
            && (found.is_empty() || halt.problem == &problem::RECORD_BEHIND)
        {
            found.push(audit::Finding { index: None, what: halt.why });
        }
        Ok((entries, found))
    })
    .await
}

async fn ledger(ground: &Ground<'_>) -> Result<(Ledger, Views), String> {
    let views = ground.views()?;
    Ok((ground.ledger(&views).await?, views))
}

/// Takes the folder and the database, does it, and lets go of both.
async fn apart<T>(
    loaded: &Loaded,
    work: impl AsyncFnOnce(&Ground<'_>, &Store) -> Result<T, String>,
) -> Result<T, String> {
    let config = &loaded.config;
    let _folder = store::take_folder(&config.data.dir)?;
    let store = Store::open(config).await?;
    let done = async {
        store.migrate().await?;
        jose::install();
        let ground = Ground::new(config, &store)?;
        let done = work(&ground, &store).await;
        ground.tasks.stop(STOP_EACH).await;
        done
    };
    let done = done.await;
    store.stop().await;
    done
}
