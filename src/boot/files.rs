//! The files of the data folder that boot reads and writes: the master key, and where the daemon is.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::config::{self, Config};
use crate::kernel::crypto::{self, MasterKey};
use crate::token::Token;

/// The master key: the configured file, else the systemd credential `master-key`, else `DATA/master.key`, made at first start.
pub(super) fn master_key(config: &Config) -> Result<MasterKey, String> {
    let credential = config::environment("CREDENTIALS_DIRECTORY")
        .map(|d| PathBuf::from(d).join("master-key"))
        .filter(|p| p.exists());
    let own = config.data.dir.join("master.key");
    let path = config.secrets.master_key_file.clone().or(credential);
    if path.is_none() && !own.exists() {
        if config.database.url.is_none()
            && config.data.dir.join("pg/PG_VERSION").exists()
            && config.data.dir.join("admin.json").exists()
        {
            return Err(format!(
                "{} is missing: without it nothing sealed in this database opens; put it back",
                own.display()
            ));
        }
        let key = crypto::random::<32>().map_err(|e| e.to_string())?;
        private(&own, &key)?;
    }
    let path = path.unwrap_or(own);
    let bytes = std::fs::read(&path).map_err(|e| format!("the master key {} cannot be read: {e}", path.display()))?;
    let key = decode(&bytes)
        .ok_or_else(|| format!("the master key {} is neither 32 bytes nor 64 hex digits", path.display()))?;
    MasterKey::new(&key).map_err(|e| e.to_string())
}

fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
    if bytes.len() == 32 {
        return Some(bytes.to_vec());
    }
    let text = std::str::from_utf8(bytes).ok()?.trim();
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    (0..32).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()).collect()
}

/// `admin.json`: the first administrator, once. The file is written before the client is registered, so that a crash in
/// between leaves a secret that is then registered, and never a client whose secret is lost.
pub(super) async fn admin(dir: &Path, url: &str, token: &Token) -> Result<(), String> {
    let path = dir.join("admin.json");
    let (id, secret) = match std::fs::read(&path) {
        Ok(bytes) => {
            let kept: Value =
                serde_json::from_slice(&bytes).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
            let text = |name: &str| kept[name].as_str().unwrap_or_default().to_owned();
            (text("client_id"), text("client_secret"))
        }
        Err(_) => {
            (uuid::Uuid::new_v4().to_string(), crypto::base64url(crypto::random::<32>().map_err(|e| e.to_string())?))
        }
    };
    if !path.exists() {
        let text = format!("{}\n", json!({"url": url, "client_id": id, "client_secret": secret}));
        private(&path, text.as_bytes())?;
    }
    let made = token.ensure_admin(&id, &secret).await.map_err(|e| e.detail().to_owned())?;
    if made {
        tracing::info!("the first administrator's credential is in {}", path.display());
    }
    if !made && !token.has_client(&id) {
        // The database has clients, and this is none of them: a second daemon, or the administrator was replaced.
        std::fs::remove_file(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

/// `daemon.json`: written at each start, because with port 0 the port may differ.
pub(super) fn daemon(dir: &Path, url: &str) -> Result<(), String> {
    replace(&dir.join("daemon.json"), &json!({"url": url, "pid": std::process::id()}))
}

/// Where the daemon of this folder listened last.
pub(super) fn last_url(dir: &Path) -> Option<String> {
    let kept: Value = serde_json::from_slice(&std::fs::read(dir.join("daemon.json")).ok()?).ok()?;
    Some(kept["url"].as_str()?.to_owned())
}

fn replace(path: &Path, value: &Value) -> Result<(), String> {
    let beside = path.with_extension("new");
    let failed = |e: std::io::Error| format!("{} cannot be written: {e}", path.display());
    std::fs::write(&beside, format!("{value}\n")).and_then(|()| std::fs::rename(&beside, path)).map_err(failed)
}

/// Writes a private file beside another that it is to replace; answers where.
pub(super) fn beside(path: &Path, value: &Value) -> Result<PathBuf, String> {
    let beside = path.with_extension("new");
    // One that an earlier attempt left is of no use to anyone.
    let _ = std::fs::remove_file(&beside);
    private(&beside, format!("{value}\n").as_bytes())?;
    Ok(beside)
}

/// Writes a file that only its owner may read.
fn private(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{} cannot be written: {e}", path.display());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_key_is_bytes_or_hex() {
        assert_eq!(decode(&[7; 32]).unwrap(), [7; 32]);
        assert_eq!(decode(format!("{}\n", "0a".repeat(32)).as_bytes()).unwrap(), [10; 32]);
        for bad in [&b""[..], &[1; 31], "zz".repeat(32).as_bytes(), "ü".repeat(32).as_bytes()] {
            assert_eq!(decode(bad), None);
        }
    }
}
