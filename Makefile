# VAE with a VampPrior: environment, data, training, evaluation, figures. `make help` lists it all.
# Works with GNU make 3.81 (macOS) and later.
SHELL := /bin/bash
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV      ?= .venv
PYTHON3   ?= python3
PYTHON    ?= $(VENV)/bin/python
# named once, with :=, or the folder would change while make runs
NEW_RUN   := $(if $(filter undefined,$(origin RUN)),results/$(shell date +%Y%m%d-%H%M%S))
RUN       ?= $(NEW_RUN)
MODELS    ?= vae vamp hvamp
DATASET   ?= mnist
DATA_DIR  ?= data
RECIPE    ?= default
SEEDS     := $(if $(filter undefined,$(origin SEED)),0 1 2,$(SEED))
SEED      ?= 0
EPOCHS    ?=
SAMPLES   ?= 500
STRICT    ?=
PROCS     ?= 1
TRAIN_FLAGS ?=
EVAL_FLAGS  ?=
TO        ?= runs
# a variable as it was given, or else a target's own value
# the newest run, unless it was called by this name
link       = $(if $(filter-out latest,$(notdir $1)),ln -sfn $(notdir $1) $(dir $1)latest,:)
given      = $(if $(filter file,$(origin $1)),$2,$($1))
ifneq ($(shell [ "$(PROCS)" -gt 0 ] 2>&1 && echo good),good)
$(error PROCS="$(PROCS)" must be a whole number from 1 on)
endif
# models train side by side, the cores shared out: faster than one after the other on all cores
# nproc would heed OMP_NUM_THREADS, which a make above this one has set
CORES     := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
SHARE     := $(shell c=$$(( $(CORES) / $(PROCS) )); echo $$(( c > 0 ? c : 1 )))
JOBS      ?= $(shell m=$(words $(MODELS)); echo $$(( m < $(SHARE) ? m : $(SHARE) )))
# for paper, whose models are four: it shares out the cores itself
ALONE     := $(if $(filter undefined,$(origin OMP_NUM_THREADS)),env -u OMP_NUM_THREADS)
OMP_NUM_THREADS ?= $(shell t=$$(( $(SHARE) / $(JOBS) )); echo $$(( t > 0 ? t : 1 )))
# of PROCS processes, each model's training and evaluation
TOGETHER  := $(PYTHON)$(if $(filter-out 1,$(PROCS)), -m torch.distributed.run --standalone --local-addr localhost --nproc-per-node $(PROCS))

ifneq ($(words $(RUN)),1)
$(error RUN="$(RUN)" must be one folder without spaces)
endif
override RUN := $(patsubst %/,%,$(RUN))

FLAGS_vae   := --model vae  --prior standard
FLAGS_mog   := --model vae  --prior mog
FLAGS_vamp  := --model vae  --prior vamp
FLAGS_hvae  := --model hvae --prior standard
FLAGS_hmog  := --model hvae --prior mog
FLAGS_hvamp := --model hvae --prior vamp
KNOWN := vae mog vamp hvae hmog hvamp
ifneq ($(filter-out $(KNOWN),$(MODELS)),)
$(error MODELS has $(filter-out $(KNOWN),$(MODELS)); choose from $(KNOWN))
endif

# what defines a run's weights, and its numbers: a folder made with others is not taken for these
TRAINED_BY := DATASET=$(DATASET) RECIPE=$(RECIPE) SEED=$(SEED) EPOCHS=$(EPOCHS) TRAIN_FLAGS=$(TRAIN_FLAGS)
EVALUATED_BY := SAMPLES=$(SAMPLES) EVAL_FLAGS=$(EVAL_FLAGS)
export OMP_NUM_THREADS RUN MODELS DATASET DATA_DIR RECIPE SEED EPOCHS SAMPLES STRICT PROCS TRAIN_FLAGS \
  EVAL_FLAGS TRAINED_BY EVALUATED_BY

.PHONY: help all run quick plane paper notebook lab bench record docs test test-all clean distclean FORCE $(KNOWN)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'vae, vamp, hvae, hvamp, mog, hmog   one model alone: train -> evaluate -> plot'
	@echo 'Variables: RUN=$(RUN) (an existing folder is continued) MODELS="$(MODELS)" DATASET=$(DATASET)'
	@echo '  DATA_DIR=$(DATA_DIR) STRICT=1 (no other data than asked for) RECIPE=$(RECIPE) (or long, quick)'
	@echo '  SEED=$(SEED) (paper: "$(SEEDS)") EPOCHS SAMPLES=$(SAMPLES) JOBS PYTHON3=python3.12 (makes the venv) PYTHON=python3 (no venv)'
	@echo '  PROCS=$(PROCS) (processes that share out each model, by torchrun)'
	@echo '  TRAIN_FLAGS, EVAL_FLAGS (see train.py --help, evaluate.py --help)'

