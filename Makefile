# Every target sets up .venv by itself, once: Python 3.11 or newer and make are all that is needed.
# Variables are passed on as they were typed: quoted for the shell, and never expanded by make.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
BIN := .venv/bin
READY := .venv/ready

quoted = '$(subst ','\'',$(value $(1)))'
# What the command line says; of what is exported only DATA_DIR, as names like VERSION mean other things elsewhere.
typed = $(if $(value $(1)),$(if $(filter command line,$(origin $(1)))$(filter DATA_DIR,$(1)),$(call quoted,$(1))))
option = $(if $(call typed,$(1)),--$(2)=$(call typed,$(1)))
unexport NAME TRIALS EPOCHS TIMEOUT PATIENCE DATASET DATA_DIR DEVICE SEED VERSION STORAGE TRACKING_URI SET PORT IMAGE MODEL METHOD SHOW OUTPUT AGAINST JSON \
  INT8 TOP SEEDS RUN TOLERANCE RULES FORCE REASON PEER AIRBENCH ONLY WORKERS CLUSTER HANG FIX DROP

STUDY_OPTIONS := TRIALS:trials EPOCHS:epochs TIMEOUT:timeout PATIENCE:patience DATASET:dataset DATA_DIR:data-dir DEVICE:device SEED:seed \
  VERSION:version STORAGE:storage TRACKING_URI:tracking-uri SET:set WORKERS:workers CLUSTER:cluster HANG:hang

PREDICT_OPTIONS := MODEL:model METHOD:method OUTPUT:output DEVICE:device TRACKING_URI:tracking-uri
chosen = $(if $(or $(call typed,RUN),$(call typed,MODEL)),-- $(or $(call typed,RUN),$(call typed,MODEL)))
EXPORT_OPTIONS := OUTPUT:output DATASET:dataset DATA_DIR:data-dir TRACKING_URI:tracking-uri
SERVE_OPTIONS := PORT:port TRACKING_URI:tracking-uri
COMPARE_OPTIONS := OUTPUT:output DATASET:dataset DATA_DIR:data-dir TRACKING_URI:tracking-uri
PLAN_OPTIONS := $(filter-out TIMEOUT:% PATIENCE:% STORAGE:% TRACKING_URI:% CLUSTER:% HANG:%,$(STUDY_OPTIONS))
BENCH_OPTIONS := MODEL:model DATASET:dataset DATA_DIR:data-dir DEVICE:device AGAINST:against
BENCH_GPU_OPTIONS := PEER:peer AIRBENCH:airbench DATA_DIR:data-dir OUTPUT:output ONLY:only
FINALS_OPTIONS := TOP:top SEEDS:seeds EPOCHS:epochs DATASET:dataset DATA_DIR:data-dir DEVICE:device TRACKING_URI:tracking-uri
PROMOTE_OPTIONS := RUN:run MODEL:model DATASET:dataset DATA_DIR:data-dir RULES:rule REASON:reason TRACKING_URI:tracking-uri
ROLLBACK_OPTIONS := REASON:reason VERSION:version MODEL:model TRACKING_URI:tracking-uri
REPRODUCE_OPTIONS := DATASET:dataset DATA_DIR:data-dir DEVICE:device TOLERANCE:tolerance TRACKING_URI:tracking-uri
ALL_OPTIONS := $(STUDY_OPTIONS) $(PREDICT_OPTIONS) $(BENCH_OPTIONS) $(BENCH_GPU_OPTIONS) $(FINALS_OPTIONS) $(PROMOTE_OPTIONS) $(REPRODUCE_OPTIONS)

# A mistyped variable would silently run something else.
KNOWN := NAME PORT IMAGE SHOW JSON FORCE INT8 FIX DROP PYTHON LOCKED $(sort $(foreach o,$(ALL_OPTIONS),$(firstword $(subst :, ,$(o)))) RUN)
UNKNOWN := $(strip $(foreach v,$(.VARIABLES),$(if $(filter command line,$(origin $(v))),$(filter-out $(KNOWN),$(v)))))
ifneq ($(filter-out -%,$(UNKNOWN)),)
$(error no such variable: $(UNKNOWN) (there are $(KNOWN)))
endif

.DEFAULT_GOAL := help
.PHONY: help setup study plan compare finals promote rollback history reproduce sync audit relocate predict export serve ui bench bench-gpu test chaos test-floors check format lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

setup: $(READY) ## create .venv and install everything, in the versions of .constraints.txt: [LOCKED=0 for the newest] (the other targets do it too)

options = $(foreach o,$(1),$(call option,$(firstword $(subst :, ,$(o))),$(lastword $(subst :, ,$(o)))))

