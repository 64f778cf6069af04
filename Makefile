# make test: everything that CI runs.  make demo: THOR beside AdamW and momentum SGD, in about a minute.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# An independent K-FAC that tests compare with.
REFERENCE := backpack-for-pytorch curvlinops-for-pytorch einconv linear_operator unfoldNd

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pip runs in one environment break it, two benchmarks at once measure each other
.PHONY: help install test lint types unit format demo bench

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Make .venv with the tested versions

# torch goes in alone and first: it is the big one, and the constraints choose its build before anything else can.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	# Without their needs: they ask for torchvision, which they run without, and which would bring another torch.
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(REFERENCE)
	touch $@

test: lint types unit  ## Lint, types, tests and doctests: what CI runs

lint: $(INSTALLED)  ## Style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## Static types
	$(BIN)/mypy

unit: $(INSTALLED)  ## Tests and doctests; PYTEST_ARGS="-m 'not slow'" for the quick ones
	$(BIN)/python -m pytest --doctest-modules lightning_thor examples benchmarks tests $(PYTEST_ARGS)

format: $(INSTALLED)  ## Rewrite the layout and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED)  ## THOR beside AdamW and momentum SGD
	$(BIN)/python -m examples.demo

bench: $(INSTALLED)  ## Measure the cost of a step (minutes) and put the figures into README.md
	$(BIN)/python -m benchmarks.step_cost --peers --memory
	$(BIN)/python -m benchmarks.readme
