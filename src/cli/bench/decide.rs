//! What decisions cost: by the size of the bundle, in batches, searched, replayed, shadowed, and while a bundle is swapped.

use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};

use super::disk;
use super::load::{self, Figures, Timed, quantile};
use super::policy::{BATCH, Office, groups, levels};
use super::{BenchArgs, Global, head, row};
use crate::kernel::Clock;
use crate::kernel::supervisor::detach;

/// Sizes of bundles that are compared.
const SIZES: [usize; 3] = [1, 1_000, 10_000];
/// Clients of a comparison.
const CLIENTS: usize = 32;
/// Entities that are searched.
const ENTITIES: usize = 100_000;
/// Searches of a kind.
const SEARCHES: usize = 100;
/// Decisions that are replayed.
const REPLAYED: usize = 1_000_000;
/// Requests a second while bundles are swapped.
const MODERATE: f64 = 2_000.0;

/// Single evaluations with bundles of 1, 1,000 and 10,000 policies, in turn; then each at half of what it could.
pub(super) async fn sizes(global: &Global, args: &BenchArgs, office: &Office<'_>) -> anyhow::Result<()> {
    let mut bundles = Vec::new();
    for size in SIZES {
        bundles.push(office.of_size(size).await?);
    }
    let length = Duration::from_secs(args.seconds);
    let mut rounds: Vec<Vec<Figures>> = vec![Vec::new(); SIZES.len()];
    for _ in 0..args.rounds {
        for ((size, bundle), figures) in SIZES.iter().zip(&bundles).zip(&mut rounds) {
            office.activate(bundle).await?;
            figures.push(load::round(office.ours.address(), &office.evaluation(*size), CLIENTS, length).await?);
        }
    }
    let figures: Vec<Figures> = rounds.into_iter().map(Figures::median).collect();
    let halves = halves(args, office, &bundles, &figures).await?;
    head(
        global,
        &[
            "policies",
            "clients",
            "a second",
            "of that with one",
            "p50 ms",
            "p99 ms",
            "p99 ms at half of it",
            "the same from when it was due",
            "so of `/livez`",
            "of the disk",
        ],
    );
    let one = figures[0].rate;
    for ((size, f), Half { took, late, nothing, disk }) in SIZES.iter().zip(figures).zip(halves) {
        let part = f.rate / one;
        row(
            global,
            &json!({"policies": size, "rate": f.rate, "part": part, "p50_ms": f.p50, "p99_ms": f.p99, "half_p99_ms": took,
                    "half_due_p99_ms": late, "half_livez_due_p99_ms": nothing, "disk_p99_ms": disk}),
            format!(
                "| {size} | {CLIENTS} | {:.0} | {part:.2} | {:.2} | {:.2} | {took:.2} | {late:.2} | {nothing:.2} | {disk:.2} |",
                f.rate, f.p50, f.p99
            ),
        );
    }
    Ok(())
}

/// 99th percentiles at half of what is possible, milliseconds.
struct Half {
    /// From being sent.
    took: f64,
    /// From when it was due: what waits behind a stall counts as well.
    late: f64,
    /// The same of as many requests that do and record nothing, right after: what the machine itself is good for.
    nothing: f64,
    /// Of a bare `fdatasync` of one page meanwhile: no decision is answered before one has returned.
    disk: f64,
}

