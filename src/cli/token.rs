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
    /// Print a token of that client's own for the subject of a token it was handed (RFC 8693)
    Exchange {
        token: String,
        /// Fewer scopes than the token has
        #[arg(long)]
        scope: Option<String>,
        /// The client it is for
        #[arg(long)]
        audience: Option<String>,
    },
    /// Say what a token is
    Introspect { token: String },
    /// End a token before its time
    Revoke { token: String },
    /// End tokens of others: one, its whole family, or all of a client
    End(EndArgs),
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
    /// List clients: id, type, when last used, name
    Clients,
    /// Disable a client; its tokens end
    Disable {
        client_id: String,
        /// Why; kept in the record
        #[arg(long)]
        reason: Option<String>,
    },
    /// Enable a client again
    Enable { client_id: String },
    /// List clients that are locked out
    Lockouts,
    /// Let a client in again before its time
    Release { client_id: String },
    /// Issue an operation token; prints it, once
    Operation(OperationArgs),
    /// List operation tokens: id, status, uses, what for
    Operations,
    /// Use an operation token
    Use {
        token: String,
        operation: String,
        /// On what
        #[arg(long)]
        resource: Option<String>,
    },
    /// Complete an operation token, by its id; the tokens of its steps end
    Complete { id: String },
    /// Revoke an operation token, by its id; the tokens of its steps end
    Cancel { id: String },
}

#[derive(Subcommand)]
pub(crate) enum KeyCommand {
    /// List the keys that sign access tokens, the newest first
    Ls,
    /// Replace them
    Rotate {
        /// The old ones may be known to others: what they signed is refused from now on
        #[arg(long)]
        immediately: bool,
    },
}

#[derive(Args)]
pub(crate) struct EndArgs {
    /// All tokens of this client
    #[arg(required_unless_present = "token", conflicts_with_all = ["token", "family"])]
    client_id: Option<String>,
    /// Of this client only the token with this id
    #[arg(long)]
    jti: Option<String>,
    /// This token
    #[arg(long)]
    token: Option<String>,
    /// With --token: all that comes from the same token
    #[arg(long)]
    family: bool,
    /// Why; kept in the record
    #[arg(long)]
    reason: Option<String>,
}

#[derive(Args)]
pub(crate) struct RegisterArgs {
    name: String,
    /// What it may: rooms, `state:read`, `admin`, ... with spaces between; what its type may without it
    #[arg(long)]
    scope: Option<String>,
    /// It may exchange tokens it is handed
    #[arg(long)]
    exchange: bool,
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
    /// Which client, or service, may use it; yourself without it
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
    /// The token of a todo, of which this is a step's
    #[arg(long)]
    todo: Option<String>,
}

/// What of it was said.
fn metadata(args: RegisterArgs) -> Value {
    let all = [
        ("client_name", Some(args.name)),
        ("scope", args.scope),
        ("agent_type", args.agent_type),
        ("access_token_signed_response_alg", args.alg),
    ];
    let mut body: Value = all.into_iter().filter_map(|(name, v)| Some((name.to_owned(), Value::from(v?)))).collect();
    if args.exchange {
        body["grant_types"] = json!(["client_credentials", "urn:ietf:params:oauth:grant-type:token-exchange"]);
    }
    body
}

