//! `sop token`: clients, access tokens and operation tokens from the command line.

use anyhow::Context as _;
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::{Global, say};

#[derive(Subcommand)]
pub(crate) enum TokenCommand {
    /// Print an access token of the client that the environment or the data folder names
    Issue,
    /// Say what a token is
    Introspect { token: String },
    /// End a token before its time
    Revoke { token: String },
    /// Register a client; prints its id and secret, once
    Register(RegisterArgs),
    /// Replace a client's secret; prints the new one, once
    RotateSecret {
        client_id: String,
        /// Seconds for which the one before still counts
        #[arg(long, default_value_t = 86_400.0)]
        overlap: f64,
    },
    /// Remove a client; its tokens end with it
    Unregister { client_id: String },
    /// Replace the keys that sign access tokens
    RotateKeys {
        /// The old ones may be known to others: what they signed is refused from now on
        #[arg(long)]
        immediately: bool,
    },
    /// Issue an operation token; prints it, once
    Operation(OperationArgs),
    /// Use an operation token
    Use {
        token: String,
        operation: String,
        /// On what
        #[arg(long)]
        resource: Option<String>,
    },
}

#[derive(Args)]
pub(crate) struct RegisterArgs {
    name: String,
    /// What it may: rooms, `state:read`, `admin`, ... with spaces between
    #[arg(long)]
    scope: String,
    /// system, user, external or cognitive
    #[arg(long)]
    agent_type: Option<String>,
    /// How its access tokens are signed: EdDSA (the default) or ES256
    #[arg(long)]
    alg: Option<String>,
}

#[derive(Args)]
pub(crate) struct OperationArgs {
    /// What it is for
    operation: String,
    /// operation, todo, integration or test
    #[arg(long, default_value = "operation")]
    kind: String,
    /// Which client may use it; yourself without it
    #[arg(long)]
    audience: Option<String>,
    /// On what
    #[arg(long)]
    resource: Option<String>,
    /// How often
    #[arg(long)]
    max_uses: Option<u32>,
    /// Seconds
    #[arg(long)]
    expires_in: Option<f64>,
}

/// What of it was said.
fn metadata(args: RegisterArgs) -> Value {
    let all = [
        ("client_name", Some(args.name)),
        ("scope", Some(args.scope)),
        ("agent_type", args.agent_type),
        ("access_token_signed_response_alg", args.alg),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), Value::from(value?)))).collect()
}

/// What of it was said.
fn wanted(args: OperationArgs) -> Value {
    let mut body = json!({"kind": args.kind, "operation": args.operation});
    for (name, value) in [
        ("audience", args.audience.map(Value::from)),
        ("resource", args.resource.map(Value::from)),
        ("max_uses", args.max_uses.map(Value::from)),
        ("expires_in", args.expires_in.map(Value::from)),
    ] {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    body
}

pub(crate) async fn run(global: &Global, command: TokenCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    let tell = |value: &Value, text: String| if global.json { say(value) } else { say(text) };
    let word = |v: &Value, name: &str| v[name].as_str().unwrap_or("-").to_owned();
    match command {
        TokenCommand::Issue => {
            let token = client.token().context("there is no credential: set SOP_CLIENT_ID and SOP_CLIENT_SECRET")?;
            tell(&json!({"access_token": token}), token.to_owned());
        }
        TokenCommand::Introspect { token } => {
            let seen = client.json(client.credentialed("/oauth2/introspect", &token)?).await?;
            let text = match seen["active"].as_bool() {
                Some(true) => format!("active: {} with scope {}", word(&seen, "client_id"), word(&seen, "scope")),
                _ => "not active, or not for you to know".to_owned(),
            };
            tell(&seen, text);
        }
        TokenCommand::Revoke { token } => {
            client.send(client.credentialed("/oauth2/revoke", &token)?).await?;
            tell(&json!({"revoked": true}), "revoked".to_owned());
        }
        TokenCommand::Register(args) => {
            let made = client.json(client.request(Method::POST, "/oauth2/register").json(&metadata(args))).await?;
            tell(
                &made,
                format!("client_id {}\nclient_secret {}", word(&made, "client_id"), word(&made, "client_secret")),
            );
        }
        TokenCommand::RotateSecret { client_id, overlap } => {
            let path = format!("/oauth2/register/{client_id}/secret");
            let made = client.json(client.request(Method::POST, &path).json(&json!({"overlap": overlap}))).await?;
            let (secret, until) = (word(&made, "client_secret"), word(&made, "previous_expires_at"));
            tell(&made, format!("client_secret {secret}\nthe one before counts until {until}"));
        }
        TokenCommand::Unregister { client_id } => {
            client.send(client.request(Method::DELETE, &format!("/oauth2/register/{client_id}"))).await?;
            tell(&json!({"removed": client_id}), format!("{client_id} is removed"));
        }
        TokenCommand::RotateKeys { immediately } => {
            let path = format!("/v1/token/signing-keys/rotate?immediately={immediately}");
            let made = client.json(client.request(Method::POST, &path)).await?;
            tell(&made, format!("{} signs from {} on", word(&made, "kid"), word(&made, "active_at")));
        }
        TokenCommand::Operation(args) => {
            let made = client.json(client.request(Method::POST, "/v1/token/operations").json(&wanted(args))).await?;
            tell(
                &made,
                format!("{}\n{} uses until {}", word(&made, "token"), made["max_uses"], word(&made, "expires_at")),
            );
        }
        TokenCommand::Use { token, operation, resource } => {
            let mut body = json!({"token": token, "operation": operation});
            if let Some(resource) = resource {
                body["resource"] = resource.into();
            }
            let used = client.json(client.request(Method::POST, "/v1/token/operations/use").json(&body)).await?;
            tell(&used, format!("used; {} left", used["remaining"]));
        }
    }
    Ok(())
}