async fn halves(
    args: &BenchArgs,
    office: &Office<'_>,
    bundles: &[String],
    full: &[Figures],
) -> anyhow::Result<Vec<Half>> {
    // The first second is that of the change, and of new connections: `swap` measures it.
    let (warm, length) = (Duration::from_secs(1), Duration::from_secs(args.seconds + 1));
    let address = office.ours.address();
    let livez = load::Request::new(|_| load::http("GET", "/livez", "", ""));
    let mut rounds: Vec<Vec<Half>> = SIZES.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.rounds {
        for (((size, bundle), f), halves) in SIZES.iter().zip(bundles).zip(full).zip(&mut rounds) {
            office.activate(bundle).await?;
            let (rate, request) = (f.rate / 2.0, office.evaluation(*size));
            let asked = load::paced(address, &request, CLIENTS, rate, length);
            let (asked, synced) = tokio::try_join!(asked, disk::syncs(office.ours.dir(), length))?;
            let idle = load::paced(address, &livez, CLIENTS, rate, length).await?;
            let p99 =
                |all: &[Timed], f: fn(&Timed) -> Duration| quantile(all.iter().filter(|t| t.due >= warm).map(f), 0.99);
            halves.push(Half {
                took: p99(&asked, |t| t.took),
                late: p99(&asked, |t| t.late),
                nothing: p99(&idle, |t| t.late),
                disk: quantile(synced, 0.99),
            });
        }
    }
    let median = |all: Vec<Half>| {
        let of = |f: fn(&Half) -> f64| middle(all.iter().map(f).collect());
        Half { took: of(|h| h.took), late: of(|h| h.late), nothing: of(|h| h.nothing), disk: of(|h| h.disk) }
    };
    Ok(rounds.into_iter().map(median).collect())
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Batches of 50.
pub(super) async fn batches(global: &Global, args: &BenchArgs, office: &Office<'_>) -> anyhow::Result<()> {
    let bundle = office.of_size(1).await?;
    office.activate(&bundle).await?;
    head(global, &["clients", "a batch", "decisions a second", "p50 ms", "p99 ms"]);
    for clients in &args.clients {
        for (name, alone) in [("of one subject", false), ("of many", true)] {
            let request = office.evaluations(1, alone);
            let mut rounds = Vec::new();
            for _ in 0..args.rounds {
                let length = Duration::from_secs(args.seconds);
                rounds.push(load::round(office.ours.address(), &request, *clients, length).await?);
            }
            let f = Figures::median(rounds);
            let rate = f.rate * BATCH as f64;
            row(
                global,
                &json!({"clients": clients, "batch": name, "decisions": rate, "p50_ms": f.p50, "p99_ms": f.p99}),
                format!("| {clients} | {BATCH} {name} | {rate:.0} | {:.2} | {:.2} |", f.p50, f.p99),
            );
        }
    }
    Ok(())
}

/// Searches over entities of which half, one in a hundred, and none match.
pub(super) async fn search(global: &Global, office: &Office<'_>) -> anyhow::Result<()> {
    office
        .put(ENTITIES, |n| (format!("doc/d{n}"), json!({"attrs": {"level": n % 100 * ENTITIES + n}}).to_string()))
        .await?;
    for (who, of_hundred) in [("half", 50), ("few", 1), ("none", 0)] {
        let body =
            json!({"attrs": {"level": of_hundred * ENTITIES as i64 - 1}, "parents": [{"type": "group", "id": "g0"}]});
        let body = body.to_string();
        office.put(1, move |_| (format!("user/{who}"), body.clone())).await?;
    }
    let bundle = office.draft(&groups(1, "<=")).await?;
    office.activate(&bundle).await?;
    head(global, &["which documents may be viewed", "found", "looked at", "to go on", "p50 ms", "p95 ms", "p99 ms"]);
    let clock = Clock::system();
    for (who, name) in [("half", "every second"), ("few", "one in a hundred"), ("none", "none")] {
        let mut body =
            json!({"subject": {"type": "user", "id": who}, "action": {"name": "view"}, "resource": {"type": "doc"}});
        let (mut took, mut page) = (Vec::new(), Value::Null);
        for _ in 0..SEARCHES {
            let began = clock.elapsed();
            page = office.post("/access/v1/search/resource", &body).await?;
            took.push(clock.elapsed().saturating_sub(began));
        }
        let (found, looked) = (page["page"]["count"].clone(), page["context"]["looked_at"].clone());
        let more = page["page"]["next_token"].as_str().is_some_and(|token| !token.is_empty());
        let at = |q| quantile(took.iter().copied(), q);
        row(
            global,
            &json!({"match": name, "found": found, "looked_at": looked, "more": more, "p50_ms": at(0.5), "p95_ms": at(0.95)}),
            format!(
                "| {name} | {found} | {looked} | {} | {:.1} | {:.1} | {:.1} |",
                if more { "a token" } else { "nothing" },
                at(0.5),
                at(0.95),
                at(0.99)
            ),
        );
        // To the end, page by page: all are looked at, each once.
        let (mut pages, mut all, mut most) = (0, 0, Duration::ZERO);
        loop {
            let began = clock.elapsed();
            page = office.post("/access/v1/search/resource", &body).await?;
            most = most.max(clock.elapsed().saturating_sub(began));
            pages += 1;
            all += page["page"]["count"].as_u64().unwrap_or_default();
            let next = page["page"]["next_token"].clone();
            if next.as_str().is_none_or(str::is_empty) {
                break;
            }
            body["page"] = json!({"token": next, "limit": 1000});
        }
        let whole = json!({"match": name, "all": all, "pages": pages, "slowest_ms": most.as_secs_f64() * 1e3});
        row(
            global,
            &whole,
            format!(
                "| {name}, all pages | {all} | {ENTITIES} | {pages} pages | | | slowest {:.1} |",
                most.as_secs_f64() * 1e3
            ),
        );
    }
    Ok(())
}

/// A million decisions that were made, decided again by another bundle; how many change is known beforehand.
pub(super) async fn replay(global: &Global, office: &Office<'_>) -> anyhow::Result<()> {
    let bundle = office.of_size(1).await?;
    office.activate(&bundle).await?;
    let stricter = office.draft(&groups(1, "<")).await?;
    load::fill(office.ours.address(), &office.evaluations(1, true), 8, REPLAYED / BATCH).await?;
    let clock = Clock::system();
    let began = clock.elapsed();
    let (mut read, mut changed, mut answers, mut after) = (0, 0, 0, Value::Null);
    loop {
        let path = format!("/v1/governance/bundles/{stricter}/replay");
        let done = office.post(&path, &json!({"limit": REPLAYED, "after": after})).await?;
        let number = |name: &str| done[name].as_u64().unwrap_or_default() as usize;
        read += number("read") - number("skipped");
        changed += number("changed");
        answers += 1;
        after = done["next"].clone();
        if after.is_null() {
            break;
        }
    }
    let seconds = clock.elapsed().saturating_sub(began).as_secs_f64();
    let wrong = (0..REPLAYED).filter(|n| levels(*n).0 == levels(*n).1).count();
    if changed != wrong {
        bail!("{changed} of {read} decisions would be other ones, and {wrong} should");
    }
    let rate = read as f64 / seconds;
    row(
        global,
        &json!({"decisions": read, "changed": changed, "answers": answers, "seconds": seconds, "a_second": rate}),
        format!(
            "{read} decisions replayed in {seconds:.1} s and {answers} answers: {rate:.0} a second; {changed} would be other ones, as they should."
        ),
    );
    Ok(())
}

/// Single evaluations with and without a bundle beside them in shadow.
pub(super) async fn shadow(global: &Global, args: &BenchArgs, office: &Office<'_>) -> anyhow::Result<()> {
    let bundle = office.of_size(1).await?;
    office.activate(&bundle).await?;
    let beside = office.draft(&groups(1, "<")).await?;
    let length = Duration::from_secs(args.seconds);
    let request = office.evaluation(1);
    head(global, &["clients", "a second", "shadowed, a second", "part", "p99 ms", "shadowed, p99 ms"]);
    for clients in &args.clients {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            without.push(load::round(office.ours.address(), &request, *clients, length).await?);
            let path = format!("/v1/governance/bundles/{beside}/shadow");
            office.post(&path, &json!({"on": true})).await?;
            with.push(load::round(office.ours.address(), &request, *clients, length).await?);
            office.post(&path, &json!({"on": false})).await?;
        }
        let (a, b) = (Figures::median(without), Figures::median(with));
        let part = b.rate / a.rate;
        row(
            global,
            &json!({"clients": clients, "rate": a.rate, "shadowed": b.rate, "part": part, "p99_ms": a.p99, "shadowed_p99_ms": b.p99}),
            format!("| {clients} | {:.0} | {:.0} | {part:.2} | {:.2} | {:.2} |", a.rate, b.rate, a.p99, b.p99),
        );
    }
    Ok(())
}

