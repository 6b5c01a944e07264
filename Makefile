# `make demo` and `make test` need nothing but Python 3.11 with its venv module; the rest is installed into .venv.
#
#   make demo    [DATA=folder] [RUN=runs/demo] [CONFIG=quickstart]   the whole path on real data, ends with the metrics
#   make test    [ARGS="-k name"]      the tests, without those marked slow
#   make test-all                      all tests, with the slow ones
#   make lint                          ruff, mypy, import-linter
#   make venv    [LOCK=gpu]            .venv alone, from requirements/$(LOCK).txt
#   make wheel                         dist/llmgr_rec-*.whl
#   make clean                         removes what the targets above made, runs/ excepted
#
# DATA is a folder with interactions.parquet and items.parquet; without it the demo takes MovieLens-100K.
# TORCH_INDEX is the address of PyTorch's CPU wheel index, for machines where plain `pip install torch` brings a CUDA
# build: make demo TORCH_INDEX=<address>. It is asked beside the usual index, and only for building .venv.

VENV ?= .venv
LOCK ?= cpu
TORCH_INDEX ?=
PYTHON ?=
DATA ?=
RUN ?= runs/demo
CONFIG ?= quickstart
ARGS ?=

BIN = $(VENV)/bin
# One worker a core, a file's tests in one worker because they share what is costly to make.
SPREAD = --numprocesses logical --maxprocesses 8 --dist loadfile
# Children are started by name (torchrun by TorchX), so the environment's programs come first.
export PATH := $(abspath $(BIN)):$(PATH)
# The locked packages and nothing else: no user site, no package folders of the caller.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint wheel clean

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

venv:
	@command -v python3 >/dev/null || { echo "error: python3 is not installed; mend: apt install python3 python3-venv" >&2; exit 1; }
	@python3 requirements/make_venv.py --venv "$(VENV)" --lock "requirements/$(LOCK).txt" \
		--torch-index "$(TORCH_INDEX)" --python "$(PYTHON)"

demo: venv
	@$(BIN)/python -m torchx_components.pipeline --data "$(DATA)" --output "$(RUN)" --config "$(CONFIG)"

test: venv
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

test-all: venv
	$(BIN)/python -m pytest $(SPREAD) -m "slow or not slow" $(ARGS)

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

wheel: venv
	$(BIN)/python -m build --wheel

clean:
	rm -rf "$(VENV)" "$(VENV).lock" build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
