# `make chat` and `make test` on a bare machine: Python 3.11 or newer is all they need.
# What was installed is remembered by stamp files in .venv, so repeat calls start at once. tools and apps count because
# a new package in them is found only after installing again.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most of the time of tests is compiling, which takes one core. So libraries that start threads keep to one as well:
# theirs would wait for each other.
TEST_PROCESSES ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# The prompt goes to the program through the environment, as it was typed: make must not expand it.
export ONDEVICE_MAKE_PROMPT := $(value PROMPT)
unexport PROMPT

.PHONY: chat test test-arm64 lint

chat: $(VENV)/.installed
	@if [ -n "$$ONDEVICE_MAKE_PROMPT" ]; then $(BIN)/ondevice chat -p "$$ONDEVICE_MAKE_PROMPT"; \
	else $(BIN)/ondevice chat; fi

test: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The kernels on 64-bit Arm, under qemu on x86-64. Says why if it cannot.
test-arm64: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m arm64 -rs tests/arm64

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update && apt-get install -y python3-venv </dev/null; \
	  else echo "This Python cannot make virtual environments; install it first: apt-get install python3-venv"; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml tools apps | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml tools apps | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,judges,triton]'
	@touch $@ $(VENV)/.installed
