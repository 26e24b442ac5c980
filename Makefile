# Needs a Python (3.11 to 3.13) and make; `make venv` fetches the rest.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := test
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check
INSTALL = $(PIP)
SUITABLE := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

# Numbers are compared in float32 on the CPU; compiled programs are kept for the next run.
PYTEST := JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 $(BIN)/python -m pytest --quiet
# Most take longer to compile than to run: the compiler is asked for little optimisation, and not to
# divide small programs among threads. Its old way to compile what is fused, which jaxlib 0.10 has and
# 0.12 has not, takes half as long as the new one.
OLD_FUSIONS := print("--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."))
QUICK = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
  --xla_cpu_parallel_codegen_split_count=1 \
  $(shell $(BIN)/python -c 'from importlib.metadata import version; $(OLD_FUSIONS)')
ONE_DEVICE = XLA_FLAGS="$(QUICK)"
# Collectives keep their order with these flags, and without a cache: see parallel/mesh.py.
EIGHT_DEVICES = JAX_ENABLE_COMPILATION_CACHE=false XLA_FLAGS="$(QUICK) \
  --xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false \
  --xla_cpu_multi_thread_eigen=false --xla_cpu_experimental_ynn_fusion_type="

.PHONY: help venv demo test test-slow test-convert test-torch test-tpu test-libtpu test-pillow test-lowest notebooks lint
help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1: /p' Makefile

venv: $(INSTALLED)  ## make .venv, or bring it up to date with setup.py

demo: $(INSTALLED)  ## watch a video with the embedded model and ask three questions
	@$(BIN)/vcflash demo

# Two at a time, since compiling keeps one core busy; the tests of a file share what they compile.
# Started again after a crash, the tests would wait for each other for ever.
TWO := --numprocesses 2 --dist loadfile --max-worker-restart 0
test: $(INSTALLED)  ## the tests that take minutes in all
	@$(ONE_DEVICE) $(PYTEST) $(TWO)
	@$(EIGHT_DEVICES) $(PYTEST) $(TWO) tests/multidevice

test-slow: $(INSTALLED)  ## the tests that take minutes each
	@$(ONE_DEVICE) $(PYTEST) $(TWO) --durations 12 -m slow
	@$(EIGHT_DEVICES) $(PYTEST) $(TWO) --durations 12 -m slow tests/multidevice

# This torch comes without gigabytes of libraries for GPUs.
TORCH := --no-deps torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
test-convert:  ## the tests that need torch, in an environment of their own
	@$(MAKE) --no-print-directory VENV=$(VENV)-convert EXTRAS=test,convert FIRST="$(TORCH)" test-torch

test-torch: $(INSTALLED)
	@$(PYTEST) -m torch

test-tpu:  ## compile for TPUs, with none at hand, in an environment of its own
	@$(MAKE) --no-print-directory VENV=$(VENV)-tpu EXTRAS=test,tpu test-libtpu

# Programs for a TPU cannot be read back from the cache without one.
test-libtpu: $(INSTALLED)
	@JAX_ENABLE_COMPILATION_CACHE=false $(PYTEST) $(TWO) -m tpu

# Pillow resizes the pictures that the model sees: a version must not change a number.
OLDEST_PILLOW := $(shell sed -n 's/.*"pillow>=\([0-9.]*\),.*/\1/p' setup.py)
test-pillow: $(INSTALLED)  ## the tests of pictures and videos with the oldest Pillow that setup.py allows
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade \
	  --target .cache/pillow pillow==$(OLDEST_PILLOW)
	@PYTHONPATH=.cache/pillow $(ONE_DEVICE) $(PYTEST) $(TWO) tests/data/media tests/parity/resize_test.py \
	  tests/parity/preprocess_test.py tests/parity/anyres_test.py tests/parity/frames_test.py

# uv can choose the lowest versions that are declared.
LOWEST := $(VENV)-lowest/bin/uv pip install -q --python $(VENV)-lowest --resolution lowest-direct
test-lowest:  ## the tests with the oldest packages that setup.py allows, in an environment of its own
	@$(MAKE) --no-print-directory VENV=$(VENV)-lowest FIRST=uv INSTALL="$(LOWEST)" test

# Colab has Python 3.12. What it comes with is left as it is.
COLAB := launch/colab
OF_COLAB := numpy pillow protobuf pyyaml requests
notebooks: $(INSTALLED)  ## write the notebooks from their sources, and the versions that Colab installs
	@$(BIN)/jupytext --quiet --to ipynb $(COLAB)/*.py
	@$(PIP) uv
	@$(BIN)/uv pip compile --quiet --python-version 3.12 --extra tpu --no-annotate --no-header \
	  $(OF_COLAB:%=--no-emit-package %) setup.py --output-file $(COLAB)/constraints.txt

lint: $(INSTALLED)  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

$(INSTALLED): setup.py
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for candidate in $(PYTHON) python3.12 python3.11 python3.13 python3 ""; do \
	    if $$candidate -c '$(SUITABLE)' 2>/dev/null; then break; fi; \
	  done; \
	  if [ -z "$$candidate" ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 (with ensurepip) found; python3 is" \
	      "$$(python3 --version 2>/dev/null || echo absent). Name one: make venv PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$candidate --version)"; \
	  $$candidate -m venv --clear $(VENV); \
	fi; \
	echo "Installing the package and what its tests need (a minute or two)"; \
	if [ -n "$(FIRST)" ]; then $(PIP) $(FIRST); fi; \
	$(INSTALL) -e ".[$(EXTRAS)]"; \
	touch $@
