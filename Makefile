# Calve: `make demo` shows it, `make test` proves it. Both install what they need.
# `make check` (lint, types, unit tests) takes under a minute and is what one runs all day.
SHELL := /bin/bash
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src -name '*.py') pyproject.toml README.md

.PHONY: setup check test test-full demo bench lock format clean

setup: $(VENV)/.installed

$(VENV)/.packages: tools/packages.txt tools/setup
	@tools/setup packages $(VENV)

$(VENV)/.requirements: $(VENV)/.packages requirements/dev.txt
	@tools/setup requirements $(VENV) $(PYTHON)

# What is tested and run is the wheel, made anew whenever a source is newer.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	@tools/setup wheel $(VENV)

check: setup
	@tools/tests check

test: setup
	@tools/tests test

test-full: setup
	@tools/tests full

demo: setup
	@$(BIN)/calve demo

bench: setup
	@tools/tests bench

# Renews the locked requirements: hashes, no index address.
lock:
	@$(BIN)/uv pip compile -q pyproject.toml --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --upgrade -o requirements/dev.txt

format:
	@$(BIN)/ruff format -q src tests benchmarks && $(BIN)/ruff check -q --fix src tests benchmarks

clean:
	@rm -rf .calve build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
