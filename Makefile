# Every target but help and clean first builds .venv, when that is missing, half built or stale.
# Paths are relative, because make splits an absolute one at the spaces of a folder's name.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

# The stamp is written last, so an interrupted installation leaves none. It names the interpreter
# and the folder that .venv was made for: changing either makes it stale, as setup.cfg does.
STAMP := .venv/complete
export MADE_FOR := $(shell $(PYTHON) -VV 2>/dev/null) $(CURDIR)
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(MADE_FOR))
.PHONY: $(STAMP)
endif

.PHONY: help demo test lint clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.12], where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-6s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## train a mixture-of-experts language model, export it, query it
	@TF_CPP_MIN_LOG_LEVEL=3 $(VENV_PYTHON) examples/language_model.py

test: $(STAMP)  ## run the tests
	$(VENV_PYTHON) -m pytest

lint: $(STAMP)  ## check style and format
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check

clean:  ## remove .venv, builds and caches; results and exported models stay
	rm -rf .venv build dist keras_moe.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	    2>/dev/null || { printf '%s\n' >&2 \
	    "TensorFlow needs Python 3.10 to 3.13, and .venv its modules venv and ensurepip." \
	    "Received: $(PYTHON), which is $$($(PYTHON) -V 2>&1)." \
	    "Install what is missing (Debian, Ubuntu: apt install python3-venv)" \
	    "or name another interpreter: make PYTHON=python3.12"; exit 1; }
	@[ "$$(cat $@ 2>/dev/null)" = "$$MADE_FOR" ] || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@echo "Installing keras_moe and its dependencies in .venv: a few minutes, about 3 GB."
	$(VENV_PYTHON) -m pip install -e '.[dev]'
	@printf '%s\n' "$$MADE_FOR" > $@
