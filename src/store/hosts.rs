//! Which PostgreSQL: of the hosts in a URL, the one that takes writes now.

use std::str::FromStr as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{Connection as _, PgConnection};

/// How long a host may take to answer a probe.
const PROBE: Duration = Duration::from_secs(2);

/// The hosts of a database, and which was last found to be writable.
pub(super) struct Hosts {
    options: Vec<PgConnectOptions>,
    last: AtomicUsize,
}

impl Hosts {
    /// One host that needs no probing.
    pub fn one(options: PgConnectOptions) -> Self {
        Self { options: vec![options], last: AtomicUsize::new(0) }
    }

    /// Reads `postgres://user:password@host1:5432,host2/dbname?host=/socket&sslmode=...`.
    pub fn parse(url: &str) -> Result<Self, String> {
        let mut options = Vec::new();
        for one in split(url)? {
            let o = PgConnectOptions::from_str(&one).map_err(|e| format!("database.url cannot be read: {e}"))?;
            let host = o.get_host().to_owned();
            let near = o.get_socket().is_some() || host.starts_with('/') || loopback(&host);
            if !near && !matches!(o.get_ssl_mode(), PgSslMode::Require | PgSslMode::VerifyCa | PgSslMode::VerifyFull) {
                return Err(format!(
                    "database.url: {host} is another machine, so the connection must be encrypted; add sslmode=verify-full (or require)"
                ));
            }
            options.push(o);
        }
        Ok(Self { options, last: AtomicUsize::new(0) })
    }

    /// The writable host, and whether it is another than the last time. With several, the one that was writable last is probed
    /// first, so a failover costs one probe.
    pub async fn writable(&self) -> Result<(PgConnectOptions, bool), sqlx::Error> {
        if let [only] = self.options.as_slice() {
            return Ok((only.clone(), false));
        }
        let first = self.last.load(Ordering::Relaxed);
        let mut error = None;
        for i in 0..self.options.len() {
            let at = (first + i) % self.options.len();
            match tokio::time::timeout(PROBE, probe(&self.options[at])).await {
                Ok(Ok(true)) => {
                    let moved = self.last.swap(at, Ordering::AcqRel) != at;
                    return Ok((self.options[at].clone(), moved));
                }
                Ok(Ok(false)) => {}
                Ok(Err(e)) => error = Some(e),
                Err(_) => {}
            }
        }
        let none = || {
            sqlx::Error::Io(std::io::Error::new(
                std::io::ErrorKind::NotConnected,
                "no host of database.url takes writes",
            ))
        };
        Err(error.unwrap_or_else(none))
    }
}

async fn probe(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut conn = PgConnection::connect_with(options).await?;
    let follows: bool = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut conn).await?;
    let _ = conn.close().await;
    Ok(!follows)
}

fn loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A URL for each host of a URL with several.
fn split(url: &str) -> Result<Vec<String>, String> {
    let (scheme, rest) = url.split_once("://").ok_or("database.url must look like postgres://user@host/dbname")?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let (user, hosts) = authority.rsplit_once('@').map_or(("", authority), |(u, h)| (u, h));
    let at = if user.is_empty() { "" } else { "@" };
    Ok(hosts.split(',').map(|host| format!("{scheme}://{user}{at}{host}{tail}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_with_several_hosts_is_several() {
        assert_eq!(
            split("postgres://u:p@a:1,b/db?sslmode=require").unwrap(),
            ["postgres://u:p@a:1/db?sslmode=require", "postgres://u:p@b/db?sslmode=require"]
        );
        assert_eq!(split("postgres:///db?host=/run").unwrap(), ["postgres:///db?host=/run"]);
    }

    #[test]
    fn another_machine_needs_encryption() {
        assert!(Hosts::parse("postgres://u@db.example.org/x").err().unwrap().contains("verify-full"));
        assert!(Hosts::parse("postgres://u@127.0.0.1,db.example.org/x").is_err(), "each host counts");
        assert!(Hosts::parse("postgres://u@db.example.org/x?sslmode=verify-full").is_ok());
        assert!(Hosts::parse("postgres://u@127.0.0.1:5433/x").is_ok());
        assert!(Hosts::parse("postgres:///x?host=/run/postgresql").is_ok());
        assert!(Hosts::parse("not a url").is_err());
    }
}
