//! Configuration: defaults < file (TOML) < environment (`SOP__TOKEN__TTL`) < flags. Unknown keys are errors.
//!
//! **Invariants.** This is the only reader of the environment. `config/sop.toml` *is* the defaults: it is compiled in and read
//! first, so the documented value and the real one cannot part.
//!
//! **Not here.** Anything that changes while the daemon runs and belongs in the record: that is state.
//!
//! **Why this way.** An operator asks "which value, and from where?". [`Loaded::effective`] answers per key.
#![allow(clippy::disallowed_methods)]

mod sections;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::{Config as Layered, File, FileFormat, Value, ValueKind};

pub use sections::*;

/// The documented defaults.
const DEFAULTS: &str = include_str!("../../config/sop.toml");
/// What starts the name of a variable that sets a key; sections are parted by two underscores.
const PREFIX: &str = "SOP__";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read or is not TOML.
    #[error("{0}")]
    Unreadable(String),
    /// A key is unknown or its value does not fit.
    #[error("{0}")]
    Wrong(String),
}

/// A configuration with where each of its values came from.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    effective: Vec<Effective>,
    /// Where it came from, to be read again.
    file: Option<PathBuf>,
    flags: Vec<(String, String)>,
}

/// One key of the effective configuration.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Effective {
    /// `token.ttl`.
    pub key: String,
    /// As text; secrets are `***`.
    pub value: String,
    /// `default`, `file`, `environment` or `flag`.
    pub origin: &'static str,
}

impl Loaded {
    /// Every key, its value and its origin, in order.
    #[must_use]
    pub fn effective(&self) -> &[Effective] {
        &self.effective
    }

    /// Reads the same file again, under the same environment and flags.
    ///
    /// # Errors
    /// As [`load`].
    pub fn again(&self) -> Result<Self, ConfigError> {
        load(self.file.as_deref(), &self.flags)
    }

    /// Keys whose values are others there.
    #[must_use]
    pub fn changed<'a>(&'a self, there: &'a Self) -> Vec<&'a str> {
        let differs = |(a, b): &(&Effective, &Effective)| a.value != b.value;
        self.effective.iter().zip(&there.effective).filter(differs).map(|(a, _)| a.key.as_str()).collect()
    }
}

/// Loads: the compiled-in defaults, then `file`, then the environment, then `flags` (`("server.listen", "127.0.0.1:0")`).
///
/// # Errors
/// When the file cannot be read, a key is unknown, or a value does not fit; the message names the key.
pub fn load(file: Option<&Path>, flags: &[(String, String)]) -> Result<Loaded, ConfigError> {
    let environment = std::env::vars_os().filter_map(|(k, v)| {
        let key = k.to_str()?.strip_prefix(PREFIX)?.to_ascii_lowercase().replace("__", ".");
        Some((key, v.to_string_lossy().into_owned()))
    });
    load_from(file, environment.collect(), flags)
}

fn load_from(
    file: Option<&Path>,
    environment: Vec<(String, String)>,
    flags: &[(String, String)],
) -> Result<Loaded, ConfigError> {
    let unreadable = |e: config::ConfigError| ConfigError::Unreadable(e.to_string());
    let wrong = |e: config::ConfigError| ConfigError::Wrong(e.to_string());
    let mut origins: BTreeMap<String, &'static str> = BTreeMap::new();
    let mut builder = Layered::builder().add_source(File::from_str(DEFAULTS, FileFormat::Toml));
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|e| {
            ConfigError::Unreadable(format!("the configuration file {} cannot be read: {e}", path.display()))
        })?;
        let source = File::from_str(&text, FileFormat::Toml);
        let alone = Layered::builder().add_source(source.clone()).build().map_err(|e| {
            ConfigError::Unreadable(format!("the configuration file {} is not TOML: {e}", path.display()))
        })?;
        let mut keys = Vec::new();
        flatten("", &Value::new(None, alone.cache.kind), &mut keys);
        origins.extend(keys.into_iter().map(|(k, _)| (k, "file")));
        builder = builder.add_source(source);
    }
    for (key, value) in environment.into_iter().filter(|(_, v)| !v.is_empty()) {
        builder = builder.set_override(&key, value).map_err(|e| ConfigError::Wrong(format!("{PREFIX}{key}: {e}")))?;
        origins.insert(key, "environment");
    }
    for (key, value) in flags {
        builder = builder.set_override(key, value.clone()).map_err(wrong)?;
        origins.insert(key.clone(), "flag");
    }
    let merged = builder.build().map_err(unreadable)?;
    let mut keys = Vec::new();
    flatten("", &Value::new(None, merged.cache.kind.clone()), &mut keys);
    let effective = keys
        .into_iter()
        .map(|(key, value)| Effective {
            value: if SECRET.contains(&key.as_str()) && !value.is_empty() { "***".to_owned() } else { value },
            origin: origins.get(&key).copied().unwrap_or("default"),
            key,
        })
        .collect();
    let config: Config = merged.try_deserialize().map_err(|e| ConfigError::Wrong(format!("configuration: {e}")))?;
    config.check().map_err(ConfigError::Wrong)?;
    Ok(Loaded { config, effective, file: file.map(Path::to_owned), flags: flags.to_owned() })
}

