# Everything runs in .venv, which the first target builds from the package registry.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow test-official check lint bench clean

demo: $(READY)        ## embedded data and weights: extract, train, report
	$(BIN)/mlc demo

test: $(READY)        ## the tests, a few minutes
	$(BIN)/pytest

test-slow: $(READY)   ## real weights, killed processes: some minutes more
	$(BIN)/pytest -m slow

test-official: $(READY) ## the six full-size Query2Label models against their authors' code
	$(BIN)/pytest -m official -s

check: lint test      ## what a change must pass

lint: $(READY) .lint/mlc
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)       ## the performance figures; needs an idle machine
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/flat_memory.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/full_batch.py
	$(BIN)/python benchmarks/linear_column.py
	$(BIN)/python benchmarks/fine_tuning.py

clean:
	rm -rf .venv .lint build dist *.egg-info

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlc needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e '.[demo,onnx,tensorboard,test,dev]'
	touch $@

# mypy does not follow an editable install; it reads the package through this link.
.lint/mlc:
	mkdir -p .lint && ln -sfn .. .lint/mlc
