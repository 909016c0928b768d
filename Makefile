# One folder, .venv, holds everything; `make demo` and `make test` are all the set-up there is.
#
# TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu make demo   takes the small CPU build of torch on machines
# without a GPU (Linux), or any other index you name.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# torch first, and pinned in every later step, so that nothing replaces the build that was chosen
CONSTRAINT := $(VENV)/constraint.txt
# processes for the tests; two are enough to hide waiting, more fight over memory
JOBS ?= 2

.PHONY: demo test lint types layers unit wheel clean

demo: $(VENV)/installed
	$(BIN)/scdiva demo --overwrite

test: lint types layers unit

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

layers: $(VENV)/installed-test
	$(BIN)/lint-imports

unit: $(VENV)/installed-test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS) --dist loadfile

wheel: $(VENV)/installed-test
	$(BIN)/python -m build --wheel --outdir dist .

$(CONSTRAINT):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scdiva needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip freeze | grep '^torch==' | sed 's/+.*//' > $@.part
	mv $@.part $@

$(VENV)/installed: $(CONSTRAINT) pyproject.toml
	$(PIP) --constraint $(CONSTRAINT) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --constraint $(CONSTRAINT) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
