PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# The tests start workers and gateways by the dozen: what they import is compiled once, also where the environment says no.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run check test bench chaos matrix lint sbom audit-deps lock clean help
.DEFAULT_GOAL := run

run: .venv/run  ## draws from end to end on an embedded default: no server, no root
	@$(BIN)/tombola up $(ARGS)

check: .venv/dev lint  ## lint, types and the tests that need no server: an answer within a minute
	$(BIN)/python -m pytest -m 'not (chaos or process or slow)' -n auto -q $(ARGS)

# Two processes more than cores: tests wait for servers and processes.
test: .venv/dev lint  ## everything; finds or starts the servers it needs
	$(BIN)/python -m pytest -n $$($(BIN)/python -c 'import os; print(2 + (os.cpu_count() or 1))') --dist loadfile \
		--no-loadscope-reorder $(ARGS)

lint: .venv/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev  ## the figures of the README, and its chart
	$(BIN)/python -m tests.benchmarks $(ARGS)

chaos: .venv/dev  ## the longer fault runs
	$(BIN)/python -m pytest -m chaos $(ARGS)

matrix: .venv/dev  ## the server tests on other releases' servers, which it fetches: MySQL, newer MariaDB, Redis, RabbitMQ
	$(BIN)/python -m tests.matrix $(ARGS)

sbom: .venv/dev  ## a bill of materials of what is locked: build/tombola.cdx.json
	@mkdir -p build
	@PYTHONWARNINGS=ignore $(BIN)/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml \
		--output-reproducible -o build/tombola.cdx.json
	@echo "sbom: the bill of materials is build/tombola.cdx.json"

audit-deps: .venv/dev sbom  ## known vulnerabilities of what is locked, as the package index tells them; a bill of materials
	@mkdir -p build && rm -f build/vulnerabilities.txt
	@$(BIN)/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r requirements.lock \
		-r requirements-dev.lock --output build/vulnerabilities.txt $(ARGS) || { \
		test -s build/vulnerabilities.txt && cat build/vulnerabilities.txt && echo "audit-deps: update these" >&2 || \
		echo "audit-deps: NOTHING WAS AUDITED, as the data cannot be had: see above" >&2; exit 1; }

lock:  ## resolve the dependencies anew, with hashes; needs uv
	uv pip compile -q -U --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --extra embedded pyproject.toml -o requirements.lock
	uv pip compile -q -U --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --extra embedded --extra dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	uv pip compile -q -U --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --resolution lowest-direct pyproject.toml -o requirements-oldest.lock

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("tombola needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# Hashes cannot be checked for a folder: the project itself comes second, without dependencies of its own.
.venv/run: .venv/bin/python requirements.lock pyproject.toml
	@test -e .venv/dev || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --editable .
	@touch $@

# For whoever reads types without running anything (mypy, an editor): the folders under the name that they are imported by.
.venv/links: .venv/bin/python
	@mkdir -p $@/tombola && for folder in producers worker migrations; do ln -sfn ../../../$$folder $@/tombola/$$folder; done

.venv/dev: .venv/bin/python .venv/links requirements-dev.lock pyproject.toml
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:  ## remove what was built and installed here
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

help:  ## this list
	@sed -n 's/^\([a-z][a-z-]*\):.*##  *\(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