ENV := $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/.stamp)
$(VENV)/.stamp: requirements.txt
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or" \
	  "newer is needed, this is $$($(PYTHON3) --version 2>&1); give one by PYTHON3=python3.12" >&2; exit 2; }
	@echo "installing the packages of requirements.txt into $(VENV)"
	@$(PYTHON3) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# ROWS: on a terminal each model has a line, which its processes write over
all: $(ENV)  ## environment, data, then MODELS trained, evaluated, drawn and compared: report.html
	@$(MAKE) -s $(RUN)/trained-by $(RUN)/dataset
	@if [ "$(RECIPE) $$(cat $(RUN)/dataset)" = "default mnist" ]; then $(PYTHON) report.py --expect $(JOBS) \
	  --models $(MODELS) --samples $(SAMPLES) $(if $(EPOCHS),--epochs $(EPOCHS)); fi
	@if [ -t 2 ]; then printf '%s: waiting\n' $(MODELS) >&2; fi
	@ROWS="$(MODELS)" $(MAKE) -j$(JOBS) run
	@$(PYTHON) plot.py $(RUN)
	@$(call link,$(RUN))
	@$(PYTHON) report.py $(RUN)

$(KNOWN): $(ENV)
	@$(MAKE) all MODELS=$@ JOBS=1 OMP_NUM_THREADS=$(SHARE)

quick: $(ENV)  ## the same chain in about two minutes: two epochs, few pseudo-inputs and samples
	@$(MAKE) all RUN=$(RUN)$(if $(NEW_RUN),-quick) RECIPE=quick SAMPLES=20 EVAL_FLAGS="--images 500 $(EVAL_FLAGS)"

plane: $(ENV)  ## the picture at the head of the README: three priors of two latents, in about 20 minutes
	@$(MAKE) all RUN=$(RUN)$(if $(NEW_RUN),-plane) MODELS="$(call given,MODELS,vae mog vamp)" EPOCHS=$(or $(EPOCHS),120) \
	  TRAIN_FLAGS="--z-dim 2 $(TRAIN_FLAGS)"

# a folder seed0, seed1, ... for each training seed, with a report of its own
PAPER := $(RUN)$(if $(NEW_RUN),-paper)
paper: $(ENV)  ## the full protocol, hours: four models, three seeds, longer training, S = 5000
	@if [ -f $(PAPER)/trained-by ]; then echo "error: $(PAPER) holds models of one seed; move what is in it to" \
	  "$(PAPER)/seed0, or give another RUN" >&2; exit 2; fi
	@set -e; for s in $(SEEDS); do $(ALONE) $(MAKE) all RUN=$(PAPER)/seed$$s SEED=$$s RECIPE=long \
	  SAMPLES=$(call given,SAMPLES,5000) MODELS="$(call given,MODELS,vae vamp hvae hvamp)"; done
	@rm -f $(PAPER)/latest; $(call link,$(PAPER))
	@$(PYTHON) report.py $(PAPER)

# What the targets above chain. Real files, so that RUN=... makes only what is missing; code is no
# prerequisite: an edited comment must not retrain for an hour. The two-layer models take longest:
# first, so that no core waits for them at the end.
run: $(patsubst %,$(RUN)/%/curves.png,$(filter h%,$(MODELS)) $(filter-out h% vae,$(MODELS)) $(filter vae,$(MODELS)))

