# The two commands: `make run` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
DATA ?= ./data
CARGO ?= cargo
SOAK ?= 3600

# Clients that nobody here wrote, pinned in tests/clients/requirements.txt and package-lock.json.
CLIENTS := $(or $(CARGO_TARGET_DIR),target)/clients

.PHONY: help run test test-clients test-patroni soak lint fmt pgo bench postgres clean

help: ## Show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: postgres ## Build and serve on a private PostgreSQL in ./data
	$(CARGO) run --release --locked -- serve --data-dir $(DATA)

test: postgres lint ## Everything: format, lints, all tests (they start PostgreSQL themselves)
	$(CARGO) test --locked --all-targets

test-clients: postgres ## Clients of others against a real daemon (needs python3, node 20 with npm, and the network to install them; with etcd, beside it)
	@command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || \
	    { echo "the clients of others need node, 20 or later, with npm; nothing was run" >&2; exit 1; }
	$(CARGO) build --locked
	python3 -m venv $(CLIENTS) && $(CLIENTS)/bin/pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
	cd tests/clients && SOP=$(abspath $(or $(CARGO_TARGET_DIR),target)/debug/sop) PYTHONDONTWRITEBYTECODE=1 \
	    $(abspath $(CLIENTS))/bin/python -m unittest -v
	mkdir -p $(CLIENTS)/node && rm -f $(CLIENTS)/node/*.mjs && cp tests/clients/package*.json tests/clients/*.mjs $(CLIENTS)/node
	cd $(CLIENTS)/node && npm ci --silent --no-audit --no-fund && \
	    SOP=$(abspath $(or $(CARGO_TARGET_DIR),target)/debug/sop) node --test --test-reporter=spec

soak: postgres ## SOAK=3600 seconds of clients under kills and freezes, their histories checked to be linearizable
	SOAK=$(SOAK) $(CARGO) test --locked --test suite state_linear:: -- --nocapture

test-patroni: postgres ## Patroni with the daemon for its etcd (needs python3, and the network to install it)
	$(CARGO) build --locked
	python3 -m venv $(CLIENTS) && $(CLIENTS)/bin/pip install -q --disable-pip-version-check -r tests/clients/patroni.txt
	cd tests/clients && PATRONI=1 SOP=$(abspath $(or $(CARGO_TARGET_DIR),target)/debug/sop) PYTHONDONTWRITEBYTECODE=1 \
	    $(abspath $(CLIENTS))/bin/python -m unittest -v test_patroni

lint: ## rustfmt and clippy, warnings denied
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings

fmt: ## Format the source
	$(CARGO) fmt

pgo: postgres ## The daemon to deploy: built, watched under load, built again for it (needs llvm-profdata, uses llvm-bolt; half an hour on two cores)
	@CARGO=$(CARGO) ./tests/pgo.sh

bench: postgres ## Measure it (without llvm-profdata, what cargo builds) beside etcd (Debian: etcd-server), and npm's oidc-provider and Cerbos; write docs/benchmarks.md
	$(CARGO) build --release --locked
	SOP=$$(CARGO=$(CARGO) ./tests/pgo.sh || echo "measuring what cargo builds, then" >&2) ./tests/bench.sh > docs/benchmarks.md
	@cat docs/benchmarks.md

clean: ## Remove what was built; ./data stays
	$(CARGO) clean

# PostgreSQL's server binaries, 14 or later. Debian's package would create and start a cluster of the system; it is told not to.
postgres:
	@for bin in /usr/lib/postgresql/*/bin "$$(dirname "$$(command -v postgres || echo /none/x)")"; do \
	    if [ -x "$$bin/initdb" ] && [ -x "$$bin/postgres" ]; then \
	        version=$$("$$bin/postgres" --version | sed -E 's/^[^0-9]*([0-9]+).*/\1/'); \
	        if [ "$$version" -ge 14 ]; then exit 0; fi; \
	    fi; \
	done; \
	sudo=; \
	if [ "$$(id -u)" != 0 ]; then \
	    if sudo -n true 2>/dev/null; then sudo="sudo -n"; else sudo=none; fi; \
	fi; \
	if [ "$$sudo" = none ] || ! command -v apt-get >/dev/null; then \
	    echo "sop needs the PostgreSQL server, 14 or later. On Debian type:  sudo apt-get install postgresql" >&2; \
	    exit 1; \
	fi; \
	conf=/etc/postgresql-common/createcluster.conf; \
	if [ ! -e $$conf ]; then \
	    $$sudo mkdir -p /etc/postgresql-common; \
	    echo "create_main_cluster = false" | $$sudo tee $$conf >/dev/null; \
	fi; \
	$$sudo apt-get update -q; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
	    -o Dpkg::Options::=--force-confold postgresql
