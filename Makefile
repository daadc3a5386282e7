# Needs Python 3.11 or later with pip, and make. `make tables` and `make test` do everything from a fresh clone.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH ?=
UV_VERSION := 0.13.8
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help tables test lab lint format requirements badges

help:
	@echo "make tables    run every notebook and print the tables        ARGS='--datasets cifar100 --seeds 0-2': see make tables ARGS=--help"
	@echo "make test      run the tests                                  ARGS='-k quantizer': any option of pytest"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make lint      check style and type hints; make format mends style"
	@echo "make badges REPOSITORY=owner/name    point README's badges at a copy on GitHub"
	@echo "make requirements    renew the pinned versions after a change of dependencies"
	@echo "The first call installs everything into $(VENV). PYTHON=python3.12 takes another Python, TORCH=cpu a torch without CUDA."

tables: $(INSTALLED)
	$(BIN)/python run_all.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

lab: $(INSTALLED)
	$(BIN)/python -m jupyterlab --notebook-dir=notebooks $(ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# uv installs in seconds what takes pip minutes; pip takes over where only its own configuration knows the package index.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"Python {v} is too old: make PYTHON=python3.11 (or later) $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode $(if $(TORCH),--torch-backend $(TORCH)) --python $(BIN)/python -r requirements.txt || $(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# make badges REPOSITORY=owner/name, once the project has a place on GitHub.
badges:
	$(PYTHON) docs/badges.py $(REPOSITORY)

# After a change of dependencies in pyproject.toml; ARGS=--upgrade moves every pin to its latest version.
requirements: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra deploy --no-emit-index-url --no-annotate \
	    --custom-compile-command 'make requirements' $(ARGS) pyproject.toml --output-file requirements.txt