# A folder made with other settings is not taken for a run with these: other weights are refused,
# other numbers are computed anew.
$(RUN)/trained-by: FORCE
	@mkdir -p $(@D)
	@if [ "$$(cat $@ 2>/dev/null)" = "$$TRAINED_BY" ]; then :; elif ls $(@D)/*/config.json >/dev/null 2>&1 && [ -f $@ ]; \
	  then echo "error: $(RUN) was made with $$(cat $@), not with $$TRAINED_BY; call it as then, or give" \
	  "another RUN" >&2; exit 2; else rm -f $(@D)/dataset; echo "$$TRAINED_BY" > $@; fi

$(RUN)/evaluated-by: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != "$$EVALUATED_BY" ]; then echo "$$EVALUATED_BY" > $@; fi

FORCE:

# one name for all models, so that none trains on other data than the rest
$(RUN)/dataset: | $(ENV) $(RUN)/trained-by
	@$(PYTHON) data.py --dataset "$(DATASET)" --data-dir "$(DATA_DIR)" $(if $(STRICT),--strict-data) --out $@

$(MODELS:%=$(RUN)/%/model.pt): $(RUN)/%/model.pt: | $(RUN)/dataset
	@$(TOGETHER) train.py $(FLAGS_$*) --recipe $(RECIPE) --dataset "$$(cat $(RUN)/dataset)" --data-dir "$(DATA_DIR)" \
	  --seed $(SEED) $(if $(EPOCHS),--epochs $(EPOCHS)) $(TRAIN_FLAGS) --out $(@D) --resume

$(MODELS:%=$(RUN)/%/metrics.json): $(RUN)/%/metrics.json: $(RUN)/%/model.pt $(RUN)/evaluated-by
	@$(TOGETHER) evaluate.py $(@D) --samples $(SAMPLES) --data-dir "$(DATA_DIR)" $(EVAL_FLAGS)

$(MODELS:%=$(RUN)/%/curves.png): $(RUN)/%/curves.png: $(RUN)/%/metrics.json
	@$(PYTHON) plot.py $(@D)

# Jupyter is installed by these two alone, where it is missing. The notebook is replaced whole, when
# its last cell has run.
define RUN_NOTEBOOK
import files, nbclient, nbformat
notebook = nbformat.read("main.ipynb", 4)
nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False,
                        extra_arguments=["--log-level=ERROR"]).execute()
notebook.metadata["language_info"] = {"name": "python"}
files.write_atomic("main.ipynb", nbformat.writes(notebook) + "\n")
endef
export RUN_NOTEBOOK
INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check

notebook: $(ENV)  ## runs main.ipynb from top to bottom and renews its outputs, in a few minutes
	@$(PYTHON) -c 'import nbclient, ipykernel' 2>/dev/null || $(INSTALL) nbclient ipykernel
	@OMP_NUM_THREADS=$(CORES) $(PYTHON) -c "$$RUN_NOTEBOOK"

lab: $(ENV)  ## opens main.ipynb in JupyterLab
	@$(PYTHON) -c 'import jupyterlab' 2>/dev/null || $(INSTALL) jupyterlab
	@OMP_NUM_THREADS=$(CORES) $(PYTHON) -m jupyterlab main.ipynb

bench: $(ENV)  ## times each piece against its plain form, into assets/bench.json (about ten minutes)
	OMP_NUM_THREADS=$(CORES) $(PYTHON) bench.py --out assets/bench.json

record:  ## copies the records of RUN to assets/, with TO=paper the last seed's figures too, and renews the tables
	@test -f $(RUN)/comparison.md || { echo "error: RUN=$(RUN) holds no finished run" >&2; exit 2; }
	@cd assets/$(TO) 2>/dev/null || exit 0; here=$(abspath $(RUN)); \
	  if [ -d seed0 -a -f $$here/report.html -o ! -d seed0 -a ! -f $$here/report.html ]; then \
	  echo "error: of $(RUN) and assets/$(TO) one holds seeds, the other not: give another TO" >&2; exit 2; fi; \
	  for f in */metrics.json; do test ! -f $$f -o -f $$here/$$f || { \
	  echo "error: $(RUN) has no $${f%/*}, assets/$(TO) has: the two would mix" >&2; exit 2; }; done
	@set -e; for s in $(if $(filter paper,$(TO)),$(lastword $(sort $(wildcard $(RUN)/seed*)))); do cd $$s; \
	  for f in $$(ls *.png {vamp,hvamp}/pseudo_inputs.png 2>/dev/null); do cp $$f $(CURDIR)/assets/$${f/\//-}; done; done
	@if [ $(TO) = plane ]; then cp $(RUN)/latents.png assets/plane.png; fi
	@for f in $(if $(filter grey fashion,$(TO)),samples comparison vamp/pseudo_inputs); do \
	  cp $(RUN)/$$f.png assets/$(TO)-$$(basename $$f).png; done
	@set -e; for f in $$(cd $(RUN); ls -d {,seed*/}*/metrics.json 2>/dev/null | grep -Ex '(seed[0-9]+/)?[^/]+/[^/]+'); do \
	  m=$$(dirname $$f); \
	  mkdir -p assets/$(TO)/$$m; cp $(RUN)/$$m/{log.csv,metrics.json} assets/$(TO)/$$m/; \
	  sed -e 's|"data_dir": .*|"data_dir": "data",|' -e "s|\"out\": .*|\"out\": \"results/$(TO)/$$m\",|" \
	  $(RUN)/$$m/config.json > assets/$(TO)/$$m/config.json; done
	@$(MAKE) docs

docs: $(ENV)  ## renews the generated tables of README.md and RESULTS.md from assets/
	@$(PYTHON) report.py --docs README.md RESULTS.md --assets assets

# Fonts are looked up first, once: slow, and several processes at a time would complain of it on stderr.
# Each test file has one process at most.
PYTEST = export PYTHONUTF8=1 OMP_NUM_THREADS=1 DATA_DIR="$(DATA_DIR)" MPLCONFIGDIR="$${MPLCONFIGDIR:-$(CURDIR)/.pytest_cache}"; \
  $(PYTHON) -c 'import matplotlib.font_manager'; $(PYTHON) -m pytest -q -n $(CORES) --maxprocesses $(words $(wildcard test_*.py)) --dist loadfile

test: $(ENV)  ## the tests, in a few minutes
	@$(PYTEST) -k "not slow"

test-all: $(ENV)  ## the long ones too: kills, load
	@$(PYTEST)

clean:  ## caches and quick runs; results/ and data/ stay
	rm -rf __pycache__ .pytest_cache results/*-quick
	@[ -e results/latest ] || rm -f results/latest

distclean: clean  ## the environment too; results/ and data/ stay
	rm -rf $(VENV)
