# make train | test | test-all | test-cluster | gpu | check | setup     make train ARGS="norm=local data.batch_per_rank=2"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: setup train test test-all test-cluster gpu check format clean
.DEFAULT_GOAL := train

setup: $(VENV)/ready

# Done again whenever what is to be installed has changed
$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard syncbn/kernels/cpu/*.[ch] syncbn/shared_memory/*.c)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "syncbn needs Python 3.11 or newer and " \
		"$(PYTHON) is " + sys.version.split()[0] + ": make setup PYTHON=python3.12, say")'
	@echo "Installing into $(VENV): about 5 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	@touch $@

train: setup
	@$(BIN)/python train.py $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(ARGS)

test-cluster: setup
	$(BIN)/python -m pytest -m cluster $(ARGS)

test-all:
	@echo "Every test, those on a Docker engine and a Slurm too: 65 to 80 minutes on 2 cores"
	@.ci/run all

# Where there is no .venv, as on a machine that has torch already: nothing is installed
gpu:
	@PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.sh $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build syncbn/*/*.so syncbn/*/*/*.so *.egg-info .pytest_cache .ruff_cache
