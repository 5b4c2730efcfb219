# Everything sets itself up: Python 3.11 or newer and make are all that a machine needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/peers
BENCH_READY := .venv/.ready-bench
ROUNDS ?= 3

.PHONY: help install demo demo-cluster test test-all bench lint check clean

help:
	@echo "make demo      photographs -> shards -> training -> tokens -> pictures, in ./demo-output"
	@echo "make demo-cluster  the same through a Ray Jobs server and an S3 server of this machine, in ./demo-cluster"
	@echo "make test      all tests but the slow ones;  make test-all: those too"
	@echo "make bench     the tokenising engine beside a plain loop, torch's DataLoader and Ray Data, about 14 minutes"
	@echo "make check     ruff, mypy and the quick tests"
	@echo "make install   just make .venv with .venv/bin/dvae in it"

install: $(READY)

# torch first and by itself: what else names torch would otherwise let pip choose another build of it.
$(READY): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/dvae demo

demo-cluster: $(READY)
	$(BIN)/dvae demo --cluster

# The classes whose files we import, to hold ours against them; apart, for the rest must work where they are not.
$(PEERS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		dall-e==0.1 dalle-pytorch==1.6.6 einops==0.8.2 attrs requests
	@touch $@

# The quick ones on all cores, then the others one by one: those have clusters, servers and clocks of their own.
test test-all: export DVAE_TEST_PEERS := $(CURDIR)/$(PEERS)
test: $(PEERS)
	$(BIN)/pytest -m quick -n auto
	$(BIN)/pytest -m 'not quick and not slow'

test-all: $(PEERS)
	$(BIN)/pytest -m ''

$(BENCH_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt --editable '.[bench]'
	@touch $@

bench: $(BENCH_READY)
	$(BIN)/python tests/bench_peers.py --rounds $(ROUNDS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/pytest -m quick -n auto

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
