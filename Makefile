PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
TORCH := $(shell grep -E '^torch==' constraints.txt)
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/cuda/*.cu kernels/cuda/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench-gpu clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

demo: .venv/.installed  ## distil the bundled digits on this machine and compare with two baselines
	$(BIN)/acs-fast distill --preset digits --evaluate --baselines random,plain

test: lint  ## check style and types, run the tests, compile the kernels for GPUs, break them on purpose
	$(BIN)/pytest -n 2
	$(BIN)/python -m benchmarks.aot_report --check
	$(BIN)/python -m tests.mutations

lint: .venv/.test-installed  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/.test-installed  ## build the documentation's site into site/, warnings are errors
	$(BIN)/mkdocs build --strict

# compute-sanitizer is slow, so it gets few small shapes of each op
bench-gpu: .venv/.test-installed  ## on a GPU: the op tests, compute-sanitizer, then every op against PyTorch
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo 'bench-gpu needs a CUDA GPU and a torch built for it: $(BIN)/pip install --force-reinstall $(TORCH)'; exit 1; }
	@command -v compute-sanitizer >/dev/null || \
	  { echo 'bench-gpu needs compute-sanitizer, which is in the CUDA toolkit, on PATH'; exit 1; }
	$(BIN)/pytest tests/test_ops.py tests/test_triton.py
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/pytest tests/test_ops.py -k \
	  '(B1 or B2-C24 or B3-C3-H17) and not H64-W64 and not reference and bf16'
	$(BIN)/python -m benchmarks.ops_bench --device cuda

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist site *.egg-info .benchmarks .pytest_cache .mypy_cache .ruff_cache
	rm -f kernels/cuda/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# .venv/.unfinished stands while pip works. Where it is left over, or .venv has lost its Python, .venv is made anew.
ifneq ($(shell test -x $(BIN)/python && test ! -e .venv/.unfinished && echo whole),whole)
.PHONY: .venv/.torch
endif

.venv/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'acs-fast needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) cannot make virtual environments: install its venv package (Debian: python3-venv)'; exit 1; }
	@echo 'Making .venv and installing $(TORCH), which takes a few minutes the first time ...'
	@rm -f $@
	@$(PYTHON) -m venv --clear .venv
	@touch .venv/.unfinished
	@$(PIP) install '$(TORCH)'
	@rm .venv/.unfinished
	@touch $@

.venv/.installed: .venv/.torch $(BUILD_FILES)
	@echo 'Installing acs-fast and its dependencies into .venv ...'
	@touch .venv/.unfinished
	@$(PIP) install -c constraints.txt -e .
	@rm .venv/.unfinished
	@touch $@

.venv/.test-installed: .venv/.installed
	@echo 'Installing the test tools into .venv ...'
	@touch .venv/.unfinished
	@$(PIP) install -c constraints.txt -e '.[test,docs,triton,dali]'
	@rm .venv/.unfinished
	@touch $@
