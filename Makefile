# Needs Python 3.11 or newer and make; everything else is set up in .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two processes share the tests out; all that need a Ray cluster stay in one of them (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo demo-all test test-all lint docs clean

demo: $(READY)
	$(BIN)/ray-vlm demo

demo-all: $(READY)
	$(BIN)/ray-vlm demo --all

test: $(READY) lint
	$(PYTEST) -m "not slow"

test-all: $(READY) lint
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m ray_vlm.config.docs docs/jobs.md

$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (a few minutes the first time: torch is large)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || \
		{ rm -rf .venv; echo "Python's venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
