# Two commands do everything on a machine that has Python 3.10 or newer and make:
#   make demo   trains the digits example, loses a worker on the way, compares the result with an undisturbed run
#   make test   lint, types and tests (under 10 minutes on two cores)
# Also: make chaos (CHAOS_SEEDS=2), make bench, make lint, make clean. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CHAOS_SEEDS ?= 2
CHAOS_CASES ?= digits:2 digits:3 bytes_lm:2
BENCH_TRIALS ?= 10

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_DIR := build/make

.DELETE_ON_ERROR:
.PHONY: help demo test lint chaos bench clean

help:
	@sed -n '2,4s/^# *//p' Makefile

# --- environment: one stamp a set of packages; each follows pyproject.toml and constraints.txt ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed and $(PYTHON) is older or missing; name another: make PYTHON=python3.12" >&2; exit 2; }
	@echo "creating $(VENV) (the first time this downloads PyTorch and Ray: some minutes)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "no virtual environment could be made (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[dev,examples]'
	@touch $@ $(VENV)/demo.stamp

$(VENV)/bench.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	@touch $@

# --- the main job: two workers, rank 1 is killed inside step 60; `chaos` compares the final states bit by bit ---

demo: $(VENV)/demo.stamp
	@rm -rf $(RUN_DIR)/demo && mkdir -p $(RUN_DIR)/demo
	$(BIN)/orchestrator chaos --workers 2 --storage $(RUN_DIR)/demo --run-name demo \
	  --fault kill:rank=1,step=60 examples/digits.py

# --- checks ---

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not chaos and not gpu"

# Random faults at random moments; one undisturbed run of a script is the reference for all of its seeds. The first case gets
# CHAOS_SEEDS seeds, each other one half as many. The whole proof: make chaos CHAOS_SEEDS=20 (and CHAOS_CASES="digits:4").
chaos: $(VENV)/test.stamp
	@rm -rf $(RUN_DIR)/chaos && mkdir -p $(RUN_DIR)/chaos
	@set -e; seeds=$(CHAOS_SEEDS); for case in $(CHAOS_CASES); do script=$${case%:*}; workers=$${case#*:}; \
	  for seed in $$(seq 1 $$seeds); do \
	    echo "== examples/$$script.py, $$workers workers, seed $$seed"; \
	    $(BIN)/orchestrator chaos --workers $$workers --storage $(RUN_DIR)/chaos \
	      --run-name $$script-$$workers-seed-$$seed --reference $(RUN_DIR)/chaos/reference-$$script-$$workers \
	      --fault random:seed=$$seed,count=5,kinds=kill+raise+exit examples/$$script.py; \
	  done; seeds=$$((($(CHAOS_SEEDS) + 1) / 2)); done

bench: $(VENV)/demo.stamp $(VENV)/bench.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.recovery --trials $(BENCH_TRIALS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.overhead
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.startup

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
