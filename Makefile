# Every target sets up what it needs first: a virtual environment in .venv, nothing outside this folder, no root.
# Variables, as in `make setup PYTHON=python3.12`:
#   PYTHON       the Python (3.10 or newer) that makes the virtual environment
#   TORCH        version of torch where there is no NVIDIA GPU
#   TORCH_INDEX  index of CPU-only builds of torch; asked only where pip's own indexes have none
#   SCALE        what reproduce-... runs: mini (the small model) or paper (LLaVA-7B, on GPUs)
#   SEEDS        its seeds, as in SEEDS="0 1 2"; ARGS further keys of `mixlora reproduce`, as in ARGS=dry_run=true
#   MIXLORA_CACHE  where pictures, the assembled small model and picture features are kept (otherwise in ~/.cache)

export PYTHON ?= python3
export TORCH ?= 2.13.0
export MIXLORA_CACHE ?= $(CURDIR)/.cache
export TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBRARIES := .cache/libraries
REPRODUCTIONS := $(addprefix reproduce-,table1 table2 table3 figure4 figures beyond seen control study study_unseen)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-libraries test-peft gpu-check build install-check lint format types check docs docs-check clean \
  $(REPRODUCTIONS)

help: ## show this list
	@echo "make TARGET, where TARGET is one of (each sets up what it needs first):"
	@grep -hE '^[a-z0-9_-]+:.*## ' Makefile | sed -E 's/^([a-z0-9_-]+):.*## /  \1\t/' | expand -t 22

setup: $(READY) ## make .venv with everything in it (about 3 minutes, 2 GB)

# Done once, and again when what has to be installed changes.
$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@

demo: $(READY) ## train LoRA and MixLoRA on six tasks, show answers before and after (3 to 7 minutes on two cores)
	@$(BIN)/python -m mixlora_cli.cli demo

reproduce-table1: ## Table 1: train and evaluate every row, print the table; SCALE=mini|paper SEEDS="0 1 2"
reproduce-table2: ## Table 2: random, instance and task routing
reproduce-table3: ## Table 3: held-out instances of six seen tasks, specialists among the rows
reproduce-figure4: ## Figure 4: with and without conditional factor selection
reproduce-figures: ## Figures 2, 5, 6 and 7: interference and selection maps
reproduce-beyond: ## beyond the paper: trained routers, prompt pooling, other CFS, task routing, LoRA of equal size
reproduce-seen: ## beyond the paper: these and Table 2 on held-out instances of six seen tasks
reproduce-control: ## beyond the paper: Table 3's six tasks alone, on the same instances as often as the specialists
reproduce-study: ## beyond the paper: ways to select after 900 steps, held-out instances and losses of all seen tasks
reproduce-study_unseen: ## beyond the paper: the same trainings on the unseen benchmarks

# The same command goes on where it was: finished cells stay, interrupted trainings resume, failed ones are tried again.
COMMA := ,
SPACE := $(subst ,, )
$(REPRODUCTIONS): reproduce-%: $(READY)
	@$(BIN)/python -m mixlora_cli.cli reproduce $* scale=$(or $(SCALE),mini) \
	  $(if $(SEEDS),"seeds=[$(subst $(SPACE),$(COMMA),$(strip $(SEEDS)))]") $(ARGS)

# A process for each core, each with one thread: the models of the tests are too small for more.
test: $(READY) ## run the tests (about 20 minutes on two cores)
	@echo "==> Running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Beside the environment and not in it: see tests/libraries/conftest.py.
$(LIBRARIES)/.ready: constraints.txt tests/libraries/requirements.txt $(READY)
	@echo "==> Installing TRL, torchao, lmms-eval and VLMEvalKit into $(LIBRARIES)"
	@rm -rf $(LIBRARIES)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(LIBRARIES) \
	  --constraint constraints.txt --requirement tests/libraries/requirements.txt
	@touch $@

test-libraries: $(LIBRARIES)/.ready ## run the tests with TRL, bitsandbytes, torchao, lmms-eval, VLMEvalKit (3 minutes)
	@echo "==> Running the tests with TRL, bitsandbytes, torchao, lmms-eval and VLMEvalKit"
	@PYTHONPATH=$(LIBRARIES) $(BIN)/python -m pytest tests/libraries

test-peft: $(READY) ## run PEFT's own tests on MixLoRA (about 10 minutes on two cores)
	@nice $(BIN)/python scripts/test_peft.py $(ARGS)

gpu-check: $(READY) ## check and measure on one GPU (8 minutes); ARGS="--parts step", ARGS="--device cpu --tiny"
	@$(BIN)/python scripts/gpu_check.py $(ARGS)

build: $(READY) ## build wheel and sdist into dist/, the wheel out of the sdist, and try it in an empty folder
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation
	@$(BIN)/python scripts/check_wheel.py --no-deps dist/*.whl

install-check: build ## install that wheel with all it requires into an empty environment, and run the demo there
	@$(BIN)/python scripts/check_wheel.py --constraint constraints.txt dist/*.whl

lint: $(READY) ## check style and formatting
	@echo "==> Checking style and formatting (ruff)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY) ## mend what can be mended of style and formatting
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

types: $(READY) ## check the types (mypy --strict; about a minute the first time)
	@echo "==> Checking types (mypy --strict)"
	@$(BIN)/mypy

# The variable silences advertisement of what comes after MkDocs 1. Not --quiet: what it does not print does not fail.
docs: $(READY) ## build the documentation as a site, site/index.html; a broken link or anchor fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "==> Built site/index.html"

docs-check: $(READY) ## run every command and Python block of README and docs on the tiny model (some minutes)
	@$(BIN)/python scripts/docs_check.py $(ARGS)

check: lint types test ## everything that has to pass before a commit

clean: ## delete the virtual environment, caches and built packages; runs/ stays
	@rm -rf $(VENV) .cache dist build site .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "==> Deleted $(VENV), caches and built packages; runs/ is kept"