study: $(READY) ## run or go on with a study: NAME= [DATASET= TRIALS= EPOCHS= TIMEOUT= PATIENCE= DATA_DIR= DEVICE= SEED= VERSION= SET= STORAGE= TRACKING_URI= WORKERS= CLUSTER=auto HANG=15m]
	@test -n $(or $(call typed,NAME),'') || { echo 'error: which study? make study NAME=attention (in studies/: '$$(cd studies && ls *.py | sed 's/\.py$$//' | paste -sd' ' -)')' >&2; exit 2; }
	@$(BIN)/python -m pipeline study $(call options,$(STUDY_OPTIONS)) -- $(call typed,NAME)

plan: $(READY) ## what a study will cost in time, disk and GPU memory: NAME= [DATASET= TRIALS= EPOCHS= DATA_DIR= DEVICE= SEED= VERSION= SET= WORKERS=]
	@test -n $(or $(call typed,NAME),'') || { echo 'error: which study? make plan NAME=attention' >&2; exit 2; }
	@$(BIN)/python -m pipeline plan $(call options,$(PLAN_OPTIONS)) -- $(call typed,NAME)

finals: $(READY) ## train a study's best recipes and its control again, several seeds each: NAME= [TOP=3 SEEDS=5 EPOCHS= DATASET= DATA_DIR= DEVICE= TRACKING_URI=]
	@test -n $(or $(call typed,NAME),'') || { echo 'error: which study? make finals NAME=attention' >&2; exit 2; }
	@$(BIN)/python -m pipeline finals $(call options,$(FINALS_OPTIONS)) -- $(call typed,NAME)

promote: $(READY) ## judge a study's winner on the test split and make it champion if it passes: NAME= or RUN= [MODEL= DATASET= DATA_DIR= RULES= FORCE=1 REASON= TRACKING_URI=]
	@test -n $(or $(call typed,NAME),$(call typed,RUN),'') || { echo 'error: which model? make promote NAME=attention takes a study'"'"'s, make promote RUN=<id> a run'"'"'s' >&2; exit 2; }
	@$(BIN)/python -m pipeline promote $(call options,$(PROMOTE_OPTIONS)) $(if $(call typed,FORCE),$(if $(filter-out 0,$(value FORCE)),--force)) $(if $(call typed,NAME),-- $(call typed,NAME))

rollback: $(READY) ## make the champion before champion again: REASON= [VERSION= MODEL= TRACKING_URI=]
	@test -n $(or $(call typed,REASON),'') || { echo 'error: say why: make rollback REASON="slower in production than here"' >&2; exit 2; }
	@$(BIN)/python -m pipeline rollback $(call options,$(ROLLBACK_OPTIONS))

history: $(READY) ## who was champion when, every look at the test split and every verdict: [MODEL= TRACKING_URI=]
	@$(BIN)/python -m pipeline history $(call option,MODEL,model) $(call option,TRACKING_URI,tracking-uri)

reproduce: $(READY) ## make a run again and compare, bit for bit where that can be: RUN= [DATASET= DATA_DIR= DEVICE= TOLERANCE=points TRACKING_URI=]
	@test -n $(or $(call typed,RUN),'') || { echo 'error: which run? make reproduce RUN=<its id>; make ui shows them' >&2; exit 2; }
	@$(BIN)/python -m pipeline reproduce $(call options,$(REPRODUCE_OPTIONS)) -- $(call typed,RUN)

sync: $(READY) ## send MLflow what waits on disk since it was away or a command was killed: [DROP=1 TRACKING_URI=]
	@$(BIN)/python -m pipeline sync $(if $(call typed,DROP),$(if $(filter-out 0,$(value DROP)),--drop-deleted)) $(call option,TRACKING_URI,tracking-uri)

audit: $(READY) ## whether all is there, once, and whole: trials, runs, points, models, files: [FIX=1 STORAGE= TRACKING_URI=]
	@$(BIN)/python -m pipeline audit $(if $(call typed,FIX),$(if $(filter-out 0,$(value FIX)),--fix)) $(call option,STORAGE,storage) $(call option,TRACKING_URI,tracking-uri)

relocate: $(READY) ## after mlruns/ was moved: write its new place into its database
	@$(BIN)/python -m pipeline relocate

compare: $(READY) ## a study's trials, or several studies, as a table and one page: NAME= or NAME='a b' [OUTPUT= DATASET= DATA_DIR= TRACKING_URI=]
	@test -n $(or $(call typed,NAME),'') || { echo 'error: which study? make compare NAME=attention' >&2; exit 2; }
	@$(BIN)/python -m pipeline compare $(call options,$(COMPARE_OPTIONS)) -- $(call typed,NAME)

predict: $(READY) ## classify an image, a folder or a pickle of images: IMAGE= [MODEL= METHOD=plain SHOW=1 OUTPUT=out.csv DEVICE= TRACKING_URI=]
	@test -n $(or $(call typed,IMAGE),'') || { echo 'error: which image? make predict IMAGE=cat.jpg' >&2; exit 2; }
	@$(BIN)/python -m pipeline predict $(call options,$(PREDICT_OPTIONS)) $(if $(call typed,SHOW),$(if $(filter-out 0,$(value SHOW)),--show)) -- $(call typed,IMAGE)

