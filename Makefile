# Each target does its own set-up: a virtual environment in .venv with what constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all lint format clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("dllmc needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)  ## Compile the bundled checkpoint, solve a few Sudokus, print the memory plan.
	$(BIN)/python examples/sudoku.py

test: $(READY)  ## All tests but the slow ones.
	$(BIN)/pytest $(PARALLEL) -m 'not slow'

test-all: $(READY)  ## Every test; writes tests/summary.json.
	$(BIN)/pytest $(PARALLEL) --summary tests/summary.json

lint: $(READY)  ## ruff, mypy --strict, import-linter.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## Let ruff fix and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and everything that was built.
	rm -rf .venv build dist *.egg-info
