//! Who plays: the file `config/logos/logos.toml`, or another like it.

use std::path::Path;

use anyhow::{Context as _, bail};
use config::{Config, File, FileFormat};
use serde::Deserialize;

/// The shipped file.
const SHIPPED: &str = include_str!("../../../config/logos/logos.toml");

/// Everybody, and what happens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cast {
    pub protocols: Vec<Role>,
    #[serde(default)]
    pub operations: Vec<Operation>,
    #[serde(default)]
    pub questions: Vec<Question>,
    pub failure: Failure,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Role {
    pub id: String,
    pub name: String,
    pub after: Vec<String>,
    pub cpu_share: i64,
    pub scope: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Operation {
    pub name: String,
    pub kind: String,
    pub user: String,
    #[serde(default = "once")]
    pub uses: i64,
}

fn once() -> i64 {
    1
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Question {
    pub who: String,
    pub action: String,
    pub kind: String,
    pub name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Failure {
    pub protocol: String,
    pub at: u32,
    pub back: u32,
    pub why: String,
}

impl Cast {
    /// Reads the file, keeps the protocols asked for, and puts them in the order of their dependencies.
    pub fn load(file: Option<&Path>, only: &[String]) -> anyhow::Result<Self> {
        let text = match file {
            Some(file) => {
                std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?
            }
            None => SHIPPED.to_owned(),
        };
        let read = Config::builder().add_source(File::from_str(&text, FileFormat::Toml)).build();
        let mut cast: Self =
            read.and_then(Config::try_deserialize).context("the file of who there is cannot be read")?;
        for wanted in only {
            let known: Vec<&str> = cast.protocols.iter().map(|p| p.id.as_str()).collect();
            anyhow::ensure!(
                known.contains(&wanted.to_uppercase().as_str()),
                "there is no protocol {wanted}; there are {}",
                known.join(", ")
            );
        }
        let keep = |id: &str| only.is_empty() || only.iter().any(|o| o.eq_ignore_ascii_case(id));
        cast.protocols.retain(|p| keep(&p.id));
        cast.protocols.iter_mut().for_each(|p| p.after.retain(|a| keep(a)));
        let (mut ordered, mut left): (Vec<Role>, Vec<Role>) = (Vec::new(), std::mem::take(&mut cast.protocols));
        while !left.is_empty() {
            let started: Vec<String> = ordered.iter().map(|p| p.id.clone()).collect();
            let Some(at) = left.iter().position(|p| p.after.iter().all(|a| started.contains(a))) else {
                let ids: Vec<&str> = left.iter().map(|p| p.id.as_str()).collect();
                bail!("{} wait for each other or for nobody there is", ids.join(", "));
            };
            ordered.push(left.remove(at));
        }
        let shares: i64 = ordered.iter().map(|p| p.cpu_share).sum();
        anyhow::ensure!(shares <= 100, "the shares of the protocols add up to {shares} %, which is more than there is");
        cast.protocols = ordered;
        Ok(cast)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_cast_is_sound() {
        let cast = Cast::load(None, &[]).unwrap();
        let ids: Vec<&str> = cast.protocols.iter().map(|p| p.id.as_str()).collect();
        assert_eq!(ids, ["SOP", "ARP", "SCP", "UIP", "LAP"]);
        assert!(cast.failure.at < cast.failure.back && cast.failure.back < 24);
        assert!(cast.operations.iter().all(|o| ids.contains(&o.user.as_str())));
        assert!(cast.questions.iter().all(|q| ids.contains(&q.who.as_str())));
    }

    #[test]
    fn some_play_without_the_others() {
        let cast = Cast::load(None, &["scp".into(), "sop".into()]).unwrap();
        let order: Vec<(&str, usize)> = cast.protocols.iter().map(|p| (p.id.as_str(), p.after.len())).collect();
        assert_eq!(order, [("SOP", 0), ("SCP", 1)]);
        assert!(Cast::load(None, &["XYZ".into()]).unwrap_err().to_string().contains("there are SOP"));
    }
}
