# `make demo` and `make test` work as the first command on a machine with Python 3.11, make and a C library.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install demo test test-slow test-docker test-vllm lint types check bench build clean

help:
	@echo "make demo       set up, then train a tiny policy and prove that it got better (about 5 minutes)"
	@echo "make test       set up, then the fast tests"
	@echo "make test-slow  the slower ones: kill -9 and resume, the sandbox soak"
	@echo "make test-docker  the sandbox in containers, with a Docker engine of its own; needs root"
	@echo "make test-vllm    vLLM for real, on the CPU, in an environment of its own (2 GB, kept in ~/.cache/agentrl)"
	@echo "make check      lint, types, tests"
	@echo "make bench      the benchmarks"

# torch first and pinned: an open range would pull gigabytes of CUDA packages onto a CPU machine.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "agentrl needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

install: $(VENV)/.ready

demo: install
	$(BIN)/agentrl demo

test: install
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -q -m slow

# The engine lives as long as the command: sandboxes/dockerd.sh. No other one is touched.
test-docker: install
	command -v dockerd >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io; }
	PATH="$(abspath $(BIN)):$$PATH" AGENTRL_DOCKER=required sandboxes/dockerd.sh sh -c \
		'python -m agentrl.sandboxes.python.build && python -m pytest -q -m docker tests/sandbox'

# One engine serves many tests, so they share an event loop. vLLM's imports warn, hence -W.
test-vllm:
	python=$$(PYTHON=$(PYTHON) tests/vllm/environment.sh) && PYTHONPATH=. $$python -m pytest -q -p agentrl.pytest_plugin -W default \
		-o asyncio_default_fixture_loop_scope=session -o asyncio_default_test_loop_scope=session \
		--timeout 180 tests/sampler/test_contract.py tests/vllm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

bench: install
	for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file || exit 1; done

build: install
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
