# Every target but help and clean first builds .venv, when that is missing, half built or stale;
# bench builds .venv-bench, as the packages it measures want other versions than the tests; docs and
# dist build small ones without TensorFlow, as they read the package and don't import it.
# Paths are relative, because make splits an absolute one at the spaces of a folder's name.

PYTHON ?= python3
# `make test OLDEST=1`: the oldest versions that setup.cfg allows, in an environment beside .venv.
CONSTRAINTS := $(if $(OLDEST),.ci/oldest.txt)
VENV := .venv$(if $(OLDEST),-oldest)
VENV_PYTHON := $(VENV)/bin/python
# Of Keras, in the demo: tensorflow or jax.
BACKEND ?= tensorflow

# Their pins exclude this TensorFlow; the parts that are measured need no more than extra bench has.
FROZEN_PEERS := tensor2tensor==1.15.7 tf-models-official==2.20.0

# What computes; the other tests read files, start processes or count what CPUs do.
GPU_TESTS := $(addprefix tests/,test_gpu.py test_losses.py backend gating experts dispatch mixture \
    layers models optimizers surgery)
JAX_TESTS := $(addprefix tests/,on_jax test_architecture.py test_losses.py backend/test_backends.py \
    callbacks dispatch gating contract layers saving surgery/test_upcycle_model.py \
    $(addprefix optimizers/test_,optimizers.py optimizers_slots.py schedules.py) \
    $(addprefix experts/test_,feed_forward.py int8.py layer_experts.py) \
    $(addprefix mixture/test_,sparse_moe.py sparse_moe_arguments.py hierarchical_moe.py balance_logs.py \
        survival_inputs.py survival_quantized.py survival_training.py) \
    $(addprefix models/test_,beam_search.py footprint.py language_model_presets.py preset_gating.py \
        sampling.py translate.py translation_model.py))
TWO_GPU_TESTS := tests/test_gpu.py $(wildcard tests/distribute/test_distribute*.py)

# The stamp is written last, so an interrupted installation leaves none. It names the interpreter
# and the folder that it was made for: changing either makes it stale, as setup.cfg does.
STAMP := $(VENV)/complete
BENCH_STAMP := .venv-bench/complete
DOCS_STAMP := .venv-docs/complete
RELEASE_STAMP := .venv-release/complete
export MADE_FOR := $(shell $(PYTHON) -VV 2>/dev/null) $(CURDIR)
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(MADE_FOR))
.PHONY: $(STAMP)
endif
ifneq ($(shell cat $(BENCH_STAMP) 2>/dev/null),$(MADE_FOR))
.PHONY: $(BENCH_STAMP)
endif

ifneq ($(shell cat $(DOCS_STAMP) 2>/dev/null),$(MADE_FOR))
.PHONY: $(DOCS_STAMP)
endif
ifneq ($(shell cat $(RELEASE_STAMP) 2>/dev/null),$(MADE_FOR))
.PHONY: $(RELEASE_STAMP)
endif

.PHONY: help demo test test-gpu lint docs dist bench clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [OLDEST=1], where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## train a mixture-of-experts language model, export it, query it
	@TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=$(BACKEND) $(VENV_PYTHON) examples/language_model.py

# The tests begin with the longest files: tests/conftest.py names them.
IN_PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(STAMP)  ## run the tests, and under JAX those of what computes there
	$(VENV_PYTHON) -m pytest $(IN_PROCESSES)
	KERAS_BACKEND=jax $(VENV_PYTHON) -m pytest $(IN_PROCESSES) $(JAX_TESTS)

test-gpu: $(STAMP)  ## run the tests of what computes on a GPU, where there is one
	$(VENV_PYTHON) -c 'import sys, tensorflow as tf; sys.exit(not tf.config.list_physical_devices("GPU") and \
	    "TensorFlow finds no GPU. With its libraries: $(VENV_PYTHON) -m pip install \"tensorflow[and-cuda]\"")'
	$(VENV_PYTHON) -m pytest --numprocesses 8 --dist loadfile $(GPU_TESTS)
	$(VENV_PYTHON) -m pytest --numprocesses 4 --dist loadfile --gpus 2 $(TWO_GPU_TESTS)

lint: $(STAMP)  ## check style and format
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check

docs: $(DOCS_STAMP)  ## build the documentation in site/, links checked
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet
	@echo "Wrote site/index.html."

dist: $(RELEASE_STAMP)  ## build what a release uploads, in dist/, and check it
	rm -rf dist
	KERAS_MOE_REPOSITORY="$(REPOSITORY)" .venv-release/bin/python -m build
	.venv-release/bin/python -m twine check --strict dist/*

bench: $(BENCH_STAMP)  ## measure speed and memory of the layer beside other implementations
	@TF_CPP_MIN_LOG_LEVEL=3 .venv-bench/bin/python benchmarks/layer.py

clean:  ## remove environments, builds and caches; results and exported models stay
	rm -rf .venv .venv-oldest .venv-bench .venv-docs .venv-release site build dist keras_moe.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): INSTALLED := -e '.[dev]' $(addprefix --constraint ,$(CONSTRAINTS))
$(BENCH_STAMP): INSTALLED := -e '.[bench]'
$(DOCS_STAMP): INSTALLED := -r docs/requirements.txt
# With [md] twine renders the page, else it passes anything.
$(RELEASE_STAMP): INSTALLED := build twine 'readme_renderer[md]'
$(STAMP) $(BENCH_STAMP): NOTE := keras_moe and its dependencies, a few minutes, about 3 GB
$(DOCS_STAMP) $(RELEASE_STAMP): NOTE := a few tools, less than a minute
$(STAMP): $(CONSTRAINTS)
$(DOCS_STAMP): docs/requirements.txt
$(STAMP) $(BENCH_STAMP) $(DOCS_STAMP) $(RELEASE_STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	    2>/dev/null || { printf '%s\n' >&2 \
	    "TensorFlow needs Python 3.10 to 3.13, and .venv its modules venv and ensurepip." \
	    "Received: $(PYTHON), which is $$($(PYTHON) -V 2>&1)." \
	    "Install what is missing (Debian, Ubuntu: apt install python3-venv)" \
	    "or name another interpreter: make PYTHON=python3.12"; exit 1; }
	@[ "$$(cat $@ 2>/dev/null)" = "$$MADE_FOR" ] || $(PYTHON) -m venv --clear $(@D)
	@rm -f $@
	@echo "Installing in $(@D): $(NOTE)."
	@# The pip that Python 3.10 brings tries every version there is, for an hour.
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install $(INSTALLED)
	$(if $(filter $(BENCH_STAMP),$@),$(@D)/bin/python -m pip install --no-deps $(FROZEN_PEERS))
	@printf '%s\n' "$$MADE_FOR" > $@
