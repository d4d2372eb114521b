# Every target makes its own environment first: a fresh machine needs only Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help test test-all demo demo-pde notebooks docs lint types format clean

help:
	@echo "make test   run the quick tests and doctests: five minutes on two cores"
	@echo "make test-all   run all tests: half an hour"
	@echo "make demo   train a deep autoencoder beside Adam and L-BFGS: four minutes"
	@echo "make demo-pde   solve Poisson's equation to ten digits beside them: a minute"
	@echo "make notebooks   execute the scripts in notebooks/ into notebooks"
	@echo "make docs   build the documentation site in docs/_build/html, offline"
	@echo "make lint   ruff; make types: pyright; make format: ruff format"

$(BIN)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: $(BIN)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: $(BIN)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --hypothesis-profile=full -m "not slow"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --hypothesis-profile=full -m slow

demo: $(BIN)/installed
	$(BIN)/python -m benchmarks compare --suite images --problem curves1000 \
	  --optimizers hfjax,adam,lbfgs --seconds 34 --out runs/demo --show

demo-pde: $(BIN)/installed
	$(BIN)/python -m benchmarks compare --suite equations --problem poisson2d \
	  --optimizers hfjax,adam,lbfgs --seconds 8 --out runs/demo-pde --show

notebooks: $(BIN)/installed
	$(BIN)/python notebooks/build.py

docs: $(BIN)/installed
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d docs/_build/doctrees . \
	  docs/_build/html

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" pyright --verifytypes hfjax --ignoreexternal

format: $(BIN)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist docs/_build
