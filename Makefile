# Every target sets up .venv by itself, once: Python 3.11 or newer and make are all that is needed.
# A variable of the command line is the option of that name; pipeline/cli/make.py turns it into one, and refuses what it
# doesn't know. Values are passed on as they were typed: quoted for the shell, and never expanded by make.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
BIN := .venv/bin
READY := .venv/ready
OTHERS := help setup test chaos test-floors check format lock
COMMANDS := inspect study plan fields compare finals promote rollback history reproduce robustness sync audit relocate clean-cache predict ensemble compress export serve ui bench bench-gpu

define newline


endef
TYPED := $(foreach v,$(filter-out -% MAKE% PYTHON LOCKED,$(.VARIABLES)),$(if $(filter command line,$(origin $(v))),$(v)))
unexport $(TYPED)
assignments = $(foreach v,$(1),'$(v)=$(subst ','\'',$(subst $(newline), ,$(value $(v))))')
$(if $(filter-out $(COMMANDS) $(OTHERS) $(READY),$(MAKECMDGOALS)),$(error no such command: $(filter-out $(COMMANDS) $(OTHERS) $(READY),$(MAKECMDGOALS)) (make help lists them)))
ifeq ($(filter $(COMMANDS),$(MAKECMDGOALS)),)
$(if $(filter-out DATA_DIR OUTPUT,$(TYPED)),$(error no such variable: $(filter-out DATA_DIR OUTPUT,$(TYPED)) (there are DATA_DIR OUTPUT PYTHON LOCKED)))
endif

.DEFAULT_GOAL := help
.PHONY: $(COMMANDS) $(OTHERS)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

setup: $(READY) ## create .venv and install everything, in the versions of .constraints.txt: [LOCKED=0 for the newest] (every other target does it when needed)

inspect: ## look at a data set before a search, as a table and a page: DATASET= [COLUMNS= TEST_FRACTION= DUPLICATES=keep OUTPUT= DATA_DIR= TRACKING_URI=]
study: ## run or resume a study: NAME= [DATASET= COLUMNS= TEST_FRACTION= DUPLICATES=keep CORRUPT=skip TRIALS= EPOCHS= BUDGET=2h TIMEOUT= PATIENCE= PRUNE=0 START=none DATA_DIR= DEVICE= SEED= VERSION= SET= STORAGE= TRACKING_URI= WORKERS= CLUSTER=auto STALL_TIMEOUT=15m]
plan: ## what a study will cost in time, disk and GPU memory: NAME= [DATASET= COLUMNS= TEST_FRACTION= DUPLICATES=keep CORRUPT=skip TRIALS= EPOCHS= BUDGET= PRUNE=0 DATA_DIR= DEVICE= SEED= VERSION= SET= STORAGE= TRACKING_URI= WORKERS=]
fields: ## the fields of a recipe, for spaces and settings, with their values, defaults and meaning: [NAME=optimizer]
compare: ## a study's trials, or several studies, as a table and one page: NAME= or NAME='a b' [OUTPUT= DATASET= DATA_DIR= TRACKING_URI=]
finals: ## train a study's best recipes and its control again, several seeds each: NAME= [TOP=3 SEEDS=5 FOLDS= EPOCHS= WORKERS= DATASET= DATA_DIR= DEVICE= TRACKING_URI=]
promote: ## evaluate a study's winner on the test split and make it the champion if it passes: NAME= or RUN= [MODEL= DATASET= DATA_DIR= RULES= FORCE=1 REASON= TRACKING_URI=]
rollback: ## make the previous champion the champion again: REASON= [VERSION= MODEL= TRACKING_URI=]
history: ## who was champion when, every test evaluation and every verdict: [MODEL= TRACKING_URI=]
reproduce: ## train a run again and compare, bit for bit where possible: RUN= [DATASET= DATA_DIR= DEVICE= TOLERANCE=points TRACKING_URI=]
robustness: ## accuracy on corrupted validation images, 15 kinds at 5 strengths; kept in the run: [RUN= or MODEL= DATASET= DATA_DIR= DEVICE= TRACKING_URI=]
sync: ## send MLflow what is pending on disk after an outage or a killed command: [DROP_DELETED=1 TRACKING_URI=]
audit: ## check that trials, runs, points, models and files are complete: [FIX=1 STORAGE= TRACKING_URI=]
relocate: ## update the paths in mlruns/'s database after the folder was moved
clean-cache: ## remove the decoded images of folders and manifests: [KEEP=20 keeps up to 20 GiB of the most recently used]
predict: ## classify an image, a folder or a pickle of images: IMAGE= [MODEL= METHOD=plain SHOW=1 OUTPUT=out.csv DEVICE= TRACKING_URI=]
ensemble: ## combine several runs into one model to promote, or average tables of predictions: NAME= or RUNS='ID ...' or TABLE='FILE ...' [METHOD=mean OUTPUT=mean.csv DATASET= DATA_DIR= DEVICE= TRACKING_URI=]
compress: ## remove the least important channels of a run, train on and compare, in 8 bits too: RUN= [SPARSITY=0.5 EPOCHS= DISTIL=1 DATASET= DATA_DIR= DEVICE= TRACKING_URI=]
export: ## a model as ONNX with weights, recipe and card: [RUN= or MODEL= OUTPUT=folder INT8=1 DATASET= DATA_DIR= TRACKING_URI=]
serve: ## the champion behind MLflow's scoring server on 127.0.0.1: [MODEL= PORT=5001 TRACKING_URI=]
ui: ## open the MLflow UI on 127.0.0.1 with links to the studies: [NAME= PORT=5000 TRACKING_URI=]
bench: ## how fast each network trains here, and where the time goes: [MODEL=all DATASET= DATA_DIR= DEVICE= JSON=1 AGAINST=peer.py]
bench-gpu: ## what a GPU is worth here, in under eight minutes: [PEER=peer.py AIRBENCH=airbench94_muon.py DATA_DIR= OUTPUT=mlruns/bench-gpu.json ONLY=fast,study]
$(COMMANDS): $(READY)
	@$(BIN)/python -m pipeline --make $@ $(call assignments,$(TYPED))

