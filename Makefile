# make train | test | test-gpu | torture | lint | bench
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-gpu torture lint bench

train: .venv/ready
	$(BIN)/python train.py experiment=quick

# One process per core with one thread each: threads that share a core wait for each other.
# While editing: .venv/bin/pytest -m "not slow"
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

# The fuzzing of the tests, for an hour and more.
torture: .venv/ready
	HYPOTHESIS_PROFILE=torture OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m fuzz

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A few minutes; each script lists its options with --help.
bench: .venv/ready
	$(BIN)/python benchmarks/finetune.py --size 224 --images 16
	$(BIN)/python benchmarks/predict.py --size 224
	$(BIN)/python benchmarks/data.py --images 16
	$(BIN)/python benchmarks/last.py --size 128 --images 16 -- model.weights=random
	$(BIN)/python benchmarks/solver.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
