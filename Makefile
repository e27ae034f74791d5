# `make demo` does the main job, `make test` runs the tests. Both make .venv first and install what they need into it.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-oldest lint format index cards clean

demo: $(VENV)/.installed-train
	$(BIN)/python -m zoo.demo

# one thread for each of $(JOBS) processes; more tests at once: make test JOBS=8; some of them: make test ARGS="-k registry"
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=15 $(ARGS)

test-all: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "" $(ARGS)

# in a virtual environment of its own, with the lowest versions of torch and torchvision that pyproject.toml names
test-oldest:
	$(MAKE) test VENV=.venv-oldest PINS="$(or $(shell sed -nE 's/^ *"(torch|torchvision)>=(.+)",$$/\1==\2/p' pyproject.toml),$(error pyproject.toml names no lowest torch))"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

index: $(VENV)/.installed-train
	$(BIN)/python -m zoo.index

cards: index
	$(BIN)/python -m zoo.cards

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find zoo tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed-train: EXTRAS := train
$(VENV)/.installed-dev: EXTRAS := train,dev
$(VENV)/.installed-train $(VENV)/.installed-dev: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$(EXTRAS)]" $(PINS)
	@touch $(VENV)/.installed-train $@
