# make run   trains, exports, verifies and scores on a drawn sample set, then says where to look
# make test  everything that CI runs
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/sample

# modules are compiled when first imported, and kept: installing need not compile all there are
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test lint types imports pytest clean

run: .venv/.train
	@rm -rf $(RUN)
	$(BIN)/python train/sample.py --output data/sample
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

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/mypy

imports: .venv/.test
	$(BIN)/lint-imports

pytest: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "purebred needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile -e '.[train]'
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --no-compile -e '.[train,dev]'
	@touch .venv/.train $@

clean:
	rm -rf .venv build *.egg-info
