# Needs only make and Python >= 3.10 with its venv module; everything else goes into .venv.
# PYTHON=python3.12 chooses another interpreter; JOBS=2 is the number of processes of the replication study. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) are respected.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPED := build/typed/advdmd_lightning
JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check mypy format teacher replication replication-smoke clean

help:  ## show this list
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'
	@echo
	@echo "On Linux, pip's default torch brings gigabytes of CUDA libraries. Without an NVIDIA GPU, set up like this:"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"

setup: $(STAMP)  ## create .venv and install the package with its pinned dependencies (once)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Python 3.10 or newer is needed: install one and run make PYTHON=python3.x" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot create virtual environments: on Debian or Ubuntu, sudo apt-get install python3-venv" >&2; \
	  exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## the main job: distil the embedded teacher, evaluate both, write runs/demo/
	$(BIN)/python -m advdmd_lightning.evaluation.demo

replication: setup  ## the replication study: every row with three seeds, tables and figures in runs/replication/ (hours)
	$(BIN)/python -m benchmarks.replication --jobs $(JOBS)

replication-smoke: setup  ## the study's machinery cut down to two minutes; its numbers say nothing
	$(BIN)/python -m benchmarks.replication --plan benchmarks/smoke.yaml --seeds 0 --images-per-category 2 --out runs/replication-smoke

test: setup  ## run every test and doctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

check: setup  ## static checks: ruff, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory mypy
	$(BIN)/codespell

# The checkout keeps callbacks/ and configs/ beside the package; mypy sees them where an installation has them.
mypy: setup
	@rm -rf build/typed && mkdir -p $(TYPED)
	@ln -s $(CURDIR)/advdmd_lightning/* $(CURDIR)/callbacks $(CURDIR)/configs $(TYPED)/
	@ln -s $(CURDIR)/benchmarks build/typed/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p advdmd_lightning -p benchmarks

format: setup  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

teacher: setup  ## train the embedded teacher and CLIP again (an hour or two on 2 cores)
	$(BIN)/python -m advdmd_lightning.shapes.pretrain

clean:  ## remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
