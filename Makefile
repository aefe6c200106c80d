# Every target sets up what it needs. `make demo` and `make test` are the two to start with.
SHELL := /bin/bash
PYTHON ?= $(shell for v in 3.12 3.11 3.13 3.10; do p=$$(command -v python$$v) && "$$p" -c 'import ensurepip, venv' 2>/dev/null && echo "$$p" && break; done || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
ARGS ?=
# 1: the versions of requirements/dev.txt, by their hashes. 0: the newest that pyproject.toml allows.
LOCKED ?= 1

.PHONY: audit bench bench-plots bench-quick clean collector coverage dashboards demo digests dist drills fmt fresh fuzz help lint lock lock-check picture prometheus-tools setup stack stack-down test test-all test-flip
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml requirements/dev.txt
	@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "flip-observability needs Python 3.10 to 3.13 (with venv); found: '$(PYTHON)'. Set PYTHON=/path/to/python3.x"; exit 1; }
	@mkdir -p "$(VENV)" && date +%s > "$(VENV)/.began"
	"$(PYTHON)" -m venv "$(VENV)"
ifeq ($(LOCKED),1)
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
else
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
endif
	@echo $$(( $$(date +%s) - $$(cat "$(VENV)/.began") )) > "$(VENV)/.seconds" && touch "$@"

setup: $(STAMP) ## virtual environment with everything installed

demo: $(STAMP) ## a real federated run with an embedded hub and bucket (ARGS="--scenario fatal")
	"$(BIN)/flip-obs" demo $(ARGS)

test: $(STAMP) ## lint, types, all tests that need no program and no patience; says what it leaves out (ARGS="-k ledger")
	@FLIP_SETUP_SECONDS="$$(cat "$(VENV)/.seconds" 2>/dev/null)" WORKERS="$(WORKERS)" "$(BIN)/python" -m scripts.test $(ARGS); \
	  code=$$?; rm -f "$(VENV)/.seconds"; exit $$code

test-all: $(STAMP) ## what make test leaves out: Prometheus, collector, all scenarios, kits, drills (ARGS="drills kits")
	@"$(BIN)/python" -m scripts.test_all --workers "$(WORKERS)" $(ARGS)

coverage: $(STAMP) ## all tests of both, with branch coverage
	"$(BIN)/python" -m pytest -n $(WORKERS) --cov --cov-report=term $(ARGS)

fresh: ## README's two commands in a new container that has only Python, git and make (needs podman or docker)
	@"$(PYTHON)" -m scripts.fresh $(ARGS)

test-flip: $(STAMP) ## FLIP's own job types, whole, stock and adopted (makes an environment of 4.3 GB in ~/.cache once)
	@scripts/flip-env.sh
	"$(BIN)/python" -m pytest -n $(WORKERS) -m flip tests/flip_recipes $(ARGS)

prometheus-tools: ## Prometheus and Alertmanager for the tests, unpacked into ~/.cache (Debian, Ubuntu)
	@scripts/fetch-prometheus.sh

collector: ## the OpenTelemetry Collector of otel-collector.yaml, built into ~/.cache (needs Go)
	@collector/build.sh

stack: ## Prometheus, Alertmanager, Tempo, Grafana, a demo server: docs/stack.md (needs Docker)
	@stack/make-env.sh
	docker compose --profile demo up --build --detach --wait

stack-down: ## stop the stack; what it stored stays
	docker compose --profile demo down

lint: $(STAMP) ## ruff and strict mypy
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

fmt: $(STAMP) ## format and mend what can be mended
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

dashboards: $(STAMP) ## write the Grafana dashboards' JSON and the alert rules from their source
	"$(BIN)/python" -m dashboards.grafana
	"$(BIN)/python" -m dashboards.prometheus.alerts

drills: $(STAMP) ## break things on a real site and judge what hub and bucket hold (ARGS="--seed 1 --only aborts")
	"$(BIN)/python" -m drills $(ARGS)

picture: $(STAMP) ## have a real run and draw its dashboard: docs/dashboard.svg (needs Prometheus)
	PYTHONPATH=.:tests "$(BIN)/python" -m dashboards.picture

bench: $(STAMP) ## measure against NVFLARE's collector and FLIP's upload; benchmarks/results.json (under 30 minutes)
	"$(BIN)/python" -m benchmarks $(ARGS)

bench-quick: $(STAMP) ## a quick look at the same figures (under 3 minutes)
	"$(BIN)/python" -m benchmarks --quick --output "$${TMPDIR:-/tmp}/flip-bench-quick.json" $(ARGS)

bench-plots: $(STAMP) ## draw docs/performance-*.svg from benchmarks/results.json
	"$(BIN)/python" -m benchmarks.plots

clean: ## remove the virtual environment and what tools left
	rm -rf "$(VENV)" .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.* htmlcov dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- what goes in and what comes out: docs/supply-chain.md --------------------------------------------------------------

TOOLS := $(VENV)/tools

$(TOOLS)/.installed: requirements/release.txt
	"$(PYTHON)" -m venv "$(TOOLS)"
	"$(TOOLS)/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/release.txt
	@touch "$@"

lock: $(TOOLS)/.installed ## write requirements/*.txt from pyproject.toml (ARGS="--upgrade" for the newest)
	@UV="$(TOOLS)/bin/uv" scripts/lock.sh $(ARGS)

lock-check: $(STAMP) ## whether requirements/*.txt hold all of pyproject.toml, with hashes
	"$(BIN)/python" -m pytest -q tests/test_locks.py

audit: $(TOOLS)/.installed ## known vulnerabilities of what is installed and built (needs the network, and Go)
	@PIP_AUDIT="$(TOOLS)/bin/pip-audit" "$(TOOLS)/bin/python" scripts/audit.py $(ARGS)

digests: ## the digests of the images that are pulled (needs the network; ARGS=--write pins them)
	@"$(PYTHON)" scripts/digests.py $(ARGS)

dist: $(TOOLS)/.installed ## wheel, source archive and bill of materials, in dist/
	@PATH="$(abspath $(TOOLS))/bin:$$PATH" scripts/dist.sh

$(VENV)/.fuzz: $(STAMP) requirements/fuzz.txt
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	@touch "$@"

fuzz: $(VENV)/.fuzz ## feed what reads hostile input, a minute for each target (ARGS="--seconds 600 archive")
	"$(BIN)/python" -m fuzz $(ARGS)
