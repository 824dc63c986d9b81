# Everything a developer types. `make` alone lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := $(VENV)/clients
WANTED := tests/runtime/server/stock/requirements.txt

.DEFAULT_GOAL := help
.PHONY: help demo serve clients test test-slow test-gpu check fmt clean

help: ## List what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

# The environment is built once and reused until a requirement changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	"moecast needs Python 3.11 or newer, $(PYTHON) is %d.%d: call make PYTHON=..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes, once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Programs of other people that the server is tested with; why apart is said in their list.
$(CLIENTS)/.installed: $(WANTED) $(INSTALLED)
	@echo "Installing into $(CLIENTS) (half a minute, once)"
	@rm -rf $(CLIENTS)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(CLIENTS) -r $(WANTED)
	@touch $@

clients: $(CLIENTS)/.installed ## Install guidellm and lm-eval, which the server is tested with

demo: $(INSTALLED) ## Collect routing from the embedded MoE, fit a predictor, show how good it is
	$(BIN)/python train.py predictor=semantic

serve: $(INSTALLED) ## Serve the embedded MoE with a quarter of its experts resident
	$(BIN)/python serve.py

test: clients ## Run the tests (two processes, no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: clients ## Run the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not gpu'

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

check: $(INSTALLED) ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(INSTALLED) ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches (never outputs/, never .venv/)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
