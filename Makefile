# `make demo` and `make test` set up what they need, once, in .venv.

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINED := $(BIN)/pip install --constraint constraints.txt
WORKERS ?= 2

SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUITABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.DELETE_ON_ERROR:
.PHONY: help demo test lint format types docs hooks clean

help:
	@echo "make demo    distil a 40-mode mixture into a one-step generator, and report on it"
	@echo "make test    every test and every example in the documentation"
	@echo "make lint    ruff's rules and formatting"
	@echo "make format  apply both"
	@echo "make types   mypy, strict"
	@echo "make docs    the documentation, in build/docs"
	@echo "make hooks   run lint and types before every commit"
	@echo "make clean   remove .venv and all that was built"

demo: $(VENV)/.core
	$(BIN)/vardistill demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/docs

hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUITABLE)' >/dev/null 2>&1 || { \
	  echo "vardistill needs Python 3.10 or newer with its venv module; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Each stamp marks an installation; the larger ones contain the smaller.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(CONSTRAINED) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(CONSTRAINED) --editable '.[test]'
	@touch $(VENV)/.core $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(CONSTRAINED) --editable '.[dev]'
	@touch $(VENV)/.core $(VENV)/.test $@
