# make test: everything that CI runs.  make demo: THOR beside other optimizers, in some three minutes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt --no-compile

# An independent K-FAC that tests compare with.
REFERENCE := backpack-for-pytorch curvlinops-for-pytorch einconv linear_operator unfoldNd

# Byte code is written where it is first needed, whatever the environment says: without it each new process takes half a
# minute to import everything, and tests start many.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pip runs in one environment break it, two benchmarks at once measure each other
.PHONY: help install test lint types unit long fuzz soak portable format lock docs demo bench

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Make .venv with the tested versions

# torch goes in alone and first: it is the big one, and the constraints choose its build before anything else can.
# A new pip resolves in a third of the time; where it is not to be had, the old one does. Most files are never imported:
# those that are compile themselves.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install --constraint constraints.txt --upgrade pip
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev]'
	# Without their needs: they ask for torchvision, which they run without, and which would bring another torch.
	$(PIP_INSTALL) --no-deps $(REFERENCE)
	touch $@

test: lint unit portable  ## Lint, types (one of the tests), tests and doctests: what CI runs

lint: $(INSTALLED)  ## Style and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## Static types
	$(BIN)/mypy

unit: $(INSTALLED)  ## Tests and doctests in two processes; PYTEST_ARGS="-m 'not slow'" for the quick ones
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not long and not soak' --doctest-modules lightning_thor examples benchmarks tests hatch_build.py $(PYTEST_ARGS)

# Every kind of processor adds up in another order, this one by where in memory numbers lie: tests hold on any of them.
# Left out is what compares no numbers, and what compares two ways through the same arithmetic.
OLD_PROCESSOR := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1
WITHOUT_NUMBERS := benchmarks block_size distributed examples fsdp trainer reliability/test_composed.py reliability/test_killed_in_a_save.py \
	reliability/test_resumes.py reliability/test_other_resumes.py reliability/test_fuzz.py reliability/test_models.py \
	layers/test_compiled.py layers/test_embeddings.py layers/test_functional.py factors/test_trace_rule.py \
	curvature/test_copies.py curvature/test_damage.py curvature/test_no_sync.py curvature/test_include.py test_trust.py mindspore/test_mindspore_arguments.py \
	mindspore/test_mindspore_docs.py test_bad_options.py test_code_blocks.py test_floors.py test_package.py test_public_addresses.py test_readme.py \
	test_schedules.py

long: $(INSTALLED)  ## What takes minutes: resumes, torch's compiler, several processes, architectures of transformers
	$(BIN)/python -m pytest -m long tests

fuzz: $(INSTALLED)  ## Thousands of drawn cases where the tests draw some tens (an hour)
	LIGHTNING_THOR_FUZZ=1 $(BIN)/python -m pytest -m fuzz tests

soak: $(INSTALLED)  ## 20,000 steps in each mode, 200 fits, 360 kills at random moments (hours)
	$(BIN)/python -m pytest -m soak -s tests/reliability

portable: $(INSTALLED)  ## Quick tests that compare numbers, computed as on an old processor
	$(OLD_PROCESSOR) $(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow and not long and not soak' --doctest-modules lightning_thor tests \
		$(WITHOUT_NUMBERS:%=--ignore=tests/%)

format: $(INSTALLED)  ## Rewrite the layout and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch is left out: its builds for CPUs and for each CUDA have the same version and other hashes.
lock:  ## requirements.lock: the hashes of what constraints.txt names (uv must be installed)
	echo '# The versions of constraints.txt but torch, each with the hashes of its files. Written by `make lock`.' > requirements.lock
	uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --no-emit-package torch constraints.txt >> requirements.lock

docs: $(INSTALLED)  ## The documentation as a site, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: $(INSTALLED)  ## THOR beside AdamW, Muon and momentum SGD
	$(BIN)/python -m examples.demo

bench: $(INSTALLED)  ## Measure the cost of a step (minutes) and put the figures into the pages
	$(BIN)/python -m benchmarks.step_cost --peers --memory
	$(BIN)/python -m benchmarks.readme
