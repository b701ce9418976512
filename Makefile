# What one does daily. `make quickstart` and `make test` need only make and a Python 3.12.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.ready
QUICK := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow chaos check format docs wheel bench plan-env pods clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make the environment in .venv (once, and again when requirements.txt changes)

# Running a tool, not looking for it, is the test: a version manager's placeholder can be there and still not work.
$(STAMP): requirements.txt
	@set -e; found=; \
	for candidate in python3.12 python3 python; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	uv=; \
	if uv --version >/dev/null 2>&1; then uv=uv; \
	elif [ -n "$$found" ] && $$found -m uv --version >/dev/null 2>&1; then uv="$$found -m uv"; fi; \
	if [ -z "$$found$$uv" ]; then echo "error: make setup needs Python 3.12 (or uv) on the PATH" >&2; exit 2; fi; \
	if [ -n "$$uv" ]; then \
	  [ -x $(PYTHON) ] || $$uv venv --python "$${found:-3.12}" $(VENV); \
	  $$uv pip install --python $(PYTHON) -r requirements.txt; \
	  $$uv pip install --python $(PYTHON) --no-deps -e .; \
	else \
	  [ -x $(PYTHON) ] || $$found -m venv $(VENV); \
	  $(PYTHON) -m pip install -r requirements.txt; \
	  $(PYTHON) -m pip install --no-deps -e .; \
	fi
	@touch $@

quickstart: setup ## train a small LLaVA-MoLE on synthetic data, on this machine, and leave a report
	$(PYTHON) -m mole_jax.quickstart

test: setup ## the default tests (minutes)
	$(PYTHON) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu and not torch" --durations=40

test-slow: setup ## the long tests; those that need PyTorch skip themselves without it
	$(PYTHON) -m pytest -m "slow and not gpu"

chaos: setup ## kills, full disks, spoilt files, several hosts: docs/reliability.md
	$(PYTHON) -m pytest -n 2 --dist loadgroup -m "slow and not gpu and not torch" tests/chaos tests/parallel tests/launch

check: setup ## format, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright

format: setup ## format and sort imports
	$(PYTHON) -m ruff check --fix-only --select I .
	$(PYTHON) -m ruff format .

docs: setup ## build the pages as a site in site/; a link that leads nowhere fails
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

wheel: setup ## build the wheel, install it alone, and run the quickstart of it in an empty folder
	$(PYTHON) -m pytest -q -m slow tests/test_wheel.py

bench: setup ## measure the parts and the step on this machine
	$(PYTHON) -m benchmarks

plan-env: ## environment that compiles for TPUs and GPUs that are not there (docs/pods.md)
	python3.12 -m venv plan-env
	plan-env/bin/pip install -r requirements.txt 'jax[tpu]' jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-nvvm
	plan-env/bin/pip install --no-deps -e .

pods: ## plan the recipes for pods: the table of docs/pods.md (an hour or two)
	plan-env/bin/python -m benchmarks.pods --dropout 0 --write

clean: ## remove the environment, caches and the quickstart's run
	rm -rf $(VENV) $(QUICK) site .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
