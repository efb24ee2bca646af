# VAE with a VampPrior: environment, data, training, evaluation, figures. `make help` lists it all.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV      ?= .venv
PYTHON    ?= $(VENV)/bin/python
# named once, with :=, or the folder would change while make runs
STAMP     := $(shell date +%Y%m%d-%H%M%S)
RUN       ?= results/$(STAMP)
MODELS    ?= vae vamp hvamp
DATASET   ?= mnist
DATA_DIR  ?= data
SEED      ?= 0
EPOCHS    ?=
SAMPLES   ?= 500
STRICT    ?=
LONG      ?=
TRAIN_FLAGS ?=
EVAL_FLAGS  ?=
TO        ?= runs
# models train side by side, the cores shared out: faster than one after the other on all cores
CORES     := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
JOBS      ?= $(shell m=$(words $(MODELS)); echo $$(( m < $(CORES) ? m : $(CORES) )))
export OMP_NUM_THREADS ?= $(shell t=$$(( $(CORES) / $(JOBS) )); echo $$(( t > 0 ? t : 1 )))
export RUN MODELS DATASET DATA_DIR SEED EPOCHS SAMPLES STRICT LONG TRAIN_FLAGS EVAL_FLAGS

# few digits make few batches and overfit soon: smaller batches, more weight decay
SMALL := --batch-size 100 --lr 3e-3 --ema 0.998 --weight-decay 0.5 --epochs 40 --warmup 10
# the long runs of make paper gain by less weight decay
LONG_RECIPE := --warmup 30 --epochs 420 --weight-decay 0.07

ENV := $(if $(filter $(VENV)/%,$(PYTHON)),$(VENV)/.stamp)
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

.PHONY: help all run quick paper bench record readme test test-all clean distclean $(KNOWN)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo 'vae, vamp, hvae, hvamp, mog, hmog   one model alone: train -> evaluate -> plot'
	@echo 'Variables: RUN=$(RUN) (an existing folder is continued) MODELS="$(MODELS)" DATASET=$(DATASET)'
	@echo '  DATA_DIR=$(DATA_DIR) STRICT=1 (no other data than asked for) SEED=$(SEED) EPOCHS SAMPLES=$(SAMPLES) JOBS'
	@echo '  LONG=1 (the longer training of make paper) PYTHON=python3 (no venv)'
	@echo '  TRAIN_FLAGS, EVAL_FLAGS (see train.py --help, evaluate.py --help)'

all: $(ENV)  ## environment, data, then MODELS trained, evaluated, drawn and compared
	$(if $(LONG),,@$(PYTHON) plot.py --expect $(JOBS) --models $(MODELS) --samples $(SAMPLES) $(if $(EPOCHS),--epochs $(EPOCHS)))
	@$(MAKE) --no-print-directory -j$(JOBS) run

$(KNOWN): $(ENV)
	@$(MAKE) --no-print-directory run MODELS=$@ JOBS=1 OMP_NUM_THREADS=$(CORES)

quick: $(ENV)  ## the same chain in about two minutes: two epochs, few pseudo-inputs and samples
	@$(MAKE) --no-print-directory -j$(JOBS) run RUN=$(RUN)-quick SAMPLES=20 \
	  EPOCHS=2 TRAIN_FLAGS="--batch-size 100 --lr 3e-3 --warmup 1 --pseudo-inputs 50" EVAL_FLAGS="--images 500"

paper: $(ENV)  ## the full protocol, hours: four models, S = 5000
	@$(MAKE) --no-print-directory -j$(JOBS) run RUN=$(RUN)-paper MODELS="vae vamp hvae hvamp" SAMPLES=5000 LONG=1

# what the targets above chain; real files, so that RUN=... makes only what is missing
run: $(RUN)/comparison.md
	@ln -sfn $(notdir $(RUN)) $(dir $(RUN))latest
	@echo "$(RUN): figures in each model's folder, the table in comparison.md"

$(VENV)/.stamp: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# one name for all models, so that none trains on other data than the rest
$(RUN)/dataset: | $(ENV)
	@mkdir -p $(@D)
	$(PYTHON) data.py --dataset "$(DATASET)" --data-dir "$(DATA_DIR)" $(if $(STRICT),--strict-data) --out $@

# code is no prerequisite: an edited comment must not retrain for an hour
$(MODELS:%=$(RUN)/%/model.pt): $(RUN)/%/model.pt: | $(RUN)/dataset
	data=$$(cat $(RUN)/dataset); if [ "$$data" = mnist5k ]; then flags="$(SMALL)"; else flags=; fi; \
	$(PYTHON) train.py $(FLAGS_$*) --dataset "$$data" --data-dir "$(DATA_DIR)" --seed $(SEED) \
	  $(if $(LONG),$(LONG_RECIPE)) $$flags \
	  $(if $(EPOCHS),--epochs $(EPOCHS)) $(TRAIN_FLAGS) --out $(@D) --resume

$(MODELS:%=$(RUN)/%/metrics.json): $(RUN)/%/metrics.json: $(RUN)/%/model.pt
	$(PYTHON) evaluate.py $(@D) --samples $(SAMPLES) --data-dir "$(DATA_DIR)" $(EVAL_FLAGS)

$(MODELS:%=$(RUN)/%/curves.png): $(RUN)/%/curves.png: $(RUN)/%/metrics.json
	$(PYTHON) plot.py $(@D)

# the two-layer models take longest: first, so that no core waits for them at the end
$(RUN)/comparison.md: $(patsubst %,$(RUN)/%/curves.png,$(filter h%,$(MODELS)) $(filter-out h% vae,$(MODELS)) $(filter vae,$(MODELS)))
	$(PYTHON) plot.py $(RUN) --models $(MODELS)

bench: $(ENV)  ## times each piece against its plain form, into assets/bench.json (about ten minutes)
	OMP_NUM_THREADS=$(CORES) $(PYTHON) bench.py --out assets/bench.json

record:  ## copies the records of RUN to assets/, with TO=runs the figures too, and renews the README's tables
	@test -f $(RUN)/comparison.md || { echo "error: RUN=$(RUN) holds no finished run" >&2; exit 2; }
	@for m in $(MODELS); do mkdir -p assets/$(TO)/$$m; cp $(RUN)/$$m/{log.csv,metrics.json} assets/$(TO)/$$m/; \
	  sed 's|"data_dir": .*|"data_dir": "data",|' $(RUN)/$$m/config.json > assets/$(TO)/$$m/config.json; done
	@if [ $(TO) = runs ]; then cp $(RUN)/*.png assets/; for m in $(filter vamp hvamp,$(MODELS)); do \
	  for f in samples pseudo_inputs; do cp $(RUN)/$$m/$$f.png assets/$$m-$$f.png; done; done; fi
	$(MAKE) --no-print-directory readme

readme: $(ENV)  ## renews the generated tables of README.md from assets/
	$(PYTHON) plot.py --readme README.md --assets assets

test: $(ENV)  ## the tests, in a few minutes
	OMP_NUM_THREADS=1 DATA_DIR="$(DATA_DIR)" $(PYTHON) -m pytest -q -n $(CORES) --dist loadfile -k "not slow"

test-all: $(ENV)  ## the long ones too: kills, fuzzing, load
	OMP_NUM_THREADS=1 DATA_DIR="$(DATA_DIR)" $(PYTHON) -m pytest -q -n $(CORES) --dist loadfile

clean:  ## caches and quick runs; results/ and data/ stay
	rm -rf __pycache__ .pytest_cache .hypothesis results/*-quick

distclean: clean  ## the environment too; results/ and data/ stay
	rm -rf $(VENV)
