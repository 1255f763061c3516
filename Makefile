# make run   trains, exports, verifies and scores on a drawn sample set, then says where to look
# make test  what CI runs and whoever changes something: lint, types, imports, tests, in minutes
# make test-all  further architectures, servers, emulators and proofs as well
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/sample
WORKERS ?= 2

# modules are compiled when first imported, and kept: installing need not compile all there are
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-all lint types imports pytest pytest-all clean

run: .venv/.train
	@rm -rf $(RUN)
	$(BIN)/python train/data/sample.py --output data/sample
	$(BIN)/torchrun --nproc_per_node=2 train/main.py --data data/sample/train --model simple_cnn \
	  --image-size 64 --epochs 15 --crop-scale 0.6 --name sample
	$(BIN)/python export/main.py --run $(RUN)
	$(BIN)/python serve/main.py --model $(RUN)/export/model.onnx --images data/sample/test \
	  --output $(RUN)/predictions.csv
	@$(BIN)/python -c "import json; v = json.load(open('$(RUN)/export/verification.json')); \
	  print(f\"\nvalidation accuracy  {v['accuracy_served']:.3f} on {v['num_images']} drawn images\")"
	@echo "run directory        $(RUN)"
	@echo "ONNX model           $(RUN)/export/model.onnx"
	@echo "predictions          $(RUN)/predictions.csv"
	@echo "figures              $(RUN)/figures/"
	@echo "compare runs         $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

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
