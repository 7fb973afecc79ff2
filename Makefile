# Two commands do everything on a fresh machine: `make pretrain` and `make test`.
# `make help` lists the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
# Extra arguments for the installation of torch, e.g. an index with builds for one CUDA version.
TORCH_PIP_ARGS ?=
RUN ?= runs/quickstart
# What `make pretrain` trains: from the packaged denoiser. PRETRAIN_ARGS= is from scratch, recipe quickstart; a run
# folder holds one run, so give another RUN with it.
PRETRAIN_ARGS ?= --recipe second_stage
NPROC ?= 2

# Without an NVIDIA GPU the quickstart runs on NPROC CPU ranks, which share the cores.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_GPU),yes)
# The quickstart's 16 passages an update divide among 1, 2, 4, 8 or 16 GPUs: of 3 it takes the first 2.
ALL_GPUS := $(or $(CUDA_VISIBLE_DEVICES),$(shell nvidia-smi -L | awk '/^GPU/ {printf (n ? ",%d" : "%d"), n++}'))
TAKEN_GPUS := $(shell echo $(ALL_GPUS) | awk -F, '{for (p = 16; p > NF; p /= 2); NF = p; print}' OFS=,)
DEVICE_ENV := $(if $(filter-out $(ALL_GPUS),$(TAKEN_GPUS)),CUDA_VISIBLE_DEVICES=$(TAKEN_GPUS))
else
DEVICE_ENV := LOCAL_SIZE=$(NPROC)
endif
ACTIVATED := PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(CURDIR)" $(DEVICE_ENV)
FREE_PORT = $$($(BIN)/python -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])")
PYTEST := $(ACTIVATED) DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install install-dev pretrain test lint types unit fault-test attack-test audit slurm-test heavy-test golden bench \
    bench-bart bench-decode gpu-check results-convergence results-glge clean

help:
	@echo "make pretrain     install, prepare the bundled corpus, pretrain, fill blanks in held-out passages"
	@echo "make test         install with development extras, then lint, types and tests"
	@echo "make install      the environment alone (.venv)"
	@echo "make fault-test   the long suite of kills, signals, damage and resumes; ends with a table"
	@echo "make attack-test  every attack on data, checkpoints and ports, with 500 mutated files each; ends with a table"
	@echo "make audit        known holes of the pinned packages; fails where the database cannot be asked about each"
	@echo "make slurm-test   the job scripts under a real Slurm on this machine; INSTALL=1 installs it"
	@echo "make heavy-test   every test, the long ones included"
	@echo "make golden       write the losses, tokens and commands of tests/golden anew (only with a change that means to)"
	@echo "make bench        step, head and data benches with their JSON"
	@echo "make bench-bart   the same at BART-base (an hour on one core)"
	@echo "make bench-decode decoding against transformers and CTranslate2 (an hour on one core)"
	@echo "make gpu-check    what to run first on a GPU (8 minutes, no network): all right there? how fast? JSON and a page"
	@echo "make results-convergence  JANUS against AR and R-Drop at three budgets (days; needs JANUS_SHARED_DATA)"
	@echo "make results-glge the SQuAD question-generation experiment, likewise"
	@echo "make clean        remove .venv and runs/"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install $(TORCH_PIP_ARGS) torch==$(TORCH_VERSION)
	$(BIN)/pip install -c constraints.txt -e ".[plots]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

pretrain: install
	$(ACTIVATED) deepspeed --master_port $(FREE_PORT) launch/pretrain.py \
	    --deepspeed_config ds_configs/zero2.json --output "$(RUN)" $(PRETRAIN_ARGS)
	$(ACTIVATED) python -m janus_ds blanks "$(RUN)"

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy janus_ds

# Files are shared out between two processes; each stays in one, so that what its tests share is made once.
unit: install-dev
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not heavy" tests

test: lint types unit

fault-test: install-dev
	$(PYTEST) tests/fault tests/distributed/test_elastic.py

# INSTALL=1 installs Debian's Slurm if there is none; without one, the tests are skipped visibly.
INSTALL ?=
# What others send: mutated files, hostile servers, strangers at the ports; JANUS_ATTACK_EXAMPLES files of each kind.
# A part of it: make attack-test ATTACKS=tests/parallel
ATTACKS := tests/model/test_hostile_models.py \
    tests/data/stream/test_hostile_data.py tests/data/stream/test_hostile_server.py \
    tests/data/stream/test_hostile_cache.py tests/config/test_mutated_files.py tests/config/test_load_traps.py \
    tests/config/test_locations.py tests/train/test_state.py tests/checkpoint/test_manifest.py \
    tests/parallel/test_liveness.py tests/fault/test_run_folder.py tests/fault/test_kill_commands.py \
    tests/cli/test_bad_streams.py tests/cli/test_outside_text.py tests/data/text/test_containers.py \
    tests/data/text/test_sentences.py
attack-test: install-dev
	JANUS_ATTACK_EXAMPLES=500 $(PYTEST) --timeout 1800 $(ATTACKS)

# Without --strict, pip-audit ends with 0 when its database has told it nothing.
audit: install-dev
	$(BIN)/pip install -q -c constraints.txt "pip-audit>=2.10,<3"
	$(BIN)/pip-audit --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt || \
	    { grep == constraints.txt; echo "above: a known hole, or why nothing was audited; the pinned versions"; exit 1; }