export: $(READY) ## a model as ONNX with weights, recipe and card: [RUN= OUTPUT=folder INT8=1 DATASET= DATA_DIR= TRACKING_URI=]
	@$(BIN)/python -m pipeline export $(call options,$(EXPORT_OPTIONS)) $(if $(call typed,INT8),$(if $(filter-out 0,$(value INT8)),--int8)) $(chosen)

serve: $(READY) ## the champion behind MLflow's scoring server on 127.0.0.1: [MODEL= PORT=5001 TRACKING_URI=]
	@$(BIN)/python -m pipeline serve $(call options,$(SERVE_OPTIONS)) $(chosen)

ui: $(READY) ## open the MLflow UI on 127.0.0.1 with links to the studies: [NAME= PORT=5000 TRACKING_URI=]
	@$(BIN)/python -m pipeline ui $(call option,PORT,port) $(call option,TRACKING_URI,tracking-uri) $(if $(call typed,NAME),-- $(call typed,NAME))

bench: $(READY) ## how fast each network trains here, and where the time goes: [MODEL=all DATASET= DATA_DIR= DEVICE= JSON=1 AGAINST=peer.py]
	@$(BIN)/python -m pipeline bench $(call options,$(BENCH_OPTIONS)) $(if $(call typed,JSON),$(if $(filter-out 0,$(value JSON)),--json))

bench-gpu: $(READY) ## what a GPU is worth here, in under eight minutes: [PEER=peer.py AIRBENCH=airbench94_muon.py DATA_DIR= OUTPUT=mlruns/bench-gpu.json ONLY=fast,study]
	@$(BIN)/python -m pipeline bench-gpu $(call options,$(BENCH_GPU_OPTIONS))

test: $(READY) ## run the tests (DATA_DIR= with CIFAR-10 in it runs those on real data too)
	@$(if $(value DATA_DIR),DATA_DIR=$(call quoted,DATA_DIR)) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

chaos: $(READY) ## faults for half an hour: processes killed, paused and stopped, disks, databases, clocks; a table of what was lost: [OUTPUT=mlruns/chaos DATA_DIR=]
	@$(if $(call typed,OUTPUT),OUTPUT=$(call typed,OUTPUT)) $(if $(value DATA_DIR),DATA_DIR=$(call quoted,DATA_DIR)) $(BIN)/python -m pytest -m chaos -o faulthandler_timeout=3600

check: $(READY) ## ruff, formatting, types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY) ## put the code into shape
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

lock: $(READY) ## write the versions that .venv has to .constraints.txt, which setup installs
	@$(BIN)/python -m pip list --disable-pip-version-check --format=freeze --exclude-editable | grep -Ev '^(pip|setuptools|image-classifier-pipeline|triton|cuda-[a-z]+|nvidia-(cu|nccl|nv)[^=]*)==' | sed 's/+.*//' | LC_ALL=C sort -f > .constraints.new
	@mv .constraints.new .constraints.txt

# Every direct dependency at its floor; what needs a browser, a server or a study's length is left out.
FLOORS := grep -oE '"[A-Za-z0-9_-]+(\[[a-z,]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/"([^[>]+)(\[.*\])?>=/\1==/' | grep -v '^setuptools='
FAST := tests/data tests/evaluation tests/models tests/search tests/studies tests/training tests/tracking/test_tracker.py tests/registry/test_export.py tests/inference/test_classifier.py tests/test_experiment.py tests/test_recipe.py

test-floors: ## the fast tests with the oldest versions that pyproject.toml allows, in .venv-floors
	@test -d .venv-floors || $(PYTHON) -m venv .venv-floors
	@$(FLOORS) > .venv-floors/floors.txt
	@.venv-floors/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-floors/floors.txt --editable '.[dev]'
	@.venv-floors/bin/python -m pytest $(FAST)

$(READY): pyproject.toml $(if $(filter 0,$(LOCKED)),,$(wildcard .constraints.txt))
	@test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or newer found; install one, or say PYTHON=/path/to/python3.12' >&2; exit 2; }
	@echo 'Setting up .venv with $(PYTHON), once (with the GPU libraries of torch it takes some minutes and 7 GB of disk) ...'
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) can't make virtual environments; on Debian and Ubuntu install python3-venv" >&2; rm -rf .venv; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(filter 0,$(LOCKED)),,$(addprefix --constraint ,$(wildcard .constraints.txt))) --editable '.[dev]' || { echo "error: not everything could be installed (above: why); it takes 10 GB of disk, and 7 GB stay; free here: $$(df -Ph . | awk 'END {print $$4}'); once that is mended the same command goes on" >&2; exit 2; }
	@touch $(READY)
