//! `sop policy`: questions to the policy, and the entities it knows, from the command line; and what an author does before.

pub(super) mod diff;
pub(super) mod folder;
mod junit;
mod lint;
mod test;

use anyhow::Context as _;
use clap::Subcommand;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Value, json};

use self::folder::Complaint;
use super::client::Client;
use super::{Global, say};

#[derive(Subcommand)]
pub(crate) enum PolicyCommand {
    /// Ask whether somebody may do something; exit 1 if not. The question is recorded
    Ask {
        /// Who: `Sop::Client::ID`, `user::alice`
        subject: String,
        /// What: `state:put`
        action: String,
        /// To what: `Sop::Key::arp/plan`
        resource: String,
    },
    /// Print an entity: its attributes and parents
    Entity {
        /// `Sop::Client::ID`, `user::alice`
        name: String,
    },
    /// Put an entity
    Put {
        name: String,
        /// Attributes as a JSON object
        #[arg(long, default_value = "{}")]
        attrs: String,
        /// A parent, such as `group::staff`; may be given again
        #[arg(long)]
        parent: Vec<String>,
    },
    /// Remove an entity
    Rm { name: String },
    /// Look a bundle over, on disk: what does not hold, with file, line and column, and what is worth a look
    Lint(lint::LintArgs),
    /// Put a bundle on disk to its cases, without a daemon; say which policies they cover
    Test(test::TestArgs),
    /// What differs between two bundles, on disk or in a daemon; exit 1 if anything does
    Diff(diff::DiffArgs),
    /// Bundles, proposals, replay
    #[command(flatten)]
    Bundle(super::bundle::BundleCommand),
    /// Changes that wait for others, trials
    #[command(flatten)]
    Change(super::change::ChangeCommand),
}

/// Type and id: the type is a Cedar name, so the id begins after the last `::` that a type can end at.
fn split(name: &str) -> anyhow::Result<(&str, &str)> {
    let is_type =
        |t: &str| t.split("::").all(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
    let mut found = None;
    for (at, _) in name.match_indices("::") {
        if is_type(&name[..at]) {
            found = Some((&name[..at], &name[at + 2..]));
        }
    }
    found
        .filter(|(_, id)| !id.is_empty())
        .with_context(|| format!("{name:?} is no entity; write TYPE::ID, such as user::alice"))
}

fn path(name: &str) -> anyhow::Result<String> {
    let (kind, id) = split(name)?;
    Ok(format!("/v1/governance/entities/{}/{}", encoded(kind), encoded(id)))
}

/// A segment of a path.
pub(super) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// Prints what is wrong, one a line.
pub(super) fn complain(global: &Global, complaints: &[Complaint]) {
    if global.json {
        return say(json!({"findings": complaints.iter().map(Complaint::json).collect::<Vec<_>>()}));
    }
    complaints.iter().for_each(say);
}

fn named(name: &str) -> anyhow::Result<Value> {
    split(name).map(|(kind, id)| json!({"type": kind, "id": id}))
}

pub(crate) async fn run(global: &Global, command: PolicyCommand) -> anyhow::Result<()> {
    // Those that need no daemon.
    match &command {
        PolicyCommand::Lint(args) => return lint::run(global, args),
        PolicyCommand::Test(args) => return test::run(global, args),
        PolicyCommand::Diff(args) => return diff::run(global, args).await,
        _ => {}
    }
    let client = Client::find(global).await?;
    match command {
        PolicyCommand::Lint(_) | PolicyCommand::Test(_) | PolicyCommand::Diff(_) => {}
        PolicyCommand::Ask { subject, action, resource } => {
            let body = json!({"subject": named(&subject)?, "action": {"name": action}, "resource": named(&resource)?});
            let answer = client.json(client.request(Method::POST, "/access/v1/evaluation").json(&body)).await?;
            let (may, context) = (answer["decision"] == true, &answer["context"]);
            if global.json {
                say(&answer);
            } else {
                let verdict = if may { "may" } else { "may not" };
                let policies: Vec<&str> =
                    context["policies"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let by = if policies.is_empty() {
                    "no policy permits it".to_owned()
                } else {
                    format!("by {}", policies.join(", "))
                };
                say(format!(
                    "{subject} {verdict} {action} {resource}: {by}; decision {}",
                    context["decision_id"].as_str().unwrap_or("-")
                ));
            }
            anyhow::ensure!(may, "denied");
        }
        PolicyCommand::Entity { name } => say(client.json(client.request(Method::GET, &path(&name)?)).await?),
        PolicyCommand::Put { name, attrs, parent } => {
            let attrs: Value = serde_json::from_str(&attrs).context("--attrs is no JSON object")?;
            let parents = parent.iter().map(|p| named(p)).collect::<anyhow::Result<Vec<_>>>()?;
            let request = client.request(Method::PUT, &path(&name)?).json(&json!({"attrs": attrs, "parents": parents}));
            say(client.json(request).await?);
        }
        PolicyCommand::Bundle(command) => super::bundle::run(global, &client, command).await?,
        PolicyCommand::Change(command) => super::change::run(global, &client, command).await?,
        PolicyCommand::Rm { name } => {
            client.send(client.request(Method::DELETE, &path(&name)?)).await?;
            say(if global.json { json!({"removed": name}).to_string() } else { format!("{name} is removed") });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn an_entity_is_a_type_and_an_id() {
        assert_eq!(split("user::alice").unwrap(), ("user", "alice"));
        assert_eq!(split("Sop::Key::arp/plan").unwrap(), ("Sop::Key", "arp/plan"));
        assert_eq!(split("Sop::Key::a::b/c").unwrap(), ("Sop::Key::a", "b/c"));
        assert!(split("alice").is_err() && split("user::").is_err());
    }
}
