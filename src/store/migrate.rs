//! Migrations: one file a room, and one for each change since; forward only, compiled in.

use sqlx::PgConnection;
use sqlx::migrate::{Migrate as _, MigrateError, Migrator};

static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

/// A migration that was not applied yet.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Pending {
    /// Its number.
    pub version: i64,
    /// Its name.
    pub name: String,
}

pub(super) async fn run(conn: &mut PgConnection) -> Result<(), String> {
    // Takes sqlx's advisory lock: of several daemons that start at once, one migrates and the others wait.
    MIGRATIONS.run(conn).await.map_err(|e| explain(&e))
}

pub(super) async fn pending(conn: &mut PgConnection) -> Result<Vec<Pending>, String> {
    conn.ensure_migrations_table(&MIGRATIONS.table_name).await.map_err(|e| explain(&e))?;
    let applied = conn.list_applied_migrations(&MIGRATIONS.table_name).await.map_err(|e| explain(&e))?;
    if let Some(unknown) = applied.iter().find(|a| !MIGRATIONS.version_exists(a.version)) {
        return Err(explain(&MigrateError::VersionMissing(unknown.version)));
    }
    Ok(MIGRATIONS
        .iter()
        .filter(|m| !applied.iter().any(|a| a.version == m.version))
        .map(|m| Pending { version: m.version, name: m.description.to_string() })
        .collect())
}

fn explain(e: &MigrateError) -> String {
    let newest = MIGRATIONS.iter().map(|m| m.version).max().unwrap_or(0);
    match e {
        MigrateError::VersionMissing(version) => format!(
            "the database has migration {version}, this binary knows none past {newest}: the database is newer than the binary; start a newer sop"
        ),
        MigrateError::VersionMismatch(version) => format!(
            "migration {version} was applied with other contents than this binary has: the database belongs to another build"
        ),
        e => format!("migrating the database failed: {e}"),
    }
}
