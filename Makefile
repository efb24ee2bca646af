# VAE with a VampPrior: data -> train -> evaluate -> plot -> report. `make help` lists the targets.
MAKEFLAGS += --no-builtin-rules --no-print-directory
DATASET    ?= mnist
DATA_DIR   ?= data
PROCS      ?= 1
PYTHON     ?= .venv/bin/python
NAMES      := $(or $(MODELS),vae vamp $(if $(MODEL),,hvamp))
DATA        = --dataset "$(DATASET)" --data-dir "$(DATA_DIR)"
EVALUATION := --samples $(or $(SAMPLES),500) $(EVAL_FLAGS)

# A RUN that exists is continued. A new one is named after the time, which := asks for only once.
GIVEN := $(RUN)
ifneq ($(strip $(foreach c,: ' " $$ \ ; & %,$(findstring $c,$(value RUN)))$(word 2,$(RUN))),)
$(error RUN must be a folder whose name has letters, digits and . _ - / only)
endif
override RUN := $(patsubst %/,%,$(or $(RUN),results/$(shell date +%Y%m%d-%H%M%S)))
export RUN DATA_DIR EVALUATION

OWN         := $(if $(MODEL),--model $(MODEL))
FLAGS_vae   := $(or $(OWN),--model vae)  --prior standard
FLAGS_vamp  := $(or $(OWN),--model vae)  --prior vamp
FLAGS_mog   := $(or $(OWN),--model vae)  --prior mog
FLAGS_hvae  := --model hvae --prior standard
FLAGS_hvamp := --model hvae --prior vamp
FLAGS_hmog  := --model hvae --prior mog
KNOWN       := vae vamp mog hvae hvamp hmog fit
ifneq ($(filter-out $(KNOWN),$(NAMES)),)
$(error MODELS has $(filter-out $(KNOWN),$(NAMES)); choose from $(KNOWN))
endif

# Models train side by side and share the cores: faster than one after the other with all cores.
CORES   := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
JOBS    ?= $(shell m=$(words $(NAMES)); echo $$(( m < $(CORES) ? m : $(CORES) )))
THREADS ?= $(shell n=$$(( $(CORES) / $(JOBS) / $(PROCS) )); echo $$(( n > 0 ? n : 1 )))
TORCHRUN = $(PYTHON) -m torch.distributed.run --standalone --local-addr localhost
LAUNCH   = $(if $(filter 1,$(PROCS)),$(PYTHON),$(TORCHRUN) --nproc-per-node $(PROCS))

help:  ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "%-10s  %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: RUN=folder (continued if it exists) MODELS="$(NAMES)" DATASET=$(DATASET)'
	@echo '  DATA_DIR=$(DATA_DIR) RECIPE=default (or long) SEED=0 SEEDS="0 1 2" EPOCHS SAMPLES'
	@echo '  JOBS=$(JOBS) (models at a time) PROCS=$(PROCS) (processes of each) THREADS=$(THREADS) (of these)'
	@echo '  MODEL=FILE.py:CLASS (of your own, for vae, vamp, mog and fit; see conv.py)'
	@echo '  TRAIN_FLAGS EVAL_FLAGS (train.py, evaluate.py --help) PYTHON3=python3.12 PYTHON=python3 (no .venv)'

# No environment is made where PYTHON is an interpreter of your own.
ENV := $(if $(filter .venv/%,$(PYTHON)),.venv/.stamp)
.venv/.stamp: requirements.txt
	@echo "installing the packages of requirements.txt into .venv"
	@$(or $(PYTHON3),python3) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

LINK = [ $(notdir $1) = latest ] || ln -sfn $(notdir $1) $(dir $1)latest
all: $(ENV)  ## trains, evaluates and draws MODELS, then writes report.html
	@$(PYTHON) data.py $(DATA) > /dev/null
	@OMP_NUM_THREADS=$(THREADS) $(MAKE) -j$(JOBS) models
	@$(PYTHON) plot.py $(RUN)
	@$(call LINK,$(RUN))
	@$(PYTHON) report.py $(RUN)
vae vamp mog hvae hvamp hmog fit:  ## one model alone; fit: vae, and a prior that is fitted to it
	@$(MAKE) all MODELS="$(if $(filter fit,$@),vae) $@"
quick:  ## the same chain in a few minutes: two epochs, few pseudo-inputs and samples
	@$(MAKE) all RUN=$(or $(GIVEN),$(RUN)-quick) EPOCHS=$(or $(EPOCHS),2) SAMPLES=$(or $(SAMPLES),20) \
	  TRAIN_FLAGS="--batch-size 100 --lr 3e-3 --pseudo-inputs 50 $(TRAIN_FLAGS)" \
	  EVAL_FLAGS="--images 500 $(EVAL_FLAGS)"
plane:  ## a picture as the README's first: three priors of two latents, 20 minutes
	@$(MAKE) all RUN=$(or $(GIVEN),$(RUN)-plane) MODELS="$(or $(MODELS),vae mog vamp)" \
	  EPOCHS=$(or $(EPOCHS),120) TRAIN_FLAGS="--z-dim 2 $(TRAIN_FLAGS)"

PAPER = $(or $(GIVEN),$(RUN)-paper)
paper:  ## the full protocol, hours: five models, three seeds, S = 5000
	@set -e; for seed in $(or $(SEEDS),$(SEED),0 1 2); do \
	  $(MAKE) all RUN=$(PAPER)/seed$$seed SEED=$$seed RECIPE=long SAMPLES=$(or $(SAMPLES),5000) \
	  MODELS="$(or $(MODELS),vae fit vamp $(if $(MODEL),,hvae hvamp))"; done
	@$(call LINK,$(PAPER))
	@$(PYTHON) report.py $(PAPER)

# One file per step, so that RUN=... makes only what is missing. The scripts are no prerequisites:
# an edited comment must not retrain for an hour. Two-layer models come first: they take longest.
models: $(patsubst %,$(RUN)/%/curves.png,$(filter h%,$(NAMES)) $(filter-out h%,$(NAMES)))

# Always called: train.py continues, finds the model trained already, or refuses other settings.
# TQDM_POSITION gives the bars of models side by side a line each.
POSITION = TQDM_POSITION=$$(echo $(NAMES) vae | tr ' ' '\n' | grep -nxm1 $* | cut -d: -f1)
WEIGHTS = $(RUN)/%/model.safetensors
$(patsubst %,$(WEIGHTS),vae $(filter-out vae fit,$(NAMES))): $(WEIGHTS): FORCE
	@$(POSITION) $(LAUNCH) train.py $(FLAGS_$*) $(DATA) $(RECIPE:%=--recipe %) \
	  $(SEED:%=--seed %) $(EPOCHS:%=--epochs %) $(TRAIN_FLAGS) --out $(@D) --resume

$(RUN)/fit/model.safetensors: $(RUN)/vae/model.safetensors
	@rm -f $@
	@$(PYTHON) evaluate.py $(<D) --fit-prior $(@D) $(OWN) $(DATA)

# Rewritten when the evaluation's flags change, and then the models are evaluated anew.
$(RUN)/settings: FORCE
	@mkdir -p $(@D)
	@echo "$$EVALUATION" | cmp -s - $@ || echo "$$EVALUATION" > $@

$(NAMES:%=$(RUN)/%/metrics.json): $(RUN)/%/metrics.json: $(RUN)/%/model.safetensors $(RUN)/settings
	@$(POSITION) $(LAUNCH) evaluate.py $(@D) $(OWN) $(DATA) $(EVALUATION)

$(NAMES:%=$(RUN)/%/curves.png): $(RUN)/%/curves.png: $(RUN)/%/metrics.json
	@$(PYTHON) plot.py $(@D)

notebook: $(ENV)  ## runs main.ipynb from top to bottom
	$(PYTHON) -m pip install --quiet nbconvert ipykernel
	$(PYTHON) -m jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False main.ipynb
lab: $(ENV)  ## opens main.ipynb
	$(PYTHON) -m pip install --quiet jupyterlab
	$(PYTHON) -m jupyterlab main.ipynb
bench: $(ENV)  ## times each piece beside its plain form, into assets/bench.json
	$(PYTHON) bench.py --out assets/bench.json
docs: $(ENV)  ## renews the table of README.md and the reports in assets/
	@$(PYTHON) report.py --readme README.md
test test-all: $(ENV)  ## the fast tests; test-all: the slow ones, too
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(CORES) --dist loadfile \
	  $(if $(filter test,$@),-k "not slow")
clean:  ## caches and quick runs
	rm -rf __pycache__ .pytest_cache results/*-quick
	[ -e results/latest ] || rm -f results/latest

.PHONY: help all models quick paper plane notebook lab bench docs test test-all clean FORCE $(KNOWN)