/// What of it was said.
fn wanted(args: OperationArgs) -> Value {
    let mut body = json!({"kind": args.kind, "operation": args.operation});
    for (name, value) in [
        ("audience", args.audience.map(Value::from)),
        ("resource", args.resource.map(Value::from)),
        ("max_uses", args.max_uses.map(Value::from)),
        ("expires_in", args.expires_in.map(Value::from)),
        ("todo", args.todo.map(Value::from)),
    ] {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    body
}

/// What is said: as JSON, and as text.
type Said = (Value, String);

fn word(v: &Value, name: &str) -> String {
    v[name].as_str().unwrap_or("-").to_owned()
}

pub(crate) async fn run(global: &Global, command: TokenCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    let (value, text) = match command {
        TokenCommand::Operation(_)
        | TokenCommand::Operations
        | TokenCommand::Use { .. }
        | TokenCommand::Complete { .. }
        | TokenCommand::Cancel { .. } => operations(&client, command).await?,
        TokenCommand::Issue
        | TokenCommand::Exchange { .. }
        | TokenCommand::Introspect { .. }
        | TokenCommand::Revoke { .. }
        | TokenCommand::End(_) => access(&client, command).await?,
        _ => clients(&client, command).await?,
    };
    if global.json {
        say(value)
    } else {
        say(text)
    }
    Ok(())
}

/// Access tokens.
async fn access(client: &Client, command: TokenCommand) -> anyhow::Result<Said> {
    Ok(match command {
        TokenCommand::Introspect { token } => {
            let seen = client.json(client.credentialed("/oauth2/introspect", &token)?).await?;
            let text = match seen["active"].as_bool() {
                Some(true) => format!("active: {} with scope {}", word(&seen, "client_id"), word(&seen, "scope")),
                _ => "not active, or not for you to know".to_owned(),
            };
            (seen, text)
        }
        TokenCommand::Revoke { token } => {
            client.send(client.credentialed("/oauth2/revoke", &token)?).await?;
            (json!({"revoked": true}), "revoked".to_owned())
        }
        TokenCommand::Exchange { token, scope, audience } => {
            let got = client.json(client.exchange(&token, scope.as_deref(), audience.as_deref())?).await?;
            let text = word(&got, "access_token");
            (got, text)
        }
        TokenCommand::End(args) => {
            let mut body = json!({});
            let said =
                [("token", args.token), ("client_id", args.client_id), ("jti", args.jti), ("reason", args.reason)];
            for (name, value) in said {
                if let Some(value) = value {
                    body[name] = value.into();
                }
            }
            if args.family {
                body["family"] = true.into();
            }
            let ended = client.json(client.request(Method::POST, "/v1/token/revocations").json(&body)).await?;
            let what = ended["jti"].as_str().map_or("all tokens".to_owned(), |jti| format!("token {jti}"));
            let text = format!("{what} of {}, and what comes from there, ended", word(&ended, "client_id"));
            (ended, text)
        }
        _ => {
            let token = client.token().context("there is no credential: set SOP_CLIENT_ID and SOP_CLIENT_SECRET")?;
            (json!({"access_token": token}), token.to_owned())
        }
    })
}

/// Clients.
async fn clients(client: &Client, command: TokenCommand) -> anyhow::Result<Said> {
    let managed = |id: &str, what: &str| format!("/v1/token/clients/{id}/{what}");
    Ok(match command {
        TokenCommand::Register(args) => {
            let made = client.json(client.request(Method::POST, "/oauth2/register").json(&metadata(args))).await?;
            let text =
                format!("client_id {}\nclient_secret {}", word(&made, "client_id"), word(&made, "client_secret"));
            (made, text)
        }
        TokenCommand::RotateSecret { client_id, overlap } => {
            let path = format!("/oauth2/register/{client_id}/secret");
            let made = client.json(client.request(Method::POST, &path).json(&json!({"overlap": overlap}))).await?;
            let (secret, until) = (word(&made, "client_secret"), word(&made, "previous_expires_at"));
            (made, format!("client_secret {secret}\nthe one before counts until {until}"))
        }
        TokenCommand::Unregister { client_id } => {
            client.send(client.request(Method::DELETE, &format!("/oauth2/register/{client_id}"))).await?;
            (json!({"removed": client_id}), format!("{client_id} is removed"))
        }
        TokenCommand::Disable { client_id, reason } => {
            let body = json!({"reason": reason});
            client.send(client.request(Method::POST, &managed(&client_id, "disable")).json(&body)).await?;
            (json!({"disabled": client_id}), format!("{client_id} is disabled, and its tokens have ended"))
        }
        TokenCommand::Enable { client_id } => {
            client.send(client.request(Method::POST, &managed(&client_id, "enable")).json(&json!({}))).await?;
            (json!({"enabled": client_id}), format!("{client_id} is enabled"))
        }
        TokenCommand::Release { client_id } => {
            client.send(client.request(Method::DELETE, &format!("/v1/token/lockouts/{client_id}"))).await?;
            (json!({"released": client_id}), format!("{client_id} is let in again"))
        }
        TokenCommand::Lockouts => {
            let line =
                |l: &Value| format!("{}  {}  until {}", word(l, "client_id"), word(l, "block"), word(l, "until"));
            listed(client, "/v1/token/lockouts", line, "nobody is locked out").await?
        }
        _ => {
            let line = |c: &Value| {
                let state = if c["disabled"] == true { "  (disabled)" } else { "" };
                let used = c["last_used_at"].as_str().unwrap_or("never used              ");
                let (id, kind, name) = (word(c, "client_id"), word(c, "agent_type"), word(c, "client_name"));
                format!("{id}  {kind:<9}  {used}  {name}{state}")
            };
            listed(client, "/v1/token/clients", line, "there is no client").await?
        }
    })
}

/// Operation tokens.
async fn operations(client: &Client, command: TokenCommand) -> anyhow::Result<Said> {
    Ok(match command {
        TokenCommand::Operation(args) => {
            let made = client.json(client.request(Method::POST, "/v1/token/operations").json(&wanted(args))).await?;
            let text =
                format!("{}\n{} uses until {}", word(&made, "token"), made["max_uses"], word(&made, "expires_at"));
            (made, text)
        }
        TokenCommand::Use { token, operation, resource } => {
            let mut body = json!({"token": token, "operation": operation});
            if let Some(resource) = resource {
                body["resource"] = resource.into();
            }
            let used = client.json(client.request(Method::POST, "/v1/token/operations/use").json(&body)).await?;
            let text = format!("used; {} left", used["remaining"]);
            (used, text)
        }
        TokenCommand::Complete { id } => {
            let path = format!("/v1/token/operations/{id}/complete");
            (client.json(client.request(Method::POST, &path)).await?, format!("{id} is completed"))
        }
        TokenCommand::Cancel { id } => {
            let path = format!("/v1/token/operations/{id}");
            (client.json(client.request(Method::DELETE, &path)).await?, format!("{id} is revoked"))
        }
        _ => {
            let line = |o: &Value| {
                let (id, status, operation) = (word(o, "id"), word(o, "status"), word(o, "operation"));
                format!("{id}  {status:<9}  {}/{}  {operation}", o["uses"], o["max_uses"])
            };
            listed(client, "/v1/token/operations", line, "there is no operation token").await?
        }
    })
}

/// A list, all pages of it, a line for each.
async fn listed(client: &Client, path: &str, line: impl Fn(&Value) -> String, none: &str) -> anyhow::Result<Said> {
    let mut items = Vec::new();
    let mut next = path.to_owned();
    loop {
        let mut page = client.json(client.request(Method::GET, &next)).await?;
        if let Some(found) = page["items"].as_array_mut() {
            items.append(found);
        }
        match page["next"].as_str() {
            Some(after) => next = format!("{path}?after={after}"),
            None => break,
        }
    }
    let lines: Vec<String> = items.iter().map(line).collect();
    let text = if lines.is_empty() { none.to_owned() } else { lines.join("\n") };
    Ok((json!({"items": items}), text))
}

pub(crate) async fn keys(global: &Global, command: KeyCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    let (value, text) = match command {
        KeyCommand::Rotate { immediately } => {
            let path = format!("/v1/token/signing-keys/rotate?immediately={immediately}");
            let made = client.json(client.request(Method::POST, &path)).await?;
            let text = format!("{} signs from {} on", word(&made, "kid"), word(&made, "active_at"));
            (made, text)
        }
        KeyCommand::Ls => {
            let line = |k: &Value| {
                let (kid, alg, status) = (word(k, "kid"), word(k, "alg"), word(k, "status"));
                format!("{kid}  {alg:<5}  {status:<7}  since {}", word(k, "active_at"))
            };
            listed(&client, "/v1/token/signing-keys", line, "there is no key").await?
        }
    };
    if global.json {
        say(value)
    } else {
        say(text)
    }
    Ok(())
}
