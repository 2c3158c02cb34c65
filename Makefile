PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs

# Packages are installed without bytecode, most of which is never imported: who imports, writes it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint notebooks docs bench bench-quick clean

help:  ## show what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.recipes  ## set up, and fine-tune on real text with a KL penalty: plots and a report in runs/finetune
	$(BIN)/penalties-jax finetune --out $(RUNS)/finetune $(ARGS)

test: $(VENV)/.test  ## set up, and run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.test  ## the tests that take minutes each: whole runs on several devices
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.test  ## ruff and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

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

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) $(RUNS) benchmarks/results site dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "penalties-jax needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "this Python has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		-c constraints.txt -e '.[$*]'
	@touch $@