/// How long it takes to hold 10,000 policies to their schema, and what a swap to them does to those who ask meanwhile.
pub(super) async fn swap(global: &Global, args: &BenchArgs, office: &Office<'_>) -> anyhow::Result<()> {
    let clock = Clock::system();
    let large = SIZES[2];
    let before = office.of_size(large).await?;
    office.activate(&before).await?;
    let mut made = Vec::new();
    let mut candidates = Vec::new();
    for _ in 0..args.rounds {
        let began = clock.elapsed();
        candidates.push(office.draft(&groups(large, "<=")).await?);
        made.push(clock.elapsed().saturating_sub(began));
    }
    let validated = quantile(made, 0.5) / 1e3;
    row(
        global,
        &json!({"policies": large, "validated_s": validated}),
        format!("A bundle of {large} policies is parsed, validated, indexed and kept in {validated:.2} s.\n"),
    );
    head(
        global,
        &[
            "requests a second",
            "p99 ms before",
            "p99 ms of the second of the swap",
            "slowest ms before",
            "slowest ms of that second",
            "swapped in ms",
        ],
    );
    for bundle in &candidates {
        office.approve(bundle).await?;
        let (request, address) = (office.evaluation(large), office.ours.address().to_owned());
        let (began, length) = (clock.elapsed(), Duration::from_secs(args.seconds + 4));
        let asking = detach(async move { load::paced(&address, &request, CLIENTS, MODERATE, length).await });
        tokio::time::sleep(Duration::from_secs(args.seconds + 1)).await;
        let from = clock.elapsed().saturating_sub(began);
        office.post(&format!("/v1/governance/bundles/{bundle}/activate"), &json!({})).await?;
        let to = clock.elapsed().saturating_sub(began);
        let all = asking.await??;
        let within =
            |from: Duration, to: Duration| all.iter().filter(move |m| (from..to).contains(&m.due)).map(|m| m.late);
        let (second, end) = (Duration::from_secs(1), to + Duration::from_millis(900));
        let at = |q| {
            [
                quantile(within(second, from), q),
                quantile(within(from.saturating_sub(Duration::from_millis(100)), end), q),
            ]
        };
        let ([before, during], [worst, slowest]) = (at(0.99), at(1.0));
        let took = to.saturating_sub(from).as_secs_f64() * 1e3;
        row(
            global,
            &json!({"rate": MODERATE, "before_p99_ms": before, "swap_p99_ms": during, "before_max_ms": worst, "swap_max_ms": slowest, "swap_ms": took}),
            format!("| {MODERATE:.0} | {before:.2} | {during:.2} | {worst:.2} | {slowest:.2} | {took:.1} |"),
        );
    }
    Ok(())
}
