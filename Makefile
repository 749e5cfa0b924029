# Everything from a fresh clone with Python 3.11 or newer, git and make: each target installs what it needs into .venv first.
#   make demo        train a small Qwen3-MoE on this machine, export it, prove the export
#   make test        the CPU test suite, on the newest Transformers that expertmesh allows
#   make test-oldest what depends on Transformers, on the oldest; in .venv-oldest, which shares the rest with .venv
#   make slow        every family on every layout of two and four ranks
#   make lint        ruff and mypy
#   make acceptance  transformers' own model tests on our classes
#   make mixins TRANSFORMERS=path  more of them, from a transformers checkout of the installed version
#
# TORCH is what pip is asked for before anything else. A machine without an NVIDIA GPU gets one fixed release, so that
# no dependency pulls gigabytes of CUDA libraries later; `make TORCH=torch==2.14.1 demo` overrides it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest slow lint acceptance mixins clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
WORKERS ?= 3
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -qq
READY = $(VENV)/.ready
SITE = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# The oldest Transformers, and the tests that go there: what recognises, runs or is run by its code. All else (kernels,
# exchanges, layouts but one on two ranks, checkpoints, the command line) runs on the newest alone. About 5 minutes.
OLDEST := $(shell sed -n 's/^OLDEST = "\(.*\)"/\1/p' src/expertmesh/backends.py)
OLDEST_VENV = $(VENV)-oldest
OLDEST_READY = $(OLDEST_VENV)/.ready
OLDEST_TESTS = tests/test_{backends,fuse,parity,interface,export,trainers}.py tests/families tests/weights/test_{four_bit,read}.py \
	tests/layers/test_{attention,head,lora,mamba2,mla,mtp,rope,rows,sinks,twins}.py tests/moe/test_{four_bit,lora,router}.py tests/train/test_routing.py \
	tests/distributed/test_ep_parity.py::test_gradients_on_two_ranks
OLDEST_LEAVES = not triton and not compiled

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

$(READY): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expertmesh needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	@echo "setting up $(VENV) with $$("$(PYTHON)" --version), $(TORCH): a few minutes, once"
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) --upgrade transformers --editable ".[dev]"
	@touch $@

# transformers alone is installed twice: a .pth file puts the packages of .venv behind its own
$(OLDEST_READY): $(READY)
	$(VENV)/bin/python -m venv --without-pip $(OLDEST_VENV)
	echo "import site; site.addsitedir('$$($(VENV)/bin/python $(SITE))')" > "$$($(OLDEST_VENV)/bin/python $(SITE))/rest.pth"
	$(VENV)/bin/python -m pip --disable-pip-version-check --python $(OLDEST_VENV)/bin/python install -qq transformers==$(OLDEST)
	$(OLDEST_VENV)/bin/python -c 'import expertmesh, transformers; assert transformers.__version__ == "$(OLDEST)", transformers'
	@touch $@

demo: $(READY)
	$(VENV)/bin/expertmesh demo

# xdist gives each worker a core of its own: one BLAS thread each, or they fight over both
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) -q -m "not slow" --ignore=tests/acceptance

test-oldest: $(OLDEST_READY)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n $(WORKERS) -q -m "not slow" -k "$(OLDEST_LEAVES)" $(OLDEST_TESTS)

slow: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) -q -m slow --ignore=tests/acceptance

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

acceptance: $(READY)
	$(VENV)/bin/python -m pytest -q tests/acceptance

mixins: $(READY)
	@test -n "$(TRANSFORMERS)" || { echo "say where: make mixins TRANSFORMERS=path-of-a-transformers-checkout"; exit 2; }
	$(VENV)/bin/python tests/acceptance/checkout.py "$(TRANSFORMERS)"

clean:
	rm -rf $(VENV) $(OLDEST_VENV) .acceptance demo-output dist build site .pytest_cache .mypy_cache .ruff_cache
