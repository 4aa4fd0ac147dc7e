PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LOCK := requirements/lock.txt
# torch comes first and pinned: a bare `torch`, pulled in by another package, may be another build by gigabytes.
TORCH = $(shell grep '^torch==' $(LOCK))
# Tests are many small tensors: processes pay, threads do not.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint types tests compile-tests doctests test-faults notebooks docs bench-peers bench clean

help: ## say what the targets do
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

.venv/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c $(LOCK) $(TORCH)
	$(BIN)/pip install --quiet -r $(LOCK)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: .venv/.installed ## trace a small language model's answers to the sentences that taught them; writes demo.html
	$(BIN)/python -m notebooks.demo

test: lint types tests compile-tests doctests ## style, types and every test; CI also runs notebooks and docs

lint: .venv/.installed ## style, docstrings and the one-way imports of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/.installed ## static types of the package
	$(BIN)/mypy

tests: .venv/.installed ## the tests, every one with shapes and types checked
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not compile" -n $(WORKERS)

compile-tests: .venv/.installed ## the tests of torch.compile, in a process without the type hook
	$(BIN)/pytest -q -o addopts= --strict-markers --show-capture=no -m compile

doctests: .venv/.installed ## the examples in docstrings
	$(BIN)/pytest -q -o addopts= --doctest-modules influence

test-faults: .venv/.installed ## kill every command at every file event, damage every file, let two write at once (an hour)
	$(BIN)/python -m tests.faults --jobs $(WORKERS)

notebooks: .venv/.notebooks ## the notebooks, each executed within two minutes; with their outputs in build/notebooks
	$(BIN)/python notebooks/execute.py

.venv/.notebooks: .venv/.installed requirements/notebooks.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/notebooks.txt
	touch $@

docs: .venv-docs/.installed ## the documentation, in build/site: a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	.venv-docs/bin/python docs/site/check.py build/site

# An environment of its own, without torch: the package is read, not imported.
.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r requirements/docs.txt
	touch $@

bench-peers: .venv-peers/.installed ## a second environment beside bergson, kronfluence and devinterp

bench: .venv-peers/.installed ## the collection benchmark beside its peers, judged by its targets (about ten minutes)
	.venv-peers/bin/python -m benchmarks collect --model neox --peers --check

.venv-peers/.installed: pyproject.toml $(LOCK) requirements/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -c $(LOCK) $(TORCH)
	.venv-peers/bin/pip install --quiet -r $(LOCK)
	.venv-peers/bin/pip install --quiet --no-deps -r requirements/peers.txt
	.venv-peers/bin/pip uninstall --quiet --yes torchvision torchaudio
	.venv-peers/bin/pip install --quiet --no-deps --no-build-isolation -e .
	.venv-peers/bin/python -c "import torch, bergson, kronfluence, devinterp; assert torch.__version__.split('+')[0] == '$(TORCH)'[7:]"
	touch $@

clean: ## remove the environments and every cache
	rm -rf .venv .venv-docs .venv-peers build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
