//! Keys of clients that are served elsewhere (`jwks_uri`, RFC 7591): fetched when they are wanted, and with limits, because whoever
//! registers a client says where the daemon goes to.
//!
//! Only https to public addresses, unless the configuration allows others; the addresses a name stands for are looked at when it is
//! resolved, for the very connection that follows, so that it cannot mean another a moment later. No redirects, 64 KiB, 3 seconds,
//! one fetch of a URL at a time and in ten seconds, whatever is asked for.

use std::error::Error as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntCounterVec;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, Url, redirect};
use serde_json::Value;
use tokio::sync::{Mutex, Semaphore};

use crate::kernel::Clock;

const TIMEOUT: Duration = Duration::from_secs(3);
const LARGEST: usize = 64 * 1024;
/// Keys of one set that are looked at.
const MOST: usize = 64;
/// Fetches at once.
const AT_ONCE: usize = 8;
/// Between two fetches of one URL.
const AGAIN: Duration = Duration::from_secs(10);
/// How long a set is kept: what its `max-age` says, within this.
const KEPT: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(3600));
/// Without one.
const KEPT_WITHOUT: Duration = Duration::from_secs(300);
/// How long it is still used when it cannot be fetched.
const GRACE: Duration = Duration::from_secs(300);

/// Whether an address is one of the public internet.
fn public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => public_v4(ip),
        IpAddr::V6(ip) => public_v6(ip),
    }
}

fn public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = ip.is_private()
        || ip.is_loopback()
        || ip.is_link_local()
        || ip.is_broadcast()
        || ip.is_documentation()
        || ip.is_multicast()
        || a == 0
        || a >= 240
        // Shared, protocol assignments, benchmarks (RFC 6598, 6890, 2544).
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && (18..20).contains(&b));
    !special
}

fn public_v6(ip: Ipv6Addr) -> bool {
    let [a, b, ..] = ip.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    match (a, b) {
        // NAT64 and 6to4 carry an address of IPv4 in them.
        (0x64, 0xff9b) => public_v4(v4(ip.segments()[6], ip.segments()[7])),
        (0x2002, _) => public_v4(v4(b, ip.segments()[2])),
        (0x2001, 0xdb8 | 0) => false,
        // Global unicast is 2000::/3.
        _ => a & 0xe000 == 0x2000,
    }
}

/// What is wrong with a URL to fetch keys from, if anything.
pub(super) fn fault(uri: &str, private: bool) -> Option<&'static str> {
    let Ok(url) = Url::parse(uri) else { return Some("an absolute URL is wanted") };
    if url.scheme() != "https" && !(private && url.scheme() == "http") {
        return Some("an https URL is wanted");
    }
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Some("no user, password or fragment is wanted");
    }
    let literal = url.host_str().and_then(|h| h.trim_matches(['[', ']']).parse::<IpAddr>().ok());
    match (url.host_str(), literal) {
        (None, _) => Some("a host is wanted"),
        (_, Some(ip)) if !private && !public(ip) => Some("the address is not a public one"),
        _ => None,
    }
}

/// Resolves names to public addresses only.
struct Public;

