# On a fresh machine with Python and make: `make demo` shows the line at work, `make test` tests it.
PYTHON ?= python3
BIN := .venv/bin
# The pins are for Python 3.11 and newer; an older Python takes what pyproject.toml allows.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

.PHONY: demo test check format bench accuracy limits fuzz clean

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[train,demo,dev]'
	touch $@

demo: .venv/.installed  ## keys, an engine from 300 solar cells, the daemon, 400 cells at 25 a second
	$(BIN)/python -m examples.demo

test: .venv/.installed  ## everything that CI tests
	$(BIN)/python -m pytest

check: .venv/.installed  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed  ## times through the sockets and the demo, recorded; then the table in README
	$(BIN)/python -m bench.line
	$(BIN)/python -m bench.demo
	$(BIN)/python -m bench.tables

accuracy: .venv/.installed  ## make accuracy DATA=folder; what is missing in bench/results/accuracy.json; hours
	$(BIN)/python -m bench.accuracy --data $(DATA)
	$(BIN)/python -m bench.tables

limits: .venv/.installed  ## make limits DATA=folder: does the limit keep its word; some 7 minutes
	$(BIN)/python -m bench.limits --data $(DATA)

RUNS ?= 1000000
fuzz: .venv/.installed  ## make fuzz RUNS=1000000; every parser under atheris, bench/results/fuzz.json; hours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --runs $(RUNS)

clean:
	rm -rf .venv demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