slurm-test: install-dev
	@INSTALL="$(INSTALL)" bash tests/slurm/install.sh
	$(PYTEST) tests/slurm

heavy-test: install-dev
	$(PYTEST) tests

golden: install-dev
	JANUS_UPDATE_GOLDEN=1 $(PYTEST) tests/golden

RESULTS := benchmarks/results
IWSLT := $(ACTIVATED) python -m benchmarks train --also authors,janus_2enc,ar_rdrop --shape iwslt --rounds 9
bench: install-dev
	$(IWSLT) --json $(RESULTS)/train_iwslt.json
	for p in float32 bfloat16; do \
	    $(ACTIVATED) python -m benchmarks train --also hf,hf_eager,torch --shape iwslt --rounds 9 --precision $$p \
	        --json $(RESULTS)/train_outsiders_$$p.json || exit 1; \
	done
	$(IWSLT) --masked-share .41 --json $(RESULTS)/train_iwslt_41.json
	$(IWSLT) --attention-dropout .1 --json $(RESULTS)/train_iwslt_dropout_1.json
	$(ACTIVATED) python -m benchmarks train --shape small --vocabulary 8000,16000,32000,50000 --rounds 3 \
	    --json $(RESULTS)/train_vocabulary.json
	$(ACTIVATED) python -m benchmarks train --shape small --length 64,128,256,512 --rounds 3 \
	    --json $(RESULTS)/train_length.json
	$(ACTIVATED) python -m benchmarks head --shape iwslt --json $(RESULTS)/head_iwslt.json
	$(ACTIVATED) python -m benchmarks attention --shape iwslt --json $(RESULTS)/attention_iwslt.json
	$(ACTIVATED) python -m benchmarks data --shape documents --json $(RESULTS)/data.json
	$(ACTIVATED) python -m benchmarks data --shape pairs --json $(RESULTS)/data_pairs.json

# The same at BART-base: the masked share of the released sampler and .5; attention dropout 0 and .1 (long).
bench-bart: install-dev
	for share in .41 .5; do for rate in 0 .1; do \
	    $(ACTIVATED) python -m benchmarks train --also authors --shape bart_base --masked-share $$share \
	        --attention-dropout $$rate --json $(RESULTS)/train_bart_base_$${share#.}_dropout_$${rate#.}.json || exit 1; \
	done; done
	for p in float32 bfloat16; do \
	    $(ACTIVATED) python -m benchmarks train --also hf --shape bart_base --rounds 3 --precision $$p \
	        --json $(RESULTS)/train_outsiders_bart_base_$$p.json || exit 1; \
	done
	$(ACTIVATED) python -m benchmarks head --shape bart_base --json $(RESULTS)/head_bart_base.json
	$(ACTIVATED) python -m benchmarks attention --shape bart_base --json $(RESULTS)/attention_bart_base.json

DECODE := $(ACTIVATED) python -m benchmarks decode
bench-decode: install-dev
	$(DECODE) --batch 1 --output-tokens 32,64 --rounds 9 --only "ar fp32,ctranslate2 fp32,transformers" \
	    --json $(RESULTS)/decode_bart_base.json
	$(DECODE) --batch 1 --output-tokens 32,64 --rounds 9 --only "ar int8,ctranslate2 int8" \
	    --json $(RESULTS)/decode_bart_base_int8.json
	$(DECODE) --batch 1 --output-tokens 32,64 --rounds 5 --only "ar fp32,janus fp32,ar bf16,janus bf16,nar 4" --peers none \
	    --json $(RESULTS)/decode_bart_base_nar.json
	$(DECODE) --batch 32 --output-tokens 32 --rounds 2 --only "ar fp32,ar int8,ctranslate2,transformers" \
	    --json $(RESULTS)/decode_bart_base_batch32.json
	$(DECODE) --batch 32 --output-tokens 64 --rounds 1 --only "ar fp32,ar int8,ctranslate2,transformers" \
	    --json $(RESULTS)/decode_bart_base_batch32_64.json
	$(DECODE) --shape iwslt --batch 1 --rounds 9 --only "ar fp32,ar int8,janus fp32,ctranslate2,transformers" \
	    --json $(RESULTS)/decode_iwslt.json
	$(DECODE) --shape iwslt --batch 1,32 --rounds 3 --only "ar fp32,ar bf16,nar 4" --peers none \
	    --json $(RESULTS)/decode_iwslt_bf16.json
	$(DECODE) --shape iwslt --batch 1,32 --rounds 2 --only "ar fp32,ar int8,ctranslate2,transformers" \
	    --json $(RESULTS)/decode_iwslt_batch32.json

# Installs nothing: takes .venv if it is there, else python3 with torch >= 2.9 and what PYTHONPATH adds. DEVICE=cpu: small.
DEVICE ?= cuda
ROUNDS ?= 3
gpu-check:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(or $(wildcard $(BIN)/python),python3) -m benchmarks gpu --device $(DEVICE) \
	    --rounds $(ROUNDS) --json $(RESULTS)/check_$(DEVICE).json

# Further options, for example: make results-convergence RESULTS_ARGS="--only ar-2k-s1,paper-2k-s1"
RESULTS_ARGS ?=
results-convergence: install
	$(ACTIVATED) python launch/experiments/convergence.py $(RESULTS_ARGS)

results-glge: install
	$(ACTIVATED) python launch/experiments/glge_squadqg.py $(RESULTS_ARGS)

clean:
	rm -rf $(VENV) runs
