#!/usr/bin/env bash
# All measurements, as Markdown, of the binary SOP, and a few of what `cargo build --release` makes. Etcd is measured beside us where
# it is installed.
set -euo pipefail
plain=${CARGO_TARGET_DIR:-target}/release/sop
sop=${SOP:-$plain}
peer=()
seconds=${SECONDS_A_ROUND:-3}
command -v etcd >/dev/null && peer=(--peer etcd)
built="The daemon, and the load generator, which is the same binary, are as \`cargo build --release\` makes them."
[ "$sop" = "$plain" ] || built="The daemon, and the load generator, which is the same binary, are those of \`make pgo\`, built for what they were seen to do."
case $sop in */laid-out/*) built="${built%.}, and laid out by BOLT." ;; esac
cat <<TXT
# Benchmarks
Made by \`make bench\` on $(nproc) cores ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), $(free -g | awk '/^Mem/ {print $2}') GiB, $(uname -sr), PostgreSQL $(ls /usr/lib/postgresql | sort -n | tail -n 1)${peer:+, $(etcd --version | head -n 1)}.
The load generator, the daemon, PostgreSQL and the peer share these cores. Every layer is on: authentication, decision, entry with details, history, commit on disk.
$built
Medians of interleaved rounds; the machine is shared and noisy, so look at the ratios.
TXT
$sop bench state-put --clients 1,8,32,128 "${peer[@]}" --seconds "$seconds"
$sop bench state-put --clients 1 --peer bare --seconds "$seconds"
if [ "$sop" != "$plain" ]; then
    echo
    echo "The same two, as \`cargo build --release\` makes them, without a profile:"
    $plain bench state-put --clients 1,128 "${peer[@]}" --seconds "$seconds"
    $plain bench state-put --clients 1 --peer bare --seconds "$seconds"
fi
cat <<'TXT'

What bounds `state-put`, on two cores without anything else to do (perf, 2026-11-28, without a profile):
- 128 clients: the processors. Of their time the request path takes 40 % (a quarter of it in the kernel, mostly sending the answer; a fifth memory and the copying of what is in it), the writer's session in PostgreSQL 21 % (four tables, six indexes: a fifth of it the indexes, an eighth the flush), the load generator 12 %, the writer 10 %, making it searchable 3 %, other sessions 3 %; 8 to 13 % are idle, and no less where the next turn is written while a commit is on its way to the disk (docs/decisions/patience.md), which takes 0.6 ms of a turn (0.15 where nothing else runs). With `database.sync = false` it is a tenth more. With a profile, in another hour: request path 34 %, PostgreSQL 30 %, load generator 12 %, writer 9 %, search 2 %, idle 12 %.
- 1 client: what happens one after another. Without waiting for the disk the statement takes 0.18 ms where a bare INSERT takes 0.10 (pgbench; the same with details and entries in one table); the rest of what it takes longer than that is the request itself: who asks, whether they may, the entry and its hashes, on caches that have gone cold in between.
TXT
$sop bench state-get --clients 1,8,32,128 "${peer[@]}" --seconds "$seconds"
$sop bench state-put --daemons 2 --clients 128 --seconds "$seconds"
$sop bench state-txn --clients 32,128 "${peer[@]}" --seconds "$seconds"
$sop bench state-txn-gets --clients 128 "${peer[@]}" --seconds "$seconds"
$sop bench state-keys --seconds "$seconds"
$sop bench state-watch --seconds "$seconds"
# Ten thousand watchers are ten thousand files, here and in the daemon.
(ulimit -n 16384 2>/dev/null || true; $sop bench state-idle)
$sop bench state-leases
$sop bench state-locks --seconds "$seconds"
# npm's package of Cerbos, for Linux on x64.
cerbos=()
if command -v npm >/dev/null && [ "$(uname -sm)" = "Linux x86_64" ]; then
    mkdir -p target/peers && cp -r tests/peers/cerbos target/peers/
    (cd target/peers/cerbos && npm ci --silent --no-audit --no-fund >&2) && cerbos=(--peer cerbos)
fi
$sop bench evaluate --clients 8,32,128 "${cerbos[@]}" --seconds "$seconds"
$sop bench evaluate-sizes --seconds "$seconds"
cat <<'TXT'

The load generator keeps its rate whether answers come or not. What a request took is counted from its being sent, as in every other table, and once more from when it was due: then a stall of 50 ms of the disk's, once in five seconds, is 1 % of all requests. No decision is answered before a commit is on the disk; `/livez` does and waits for nothing.
TXT
$sop bench evaluations --clients 1,8,32 --seconds "$seconds"
$sop bench search
$sop bench replay
$sop bench shadow --clients 32 --seconds "$seconds"
$sop bench swap --seconds "$seconds"
# npm's oidc-provider, where node is installed.
oidc=()
if command -v npm >/dev/null; then
    mkdir -p target/peers && cp -r tests/peers/oidc-provider target/peers/
    (cd target/peers/oidc-provider && npm ci --silent --no-audit --no-fund >&2) && oidc=(--peer oidc)
fi
$sop bench token --clients 8,32 "${oidc[@]}" --seconds "$seconds"
$sop bench introspect --clients 8,32 "${oidc[@]}" --seconds "$seconds"
$sop bench operation-use --clients 32,128 --seconds "$seconds"
$sop bench operation-hot --clients 32,128 --seconds "$seconds"
$sop bench verification --seconds "$seconds"
cat <<'TXT'

What bounds `token` at 32 clients: the write path as such does about 20,000 a second there (`state-put`), and 30 % of the daemon's time is the Ed25519 signature (17 us), made while the entry is committed; 15 % of the machine is idle then, waiting for the disk. oidc-provider keeps its tokens in memory and records nothing.
TXT
$sop bench publish --clients 8,32,128 --seconds "$seconds"
$sop bench event --clients 1,32 --seconds "$seconds"
$sop bench events --clients 1,8,32 --seconds "$seconds"
$sop bench checkpoint --seconds "$seconds"
$sop bench verify --seconds "$seconds"
$sop bench record --seconds "$seconds"
$sop bench proofs
