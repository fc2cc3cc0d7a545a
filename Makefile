# Each target does all its set-up: a virtual environment in .venv, the packages, then the work.
#   make demo              the main job on the embedded model and texts (DEMO_LANGUAGE=zh for Chinese)
#   make test              the tests
#   make gpu               all that wants a GPU, on whatever card is there; writes lab/results/gpu.md
#   make lab               the tests of the laboratory, which the gate leaves out (lab/README.md)
#   make docs              the docs site, into site/
#   make check             the one gate: lint, format, types, import contract, docs, tests
# TORCH_INDEX=URL installs torch from that wheel index first (for a CPU build, see the README).

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
DEMO_LANGUAGE ?= ar
BIN := $(VENV)/bin
# Each worker begins with a half of the tests in order, so that few fixtures of a file are made twice.
WORKERS := -n 2 --dist worksteal

.PHONY: demo test slow gpu lab docs lint types imports check clean

demo: $(VENV)/.demo
	$(BIN)/grasp-lora demo --language $(DEMO_LANGUAGE)

# The tests start many Pythons: what those import must not be compiled again each time.
test slow lab: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) tests/method --cov=grasp_lora.method --cov-branch --cov-report=term --cov-fail-under=95
	$(BIN)/python -m pytest $(WORKERS) --ignore=tests/method   # tracing coverage here would cost a quarter of the time

slow: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -m slow

gpu: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python lab/gpu.py

# They use the fixtures of the package's tests.
lab: $(VENV)/.dev
	PYTHONPATH=tests:lab $(BIN)/python -m pytest $(WORKERS) -p conftest lab/tests

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict   # it warns of mkdocs 2, which pyproject.toml leaves out

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy --strict src
	$(BIN)/mypy docs

imports: $(VENV)/.dev
	$(BIN)/lint-imports

# First the packages, in one call of pip; then types beside all else that takes one core.
check: $(VENV)/.dev,docs
	@touch $(VENV)/.dev $(VENV)/.docs
	$(MAKE) -j2 lint types imports docs
	$(MAKE) test

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.11 (or newer)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --index-url $(TORCH_INDEX) torch)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
