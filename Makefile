# make run   trains, exports, verifies and scores a drawn sample set: pipelines/quickstart.py
# make test  what CI runs and whoever changes something: lint, types, imports, tests, in minutes
# make test-all  further architectures, servers, emulators and proofs as well
# make images  builds what a cluster runs, with buildah, as root: k8s/images.sh
# make locks   pins the images' packages to the versions that are installed for `make test-all`
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

# modules are compiled when first imported, and kept: installing need not compile all there are
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all lint types imports pytest pytest-all images locks clean

run: .venv/.train
	$(BIN)/python pipelines/quickstart.py

test: .venv/.test
	$(MAKE) lint types imports pytest

test-all: .venv/.test-all
	$(MAKE) lint types imports pytest-all

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/mypy

imports: .venv/.test
	$(BIN)/lint-imports

pytest: .venv/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

pytest-all: .venv/.test-all
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m ''

images:
	k8s/images.sh train serve mlflow

locks: .venv/.test-all
	$(BIN)/pip freeze --exclude-editable | $(BIN)/python k8s/locks.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "purebred needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile -e '.[train]'
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile -e '.[train,dev]'
	@touch .venv/.train $@

.venv/.test-all: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile -e '.[train,dev-all]'
	@touch .venv/.train .venv/.test $@

clean:
	rm -rf .venv build *.egg-info
