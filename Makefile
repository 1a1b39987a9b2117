# Everything runs in .venv, made from requirements.lock. `make demo` and `make test` need Python 3.10 or newer,
# git and make, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-fast check format lint types wheel bench lock clean

help:
	@echo "make demo    train on real digits, kill processes, recover, compare bit by bit (about a minute)"
	@echo "make test    run every test"
	@echo "make check   what CI runs: format, lint, types, tests, the wheel in a clean environment"
	@echo "make bench   measure, and print ratios"

# pip compiles to bytecode as it installs; Ray's workers start three times as slowly without.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "blobspace needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)
	$(BIN)/blobspace demo

test: test-fast
	$(BIN)/python -m pytest tests/with_ray

# Those without Ray share nothing and run side by side.
test-fast: $(READY)
	$(BIN)/python -m pytest --quiet --numprocesses 2 --ignore tests/with_ray

check: format lint types test wheel

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# The wheel alone, in an environment that has never seen this checkout.
wheel: $(READY)
	rm -rf build dist $(VENV)/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	cd $(VENV)/wheel && bin/python -c "import blobspace.ops, blobspace.workspace_actors, blobspace.cluster; print('wheel', blobspace.__version__, 'imports')"
	cd $(VENV)/wheel && bin/blobspace --version

bench: $(READY)
	$(BIN)/python -m benchmarks

lock:
	uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --extra check --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
