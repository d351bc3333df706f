# Tasks of a contributor; `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help install train test exhaustive quick laws lint types check bench compare

help:      ## list the tasks
	@grep -E '^[a-z]+: +##' $(MAKEFILE_LIST) | sed 's/: *## */\t/' | expand -t 12

install:   ## install with everything a contributor needs
	pip install -e ".[dev]"

train:     ## the main job on synthetic sites
	python train.py

test:      ## the tests
	python -m pytest -n 2 --dist worksteal

exhaustive: ## what CI tests beyond them: more methods, faults and processes of kinds that the tests have
	python -m pytest -n 3 --dist worksteal -m exhaustive

quick:     ## the tests but the slow ones
	python -m pytest -n 2 --dist worksteal -m "not slow"

laws:      ## the laws that every method obeys (quick check of a new method)
	python -m pytest -q tests/test_laws.py -m ""

lint:      ## style
	ruff check . && ruff format --check .

types:     ## types
	mypy

check:     ## what CI runs (lint, types, test, exhaustive)
	$(MAKE) lint types test exhaustive # what CI runs

bench:     ## speed and memory against a plain loop (about half an hour)
	python benchmarks/engine.py
	for name in frequency steps volumes compare privacy; do python -m benchmarks.$$name; done

compare:   ## five methods x three seeds on synthetic sites, and the page that compares them
	python sweep.py compare_phantom && python compare.py runs/compare_phantom
