# `make demo` and `make test` need only Python 3.11 with its venv module; the rest is installed into .venv.
#
#   make demo    [DATA=folder] [RUN=runs/demo] [CONFIG=quickstart]   all steps on real data; prints the metrics
#   make test    [ARGS="-k name"]      all tests except slow ones
#   make test-all                      all tests, including slow ones
#   make test-k8s                      TorchX jobs on a real Kubernetes API server, which is built where there is none
#   make lint                          ruff, mypy, import-linter
#   make venv                          only .venv, from requirements/cpu.txt; the targets for development add dev.txt
#   make docs                          the documentation site, in site/
#   make wheel                         dist/llmgr_rec-*.whl
#   make clean                         deletes what these targets made, except runs/
#
# LOCK=NAME takes requirements/NAME.txt instead, into .venv-NAME: make test LOCK=next has the newest tested versions,
# LOCK=gpu a CUDA build. PYTHON=python3.13 is another interpreter, VENV=folder another environment.
# DATA is a folder with interactions.parquet and items.parquet; the default is MovieLens-100K.
# TORCH_INDEX is the URL of PyTorch's CPU wheel index, if `pip install torch` gives a CUDA build on this machine:
# make demo TORCH_INDEX=<url>. It is an extra index, used only to build .venv.

LOCK ?= cpu
# Each lock has an environment of its own.
VENV ?= .venv$(if $(filter-out cpu,$(LOCK)),-$(LOCK))
TORCH_INDEX ?=
PYTHON ?=
DATA ?=
RUN ?= runs/demo
CONFIG ?= quickstart
ARGS ?=

BIN = $(VENV)/bin
# One worker per core. The tests of a file run in one worker, because they share expensive fixtures; files start in the
# order of tests/conftest.py.
XDIST = --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# TorchX starts torchrun by name, so the programs of the environment come first.
export PATH := $(abspath $(BIN)):$(PATH)
# Only the locked packages: no user site, no package folders of the caller.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
MAKE_VENV = python3 requirements/make_venv.py --venv "$(VENV)" --lock "requirements/$(LOCK).txt" \
	--torch-index "$(TORCH_INDEX)" --python "$(PYTHON)"

.PHONY: help venv tools demo test test-all test-k8s lint docs wheel clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

venv:
	@command -v python3 >/dev/null || { echo "error: python3 is not installed; fix: apt install python3 python3-venv" >&2; exit 1; }
	@$(MAKE_VENV)

tools: venv
	@$(MAKE_VENV) --tools requirements/dev.txt

demo: venv
	@$(BIN)/python -m torchx_components.pipeline $(if $(DATA),--data "$(DATA)") --output "$(RUN)" --config "$(CONFIG)"

test: tools
	$(BIN)/python -m pytest $(XDIST) $(ARGS)

test-all: tools
	$(BIN)/python -m pytest $(XDIST) -m "slow or not slow" $(ARGS)

test-k8s: tools
	@$(BIN)/python -m tests.kubernetes.programs || bash tests/kubernetes/build_api_server.sh runs/kubernetes
	$(BIN)/python -m pytest -m kubernetes -ra tests/kubernetes $(ARGS)

lint: tools
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

# The variable silences an advertisement of the theme for its successor.
docs: tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: tools
	$(BIN)/python -m build --wheel

clean:
	rm -rf "$(VENV)" "$(VENV).lock" .venv .venv.lock .venv-* build dist site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
