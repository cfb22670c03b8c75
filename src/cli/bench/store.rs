//! The least that a durable put can cost: one bare INSERT behind axum, on the same PostgreSQL. No caller is known, nothing is
//! decided, recorded or kept of the past.

use std::path::Path;

use anyhow::Context as _;
use axum::extract::{Path as Key, State};
use axum::http::StatusCode;
use axum::routing::put;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::kernel::supervisor::detach;

/// The server; it ends with the bench.
pub(super) struct Bare {
    address: String,
}

impl Bare {
    /// Beside our tables, in the private cluster of the daemon of that folder.
    pub async fn start(daemon: &Path) -> anyhow::Result<Self> {
        let options = PgConnectOptions::new_without_pgpass().socket(daemon.join("run")).username("sop").database("sop");
        let pool = PgPoolOptions::new().max_connections(16).test_before_acquire(false).connect_with(options).await?;
        sqlx::raw_sql(
            "CREATE SCHEMA bench; CREATE TABLE bench.bare (key bytea PRIMARY KEY, value bytea NOT NULL) WITH (fillfactor = 60)",
        )
        .execute(&pool)
        .await?;
        let router = axum::Router::new().route("/{*key}", put(insert)).with_state(pool);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr().context("a bound socket has an address")?.to_string();
        let listener = axum::serve::ListenerExt::tap_io(listener, |s| {
            let _ = s.set_nodelay(true);
        });
        detach(async move { axum::serve(listener, router).await.is_ok() });
        Ok(Self { address })
    }

    pub fn address(&self) -> &str {
        &self.address
    }
}

async fn insert(State(pool): State<PgPool>, Key(key): Key<String>, body: axum::body::Bytes) -> StatusCode {
    let done = sqlx::query(
        "INSERT INTO bench.bare (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
    )
    .bind(key.as_bytes())
    .bind(&body[..])
    .execute(&pool)
    .await;
    if done.is_ok() { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }
}
