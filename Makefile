# Every verb works on a fresh machine with Python 3.11+; the first one to need it creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each test process starts servers of its own; beyond four they only wait for each other.
TEST_PROCESSES_MAX ?= 4

.PHONY: help install demo test test-long mutants check bench serve fmt lock
help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv from the lock file
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tollkeeper needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## see it work on a stream of signed events (ONCE=1: check and end)
	$(BIN)/tollkeeper demo $(if $(ONCE),--once)

test: $(STAMP) ## run all tests, on SQLite and on a real PostgreSQL and Valkey
	$(BIN)/pytest -n auto --maxprocesses $(TEST_PROCESSES_MAX) -m "not long"

test-long: $(STAMP) ## run the fault, fuzz and soak tests in their full length
	$(BIN)/pytest -m long --timeout 7200

mutants: $(STAMP) ## break the product on purpose, way by way, and check that the tests notice
	$(BIN)/python -m tools.mutants

check: $(STAMP) ## lint, types, import rules, documents and lock file in step
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy backend tools $(wildcard bench)
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m tools.docs --check
	$(BIN)/python -m tools.lock
	$(BIN)/python -m tools.hosts

bench: $(STAMP) ## compare with a service as usually written, as ratios of one run
	$(BIN)/python -m bench

serve: $(STAMP) ## run the service with the settings of the environment
	$(BIN)/tollkeeper serve

fmt: $(STAMP) ## format the code and write the generated parts of the documents
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/python -m tools.docs

lock: ## resolve pyproject.toml into requirements.lock
	@test -x $(BIN)/uv || $(MAKE) --no-print-directory install
	$(BIN)/uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links --extra dev -q -o requirements.lock pyproject.toml
