#!/usr/bin/env bash
# Profile-guided optimization: the daemon is built so that it counts what it runs, is put under the loads of the benchmarks, and is
# built again for what it was seen to do; where there is BOLT, the code of that is laid out anew for what it then was seen to do
# (docs/decisions/pgo.md). Says the binary's path. What did not change is not done again.
set -euo pipefail
mkdir -p "${CARGO_TARGET_DIR:-target}/pgo"
here=$(cd "${CARGO_TARGET_DIR:-target}/pgo" && pwd)

# The newest of an LLVM tool, of rustc or of the machine, if it is of a version or later.
llvm() {
    local tool version
    for tool in "$(rustc --print sysroot)"/lib/rustlib/*/bin/"$1" \
        $(ls -d /usr/lib/llvm-*/bin/"$1" 2>/dev/null | sort -rV) "$(command -v "$1" || true)"; do
        [ -x "$tool" ] || continue
        version=$("$tool" --version 2>/dev/null | sed -nE 's/.*LLVM version ([0-9]+).*/\1/p' | head -n 1)
        [ "${version:-0}" -lt "$2" ] || { echo "$tool"; return; }
    done
}

# What is not run counts as cold, and is made small instead of fast.
train() {
    "$@" state-put --clients 128,8,1 --seconds 5 --rounds 1
    "$@" state-get --clients 32 --seconds 4 --rounds 1
    "$@" state-txn --clients 128 --seconds 5 --rounds 1
    "$@" state-locks --seconds 2
    for what in evaluate evaluations token introspect operation-use publish event events; do
        "$@" "$what" --clients 32 --seconds 2 --rounds 1
    done
    "$@" verify --seconds 1
}

# Before 19 it cannot read what this rustc counts.
profdata=$(llvm llvm-profdata 19)
if [ -z "$profdata" ]; then
    echo "needs llvm-profdata, 19 or later: rustup component add llvm-tools, or Debian's llvm-19" >&2
    exit 1
fi
# With a target named, build scripts and macros are left as they are. Cargo's other settings must be the same both times: with
# others the crates have other names, and the counts are silently left out.
host=$(rustc -vV | sed -n 's/^host: //p')
build=("${CARGO:-cargo}" build --release --locked --target "$host" --target-dir)
RUSTFLAGS="${RUSTFLAGS:-} -Cprofile-generate=$here/counts" "${build[@]}" "$here/counting" >&2
counting=$here/counting/$host/release/sop
# Cargo does not look into a profile, so each has a name of its own.
profile=$here/$(sha256sum "$counting" | cut -c 1-16).profdata
if [ ! -e "$profile" ]; then
    rm -rf "$here/counts"
    LLVM_PROFILE_FILE=$here/counts/%m-%p.profraw train "$counting" bench >&2
    "$profdata" merge -o "$profile.new" "$here"/counts/*.profraw
    mv "$profile.new" "$profile"
fi
# The linker has to be told to keep what is hot together, and away from what is cold.
flags="-Cprofile-use=$profile -Clink-arg=-Wl,-z,keep-text-section-prefix"
# An older BOLT does not understand all of what this rustc's LLVM makes. It finds its way by names and relocations.
bolt=$(llvm llvm-bolt "$(rustc -vV | sed -nE 's/^LLVM version: ([0-9]+).*/\1/p')")
[ -z "$bolt" ] || flags="$flags -Cstrip=none -Clink-arg=-Wl,--emit-relocs"
RUSTFLAGS="${RUSTFLAGS:-} $flags" "${build[@]}" "$here/built" >&2
built=$here/built/$host/release/sop
if [ -z "$bolt" ]; then
    echo "without llvm-bolt: $built is not laid out anew" >&2
    echo "$built"
    exit
fi
laid=$here/laid-out/$(sha256sum "$built" | cut -c 1-16)/sop
if [ ! -e "$laid" ]; then
    rm -rf "$here/laid-out" "$here/steps"
    mkdir -p "$(dirname "$laid")" "$here/steps"
    "$bolt" "$built" -instrument -instrumentation-file="$here/steps/of" -instrumentation-file-append-pid -o "$here/steps/sop" >&2
    train "$here/steps/sop" bench >&2
    "$(dirname "$bolt")/merge-fdata" "$here"/steps/of.*.fdata > "$here/steps/all"
    "$bolt" "$built" -data="$here/steps/all" -reorder-blocks=ext-tsp -reorder-functions=cdsort -split-functions -split-all-cold \
        -split-eh -icf=all -plt=hot -use-gnu-stack -o "$laid.new" >&2
    mv "$laid.new" "$laid"
    rm -rf "$here/steps"
fi
echo "$laid"
