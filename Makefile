# make train | test | test-gpu | lint
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-gpu lint

train: .venv/ready
	$(BIN)/python train.py experiment=quick

test: .venv/ready
	$(BIN)/python -m pytest

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
