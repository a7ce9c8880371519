# Both targets do all the set-up on a fresh machine: Python 3.11 or later.
PYTHON ?= python3
BIN = .venv/bin
ACTIVATE = $(BIN)/.installed

.PHONY: quickstart test test-slow lint clean

quickstart: $(ACTIVATE)  ## The miniature sentiment experiment: a table, a figure.
	JAX_PLATFORMS=cpu $(BIN)/python -m launch.reproduce quickstart --workdir=runs/quickstart

# Most of their time is XLA's; test-slow has its optimisations.
test: $(ACTIVATE) lint  ## The default tests, minutes on two cores.
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(ACTIVATE)  ## The tests that take minutes each.
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(ACTIVATE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(ACTIVATE): requirements-lock.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-lock.txt
	touch $@

clean:
	rm -rf .venv runs
