# make setup   an environment in .venv (needs Python 3.11 or newer, and a package index)
# make test    all tests that need no GPU and no network
# make test-learning   the embedded model learns new shapes, is merged and served (minutes)
# make test-ui the chat page in headless Chromium (needs Chromium), in an environment of its own
# make lint    style and format
# make demo    ask the embedded model about the pictures in examples/
# make docs    rewrite the generated tables in docs/
# make clean   remove .venv and caches
#
# pip's own settings apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf), for a CPU build of torch, say.

VENV := .venv
UI := .venv-ui
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

# The first of these that is new enough makes the environment; another one: make setup PYTHON=/path/to/python3.12
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON = $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	if $$python $(NEW_ENOUGH) 2>/dev/null; then echo $$python; break; fi; done)

.PHONY: setup test test-learning test-ui lint demo docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "error: no Python 3.11 or newer was found" >&2; \
		echo "hint: install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; \
	elif ! $$python $(NEW_ENOUGH); then \
		echo "error: PYTHON=$$python is not Python 3.11 or newer" >&2; exit 2; \
	elif ! $$python -m venv $(VENV); then \
		echo "error: $$python cannot make a virtual environment" >&2; \
		echo "hint: install its venv module (python3.11-venv on Debian and Ubuntu)" >&2; exit 2; \
	fi
	@echo "installing torch into $(VENV); large the first time"
	@$(PIP) install --quiet --constraint constraints.txt torch setuptools
	@echo "installing mmtool and what it needs"
	@DS_BUILD_OPS=0 $(PIP) install --quiet --constraint constraints.txt --editable '.[dev,serve,deepspeed,audio]'
	@# In folders of their own, since transformers and peft load these at every start where they find them.
	@$(PIP) install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/quant torchao
	@$(PIP) install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/bnb bitsandbytes
	@touch $@
	@echo "ready: $(BIN)/mmtool --help"

test: setup
	$(BIN)/python -m pytest

test-learning: setup
	$(BIN)/python -m pytest -m slow tests/sft/test_new_shapes.py

# Gradio takes no Pillow 13, with which the pixels of the models are compared: so an environment of its own.
$(UI)/.ready: pyproject.toml constraints.txt constraints-ui.txt | setup
	@echo "installing the chat page into $(UI)"
	@$(BIN)/python -m venv $(UI)
	@{ grep -vi '^pillow==' constraints.txt; cat constraints-ui.txt; } > $(UI)/constraints.txt
	@$(UI)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(UI)/constraints.txt torch
	@$(UI)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(UI)/constraints.txt \
		--editable '.[serve,ui,audio]' pytest playwright
	@touch $@

test-ui: $(UI)/.ready
	$(UI)/bin/python -m pytest -m browser tests/ui

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

demo: setup
	@$(BIN)/python examples/demo.py

docs: setup
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(UI) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mmtool tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