impl Resolve for Public {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((name.as_str(), 0)).await?.filter(|a| public(a.ip())).collect();
            if found.is_empty() {
                return Err(format!("{} stands for no public address", name.as_str()).into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[derive(Default)]
struct Kept {
    keys: Arc<Vec<Value>>,
    until: Duration,
    tried: Option<Duration>,
}

/// Fetches and keeps key sets. Cheap to clone.
#[derive(Clone)]
pub(super) struct Fetcher {
    http: Client,
    clock: Clock,
    private: bool,
    at_once: Arc<Semaphore>,
    kept: moka::sync::Cache<String, Arc<Mutex<Kept>>>,
    fetched: IntCounterVec,
}

impl Fetcher {
    /// `private`: addresses that are not public, and plain http, may be fetched from.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(private: bool, clock: Clock, fetched: IntCounterVec) -> Result<Self, reqwest::Error> {
        let http =
            Client::builder().no_proxy().redirect(redirect::Policy::none()).timeout(TIMEOUT).connect_timeout(TIMEOUT);
        let http = if private { http } else { http.https_only(true).dns_resolver(Arc::new(Public)) };
        let kept = moka::sync::Cache::builder().max_capacity(10_000).build();
        Ok(Self { http: http.build()?, clock, private, at_once: Arc::new(Semaphore::new(AT_ONCE)), kept, fetched })
    }

    /// The keys at this URL, newly fetched if there is none of this id among those that are kept.
    pub async fn keys(&self, uri: &str, kid: Option<&str>) -> Arc<Vec<Value>> {
        let slot = self.kept.get_with_by_ref(uri, Arc::default);
        let mut kept = slot.lock().await;
        let now = self.clock.elapsed();
        let known = kid.is_none_or(|kid| kept.keys.iter().any(|k| k["kid"] == kid));
        let just = kept.tried.is_some_and(|tried| now.saturating_sub(tried) < AGAIN);
        if (now < kept.until && known) || just {
            return kept.keys.clone();
        }
        kept.tried = Some(now);
        match self.fetch(uri).await {
            Ok((keys, age)) => {
                self.fetched.with_label_values(&["ok"]).inc();
                kept.keys = Arc::new(keys);
                kept.until = now + age;
            }
            Err(e) => {
                self.fetched.with_label_values(&["failed"]).inc();
                tracing::warn!(uri, error = %e, "a client's keys could not be fetched: {e}");
                if now > kept.until + GRACE {
                    kept.keys = Arc::default();
                }
            }
        }
        kept.keys.clone()
    }

    async fn fetch(&self, uri: &str) -> Result<(Vec<Value>, Duration), String> {
        let _one = self.at_once.acquire().await.map_err(|e| e.to_string())?;
        // It may have been registered with a daemon that is allowed more.
        if let Some(fault) = fault(uri, self.private) {
            return Err(fault.to_owned());
        }
        let said = |e: reqwest::Error| {
            let e = e.without_url();
            let causes =
                std::iter::successors(e.source(), |e: &&dyn std::error::Error| (*e).source()).map(|e| format!(": {e}"));
            format!("{e}{}", causes.collect::<String>())
        };
        let mut answer = self
            .http
            .get(uri)
            .header("accept", "application/jwk-set+json, application/json")
            .send()
            .await
            .map_err(said)?;
        if answer.status() != 200 {
            return Err(format!("it answered {}", answer.status().as_u16()));
        }
        let control = answer.headers().get("cache-control").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let age = max_age(control);
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(said)? {
            body.extend_from_slice(&chunk);
            if body.len() > LARGEST {
                return Err(format!("it is larger than {LARGEST} bytes"));
            }
        }
        let set: Value = serde_json::from_slice(&body).map_err(|_| "it is no JSON".to_owned())?;
        let keys =
            set["keys"].as_array().filter(|k| k.len() <= MOST).ok_or("it is no JWK set, or one of too many keys")?;
        Ok((keys.clone(), age))
    }
}

/// How long a set may be kept.
fn max_age(control: &str) -> Duration {
    let said = control.split(',').filter_map(|d| d.trim().strip_prefix("max-age=")).find_map(|n| n.parse().ok());
    said.map_or(KEPT_WITHOUT, Duration::from_secs).clamp(KEPT.0, KEPT.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_public() {
        for ip in ["1.1.1.1", "203.0.114.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:8.8.8.8"] {
            assert!(public(ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "192.0.0.8",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2002:a00:1::",
            "2001:db8::1",
            "::127.0.0.1",
        ] {
            assert!(!public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn urls_that_lead_inside_are_refused() {
        assert_eq!(fault("https://keys.example/jwks", false), None);
        assert_eq!(fault("http://127.0.0.1:1/jwks", true), None);
        for bad in [
            "http://keys.example/jwks",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://user@keys.example/",
            "https://keys.example/#x",
            "file:///etc/passwd",
            "gopher://keys.example/",
            "jwks",
            "",
        ] {
            assert!(fault(bad, false).is_some(), "{bad}");
        }
    }

    #[test]
    fn what_max_age_says_is_kept_to_within_bounds() {
        assert_eq!(max_age("public, max-age=60"), Duration::from_secs(60));
        assert_eq!((max_age("max-age=0"), max_age("max-age=99999999")), KEPT);
        assert_eq!(max_age("no-store"), KEPT_WITHOUT);
    }
}
