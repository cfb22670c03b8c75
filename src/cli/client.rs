//! How commands reach the daemon: where it is, who we are, and its refusals as sentences.

use std::path::Path;

use anyhow::{Context as _, bail};
use reqwest::{Method, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::Value;

use crate::config;

use super::Global;

/// A connection to the daemon's API with a bearer token.
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
    token: Option<String>,
    credential: Option<(String, String)>,
}

/// `DIR/admin.json`.
#[derive(Deserialize)]
struct Admin {
    url: String,
    client_id: String,
    client_secret: String,
}

/// `DIR/daemon.json`: written at each start, because with port 0 the port may differ.
#[derive(Deserialize)]
struct Daemon {
    url: String,
}

impl Client {
    /// Finds the daemon: `SOP_URL` with `SOP_CLIENT_ID` and `SOP_CLIENT_SECRET`, else the data folder.
    pub async fn find(global: &Global) -> anyhow::Result<Self> {
        let dir = global.data_dir.clone().unwrap_or_else(|| "./data".into());
        let admin: Option<Admin> = read(&dir.join("admin.json"))?;
        let daemon: Option<Daemon> = read(&dir.join("daemon.json"))?;
        let url = config::environment("SOP_URL")
            .or(daemon.map(|d| d.url))
            .or(admin.as_ref().map(|a| a.url.clone()))
            .with_context(|| {
                format!(
                    "no daemon found: set SOP_URL, or --data-dir to the data folder of one (looked in {})",
                    dir.display()
                )
            })?;
        let credential = match (config::environment("SOP_CLIENT_ID"), config::environment("SOP_CLIENT_SECRET")) {
            (Some(id), Some(secret)) => Some((id, secret)),
            _ => admin.map(|a| (a.client_id, a.client_secret)),
        };
        let http = http()?;
        let mut client = Self { http, url: url.trim_end_matches('/').to_owned(), token: None, credential };
        if let Some((id, secret)) = &client.credential {
            client.token = Some(client.authenticate(id, secret).await?);
        }
        Ok(client)
    }

    /// The daemon at `url`, with the credential of the environment if there is one.
    pub async fn at_url(url: &str) -> anyhow::Result<Self> {
        let url = url.trim_end_matches('/').to_owned();
        let mut client = Self { http: http()?, url, token: None, credential: None };
        let (id, secret) = (config::environment("SOP_CLIENT_ID"), config::environment("SOP_CLIENT_SECRET"));
        if let (Some(id), Some(secret)) = (id, secret) {
            client.token = Some(client.authenticate(&id, &secret).await?);
        }
        Ok(client)
    }

    /// At a daemon that is known, as a client that is known.
    pub async fn at(url: &str, id: &str, secret: &str) -> anyhow::Result<Self> {
        let mut client = Self { http: http()?, url: url.to_owned(), token: None, credential: None };
        client.token = Some(client.authenticate(id, secret).await?);
        Ok(client)
    }

    async fn authenticate(&self, id: &str, secret: &str) -> anyhow::Result<String> {
        #[derive(Deserialize)]
        struct Token {
            access_token: String,
        }
        let form = [("grant_type", "client_credentials"), ("client_id", id), ("client_secret", secret)];
        let answer = self.http.post(format!("{}/oauth2/token", self.url)).form(&form).send().await;
        let answer = answer.with_context(|| format!("the daemon at {} does not answer", self.url))?;
        let token: Token = checked(answer).await?.json().await?;
        Ok(token.access_token)
    }

    /// The daemon's base URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The bearer token, if there is one.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// A request to a path.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// A form about a token, with the client's own credential, as OAuth has it.
    pub fn credentialed(&self, path: &str, token: &str) -> anyhow::Result<RequestBuilder> {
        let (id, secret) =
            self.credential.as_ref().context("there is no credential: set SOP_CLIENT_ID and SOP_CLIENT_SECRET")?;
        let request = self.http.post(format!("{}{path}", self.url)).basic_auth(id, Some(secret));
        Ok(request.form(&[("token", token)]))
    }

    /// A token exchange (RFC 8693), with the client's own credential.
    pub fn exchange(&self, token: &str, scope: Option<&str>, audience: Option<&str>) -> anyhow::Result<RequestBuilder> {
        let (id, secret) =
            self.credential.as_ref().context("there is no credential: set SOP_CLIENT_ID and SOP_CLIENT_SECRET")?;
        let mut form = vec![
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("subject_token", token),
        ];
        form.extend(scope.map(|s| ("scope", s)));
        form.extend(audience.map(|a| ("audience", a)));
        Ok(self.http.post(format!("{}/oauth2/token", self.url)).basic_auth(id, Some(secret)).form(&form))
    }

    /// Sends, and turns a refusal into an error that says what was wrong and what to do.
    pub async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let answer = request.send().await.with_context(|| format!("the daemon at {} does not answer", self.url))?;
        checked(answer).await
    }

    /// Turns a refusal into an error.
    pub async fn checked(&self, answer: Response) -> anyhow::Result<Response> {
        checked(answer).await
    }

    /// Sends and reads JSON.
    pub async fn json(&self, request: RequestBuilder) -> anyhow::Result<Value> {
        Ok(self.send(request).await?.json().await?)
    }
}

/// Server-sent events of an answer: name, id and data of each.
pub(crate) struct Events {
    answer: Response,
    text: Vec<u8>,
}

impl Events {
    pub fn of(answer: Response) -> Self {
        Self { answer, text: Vec::new() }
    }

    /// The next; `None` when the stream has ended.
    pub async fn next(&mut self) -> Option<(String, Option<i64>, Value)> {
        loop {
            while let Some(end) = self.text.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = self.text.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event).into_owned();
                let field = |name: &str| event.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
                if let Some(name) = field("event:") {
                    let data = field("data:").and_then(|d| serde_json::from_str(d).ok()).unwrap_or_default();
                    return Some((name.to_owned(), field("id:").and_then(|id| id.parse().ok()), data));
                }
            }
            match self.answer.chunk().await {
                Ok(Some(part)) => self.text.extend_from_slice(&part),
                Ok(None) | Err(_) => return None,
            }
        }
    }
}

/// Trusts the machine's authorities, and those in the file that `SOP_CA_FILE` names.
fn http() -> anyhow::Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder();
    if let Some(file) = config::environment("SOP_CA_FILE") {
        let pem = std::fs::read(&file).with_context(|| format!("{file} cannot be read"))?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem);
        builder = builder.tls_certs_merge(certificates.with_context(|| format!("{file} holds no certificates"))?);
    }
    Ok(builder.build()?)
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> anyhow::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => {
            Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{} cannot be read", path.display()))?))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("{} cannot be read", path.display())),
    }
}

async fn checked(answer: Response) -> anyhow::Result<Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let text = answer.text().await.unwrap_or_default();
    let problem: Value = serde_json::from_str(&text).unwrap_or_default();
    let detail = problem["detail"].as_str().or(problem["error_description"].as_str()).unwrap_or(text.trim());
    let mut message = format!("{} ({})", detail, status.as_u16());
    for fault in problem["errors"].as_array().into_iter().flatten() {
        let (at, what) = (fault["pointer"].as_str().unwrap_or(""), fault["detail"].as_str().unwrap_or(""));
        if what != detail {
            message.push_str(&format!("\n  at {at:?}: {what}"));
        }
    }
    bail!(message)
}
