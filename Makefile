# Everything happens in .venv, which the first call makes; later calls reinstall only when a dependency changed.

PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# Arguments for the tools: make run ARGS='T=5 seed=1', make unit ARGS='-k store'
ARGS    ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install run test lint unit all-tests long-tests wheel-test wheel bench paper clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

install: $(STAMP) ## make .venv with the project (editable) and its development tools

# torch is pinned and asked for together with torchvision, so that neither drags in another build of the other.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing in $(VENV): about a minute the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

run: $(STAMP) ## run the default distillation: offline, on a CPU, in seconds
	$(BIN)/kd-run $(ARGS)

test: lint all-tests wheel-test ## everything that must hold before a commit is shared

lint: $(STAMP) ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread per worker: torch's own threads would fight over the cores. WORKERS=0 starts sooner for a few tests.
unit: $(STAMP) ## the quick tests: make unit ARGS='-k store'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not long" $(ARGS)

all-tests: $(STAMP) ## the quick and the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not long" $(ARGS)

long-tests: $(STAMP) ## whole runs by several processes, killed streams: minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m long $(ARGS)

wheel-test: $(STAMP) ## an installed wheel behaves as the checkout does
	$(BIN)/python scripts/check_wheel.py

wheel: $(STAMP) ## build dist/*.tar.gz and dist/*.whl
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

bench: $(STAMP) ## measure speed
	$(BIN)/python scripts/bench.py $(ARGS)

paper: $(STAMP) ## the paper's MNIST experiments, with docs/RESULTS.md; goes on where it stopped (hours on a CPU)
	$(BIN)/python scripts/paper.py $(ARGS)

clean: ## remove .venv and what tools leave behind; runs stay
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
	find kd_cli tests scripts -name __pycache__ -prune -exec rm -rf {} +
