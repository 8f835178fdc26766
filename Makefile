# `make demo` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
RECENT := 'import sys; sys.exit(sys.version_info < (3, 11))'
VENV := .venv
BIN := $(VENV)/bin
# what is imported is compiled then: of all that comes along most never is
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Tests start hundreds of processes, as on any machine: with the package compiled once.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := demo
.PHONY: demo test check lint docs bench paper paper-report clean

# an environment that was moved or copied here, or whose Python is gone, too old or has become
# another (which finds no pip), is made anew (one that is a link is somebody else's)
ifneq ($(shell test -L $(VENV) && echo True 1 || { \
	$(BIN)/python -c 'import pip, sys; print(sys.version_info >= (3, 11))' 2>/dev/null \
	&& head -3 $(BIN)/pip 2>/dev/null | grep -cF '$(abspath $(BIN))/'; }),True 1)
.PHONY: $(BIN)/python
endif

$(BIN)/python:
	@$(PYTHON) -c $(RECENT) || { \
	for other in python3.12 python3.13 python3.11; do $$other -c $(RECENT) 2>/dev/null && break; done; \
	echo "ckdiff needs Python 3.11 or newer, and $(PYTHON) is none;" \
	"choose one: make PYTHON=$$other $(or $(firstword $(MAKECMDGOALS)),demo)"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# the package and what it needs to run
$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing ckdiff and what it runs with into $(VENV)"
	$(PIP) -e '.[report]'
	@touch $@

# the test tools; torch by itself and first, so that nothing else chooses a build of it
$(VENV)/.test: $(VENV)/.run
	@echo "installing torch and the test tools: some minutes, the first time"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	@touch $@

demo: $(VENV)/.run
	$(BIN)/python examples/tiny_rl/demo.py

test: $(VENV)/.test lint
	$(BIN)/python tests/fetch_checkpoints.py
	$(BIN)/python -m pytest -n 2 --dist worksteal

# lint, types and the tests that take no second: for every few minutes
check: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" --ignore tests/training

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every run of the paper, from nothing, in build/paper; stopped, the same command goes on
paper: $(VENV)/.test
	$(BIN)/python examples/paper run
	$(BIN)/python examples/paper check-trl

# docs/paper.md and its figures from the stored results, without training
paper-report: $(VENV)/.test
	$(BIN)/python examples/paper report

# the site, one folder for each version; a warning is an error
docs: $(VENV)/.test
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs site/$$($(BIN)/python -c 'import ckdiff; print(ckdiff.__version__)')

bench: $(VENV)/.test
	$(BIN)/python bench/all.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
