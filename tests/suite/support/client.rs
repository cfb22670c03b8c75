//! A client with the first administrator's rights.

use reqwest::{Client as Http, Method, Response};
use tokio::sync::OnceCell;

use super::PATIENCE;
use super::daemon::Daemon;

/// Speaks to one daemon; its bearer token is fetched once.
pub struct Client {
    http: Http,
    url: String,
    admin: Option<(String, String)>,
    token: OnceCell<Option<String>>,
}

impl Client {
    /// As the administrator of `admin.json`, or as nobody where there is none.
    pub fn of(daemon: &Daemon) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Http::builder().no_proxy().timeout(PATIENCE).build().expect("a client");
        Self { http, url: daemon.url.clone(), admin: daemon.admin(), token: OnceCell::new() }
    }

    /// On another daemon of the same database, as the same administrator.
    pub fn also_of(&self, daemon: &Daemon) -> Self {
        Self { http: self.http.clone(), url: daemon.url.clone(), admin: self.admin.clone(), token: OnceCell::new() }
    }

    /// The same client, with its token.
    pub fn clone_at_self(&self) -> Self {
        self.clone_at(&self.url)
    }

    /// The same client with its token, at an address where the daemon is now.
    pub fn clone_at(&self, url: &str) -> Self {
        Self { http: self.http.clone(), url: url.to_owned(), admin: self.admin.clone(), token: self.token.clone() }
    }

    /// As another client.
    pub fn with(&self, id: &str, secret: &str) -> Self {
        Self {
            http: self.http.clone(),
            url: self.url.clone(),
            admin: Some((id.into(), secret.into())),
            token: OnceCell::new(),
        }
    }

    /// Id and secret.
    pub fn credential(&self) -> (String, String) {
        self.admin.clone().expect("a client")
    }

    /// The bearer token.
    pub async fn token(&self) -> String {
        self.token.get_or_try_init(|| self.fetch()).await.expect("a token").clone().expect("an administrator")
    }

    /// Any request without a token.
    pub fn bare(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// Any request with the token, to be added to.
    pub async fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.bare(method, path).bearer_auth(self.token().await)
    }

    /// Sends JSON; status and answer.
    pub async fn json(&self, method: Method, path: &str, body: &serde_json::Value) -> (u16, serde_json::Value) {
        let answer = self.request(method, path).await.json(body).send().await.expect("an answer");
        let status = answer.status().as_u16();
        (status, answer.json().await.unwrap_or_default())
    }

    /// Gets JSON; status and answer.
    pub async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        let answer = self.request(Method::GET, path).await.send().await.expect("an answer");
        let status = answer.status().as_u16();
        (status, answer.json().await.unwrap_or_default())
    }

    /// The index of the last entry that it caused, but for looking: a daemon writes entries of its own at any time.
    pub async fn last_entry(&self) -> i64 {
        let path = format!("/v1/audit/entries?actor={}", self.credential().0);
        let (_, page) = self.get(&path).await;
        let last = page["items"].as_array().and_then(|all| all.iter().find(|e| e["action"] != "audit:read"));
        last.expect("an entry")["index"].as_i64().expect("an index")
    }

    async fn fetch(&self) -> Result<Option<String>, reqwest::Error> {
        let Some((id, secret)) = &self.admin else { return Ok(None) };
        let form = [("grant_type", "client_credentials")];
        let request = self.http.post(format!("{}/oauth2/token", self.url)).basic_auth(id, Some(secret)).form(&form);
        let answer: serde_json::Value = request.send().await?.error_for_status()?.json().await?;
        Ok(answer["access_token"].as_str().map(str::to_owned))
    }

    /// Any request; a failed token request is a failed request.
    pub async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Response, reqwest::Error> {
        let token = self.token.get_or_try_init(|| self.fetch()).await?;
        let mut request = self.http.request(method, format!("{}{path}", self.url)).body(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().await
    }

    /// Puts a key; the index it got.
    pub async fn put(&self, key: &str, value: &str) -> Result<i64, String> {
        let answer = self.send(Method::PUT, &format!("/v1/state/kv/{key}"), value.into()).await;
        let answer = answer.and_then(Response::error_for_status).map_err(|error| error.to_string())?;
        let json: serde_json::Value = answer.json().await.map_err(|error| error.to_string())?;
        json["index"].as_i64().ok_or_else(|| format!("no index in {json}"))
    }
}
