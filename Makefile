# Everything runs in .venv, made on first use and reused while pyproject.toml stays as it is.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
# `parity` brings the PyTorch reference; leave it out where no CPU build of torch can be had:
# make test EXTRAS=dev
EXTRAS ?= dev,parity

BIN := .venv/bin
# After a benchmark: a goal that is missed is told of, and ends nothing.
OR_MISSED := || [ $$? = 3 ]
# Where bench-full writes; another machine needs another, as benchmarks/results/NAME.
RESULTS ?= benchmarks/results
comma := ,
# What is installed, extras joined by hyphens; the planner's benchmarks need libtpu, too.
DEV := .venv/.dev-$(subst $(comma),-,$(EXTRAS))
DEV_AND_TPU := .venv/.dev-dev-parity-tpu
# Files in the order that tests/conftest.py puts them in, each by one worker.
IN_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
INSTALL := $(BIN)/python -m pip install --quiet --editable

.PHONY: help demo test test-quick mutants bench bench-full lint format clean

help:
	@echo "make demo        train, convert and run a small GLM-5 on this machine (about 5 minutes)"
	@echo "make test        lint, types and all tests"
	@echo "make test-quick  tests only, without those marked slow"
	@echo "make mutants     show that known bugs, put in on purpose, fail tests"
	@echo "make bench       speed beside transformers, start-up, rooflines: the rows that take minutes"
	@echo "make bench-full  all rows, written to RESULTS=benchmarks/results and the README (hours)"
	@echo "make format      format the code"
	@echo "make clean       remove .venv and build"

.venv/pyvenv.cfg:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv

.venv/.run: .venv/pyvenv.cfg pyproject.toml
	$(INSTALL) '.[train,serve]'
	@touch $@

.venv/.dev-%: .venv/pyvenv.cfg pyproject.toml
	$(INSTALL) '.[$(subst -,$(comma),$*)]'
	@touch $@ .venv/.run

demo: .venv/.run
	$(BIN)/python -m benchmarks.demo

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(IN_PARALLEL) --durations 25

test-quick: $(DEV)
	$(BIN)/python -m pytest $(IN_PARALLEL) -m 'not slow'

mutants: $(DEV)
	$(BIN)/python -m tests.mutants

bench: $(DEV)
	$(BIN)/python -m benchmarks.speed $(OR_MISSED)
	$(BIN)/python -m benchmarks.startup $(OR_MISSED)
	$(BIN)/python -m benchmarks.roofline machine

# Not benchmarks.training_step, which needs an environment with MaxText.
bench-full: $(DEV_AND_TPU)
	$(BIN)/python -m benchmarks.speed --full --results $(RESULTS) $(OR_MISSED)
	$(BIN)/python -m benchmarks.rounding --results $(RESULTS)
	$(BIN)/python -m benchmarks.memory --results $(RESULTS) $(OR_MISSED)
	$(BIN)/python -m benchmarks.startup --results $(RESULTS) $(OR_MISSED)
	$(BIN)/python -m benchmarks.decode --results $(RESULTS) $(OR_MISSED)
	$(BIN)/python -m benchmarks.compile_time --results $(RESULTS) $(OR_MISSED)
	$(BIN)/python -m benchmarks.roofline machine --results $(RESULTS)
	$(BIN)/python -m benchmarks.roofline chips --results $(RESULTS)
	$(BIN)/python -m benchmarks.claims --results $(RESULTS)
	$(BIN)/python -m benchmarks.processors
	$(BIN)/python -m benchmarks.readme

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build