test: $(READY) ## run the tests (DATA_DIR= with CIFAR-10 in it runs those on real data too)
	@env $(call assignments,$(TYPED)) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

chaos: $(READY) ## inject faults for half an hour (kills, pauses, disks, databases, clocks) and print what was lost: [OUTPUT=mlruns/chaos DATA_DIR=]
	@env $(call assignments,$(TYPED)) $(BIN)/python -m pytest -m chaos -o faulthandler_timeout=3600

check: $(READY) ## ruff, formatting, types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY) ## format the code and fix what ruff can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: $(READY) ## write the versions in .venv to .constraints.txt, which setup installs
	@$(BIN)/python -m pip list --disable-pip-version-check --format=freeze --exclude-editable | grep -Ev '^(pip|setuptools|image-classifier-pipeline|triton|cuda-[a-z]+|nvidia-(cu|nccl|nv)[^=]*)==' | sed 's/+.*//' | LC_ALL=C sort -f > .constraints.new
	@mv .constraints.new .constraints.txt

# Every direct dependency at its floor; what needs a browser, a server or a study's length is left out.
FLOORS := grep -oE '"[A-Za-z0-9_-]+(\[[a-z,]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/"([^[>]+)(\[.*\])?>=/\1==/' | grep -v '^setuptools='
FAST := tests/data tests/evaluation tests/models tests/search tests/sections tests/studies tests/training tests/tracking/test_tracker.py tests/registry/test_export.py tests/inference/test_classifier.py tests/test_experiment.py tests/test_recipe.py

test-floors: ## the fast tests with the oldest versions that pyproject.toml allows, in .venv-floors
	@test -d .venv-floors || $(PYTHON) -m venv .venv-floors
	@$(FLOORS) > .venv-floors/floors.txt
	@.venv-floors/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-floors/floors.txt --editable '.[dev]'
	@.venv-floors/bin/python -m pytest $(FAST)

$(READY): pyproject.toml $(if $(filter 0,$(LOCKED)),,$(wildcard .constraints.txt))
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer found; install one, or give PYTHON=/path/to/python3.12' >&2; exit 2; }
	@echo 'Setting up .venv with $(PYTHON), once (with the GPU libraries of torch it takes some minutes and 7 GB of disk) ...'
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) can't make virtual environments; on Debian and Ubuntu install python3-venv" >&2; rm -rf .venv; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(filter 0,$(LOCKED)),,$(addprefix --constraint ,$(wildcard .constraints.txt))) --editable '.[dev]' || { echo "error: not everything could be installed (above: why); it takes 10 GB of disk, and 7 GB stay; free here: $$(df -Ph . | awk 'END {print $$4}'); after that the same command resumes" >&2; exit 2; }
	@touch $(READY)