/// Keys whose values are not shown.
const SECRET: &[&str] = &["database.url"];

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, String)>) {
    match &value.kind {
        ValueKind::Table(table) => {
            let mut names: Vec<_> = table.keys().collect();
            names.sort();
            for name in names {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(&key, &table[name], out);
            }
        }
        ValueKind::Array(items) => {
            let items: Vec<String> = items.iter().map(ToString::to_string).collect();
            out.push((prefix.to_owned(), format!("[{}]", items.join(", "))));
        }
        _ => out.push((prefix.to_owned(), value.to_string())),
    }
}

/// A variable that is not a configuration key: `SOP_URL` and its like. Empty counts as not set.
#[must_use]
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    /// A file that goes with the test.
    struct File(std::path::PathBuf);

    impl std::ops::Deref for File {
        type Target = std::path::Path;

        fn deref(&self) -> &Self::Target {
            &self.0
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn file(text: &str) -> File {
        let path = std::env::temp_dir().join(format!("sop-config-{}.toml", uuid::Uuid::new_v4()));
        std::fs::write(&path, text).unwrap();
        File(path)
    }

    #[test]
    fn the_documented_file_is_the_defaults() {
        let loaded = load_from(None, vec![], &[]).unwrap();
        assert_eq!(loaded.config.server.listen, "127.0.0.1:7070");
        assert!(loaded.effective().iter().all(|e| e.origin == "default"));
    }

    #[test]
    fn flags_win_over_the_environment_over_the_file_over_defaults() {
        let path = file("[server]\nlisten = \"127.0.0.1:1\"\ndrain = \"1s\"\n[ledger]\nqueue = 7\n");
        let environment = env(&[("server.listen", "127.0.0.1:2"), ("server.drain", "2s"), ("ledger.batch", "")]);
        let flags = env(&[("server.listen", "127.0.0.1:3")]);
        let loaded = load_from(Some(&path), environment, &flags).unwrap();
        assert_eq!(loaded.config.server.listen, "127.0.0.1:3");
        assert_eq!(loaded.config.server.drain.get(), Duration::from_secs(2));
        assert_eq!(loaded.config.ledger.queue, 7);
        let origin = |key: &str| loaded.effective().iter().find(|e| e.key == key).unwrap().origin;
        assert_eq!(origin("server.listen"), "flag");
        assert_eq!(origin("server.drain"), "environment");
        assert_eq!(origin("ledger.queue"), "file");
        assert_eq!(origin("ledger.batch"), "default", "an empty variable sets nothing");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        for (key, value, says) in [
            ("server.lisen", "x", "lisen"),
            ("ledger.lock_wait", "2", "2s"),
            ("ledger.queue", "many", "queue"),
            ("ledger.batch", "0", "ledger.batch"),
            ("disk.guard_percent", "101", "disk.guard_percent"),
        ] {
            let e = load_from(None, env(&[(key, value)]), &[]).unwrap_err().to_string();
            assert!(e.contains(says), "{key}={value}: {e}");
        }
        let e = load_from(Some(Path::new("/nonexistent/sop.toml")), vec![], &[]).unwrap_err().to_string();
        assert!(e.contains("/nonexistent/sop.toml"), "{e}");
        let e = load_from(Some(&file("[server\n")), vec![], &[]).unwrap_err().to_string();
        assert!(e.contains("not TOML"), "{e}");
    }

    #[test]
    fn secrets_are_masked() {
        let loaded = load_from(None, env(&[("database.url", "postgres://u:hunter2@h/d")]), &[]).unwrap();
        assert!(!format!("{loaded:?}").contains("hunter2"));
        let url = loaded.effective().iter().find(|e| e.key == "database.url").unwrap();
        assert_eq!(url.value, "***");
    }
}
