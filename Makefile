# make train | test | test-gpu | torture | lint
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-gpu torture lint

train: .venv/ready
	$(BIN)/python train.py experiment=quick

# A process a core, of one thread each: threads that share a core wait for each other.
# While you edit: .venv/bin/pytest -m "not slow"
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The same fuzzing as in the tests, at length (an hour and more).
torture: .venv/ready
	HYPOTHESIS_PROFILE=torture OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m fuzz

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
