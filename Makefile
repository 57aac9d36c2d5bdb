# Two commands do everything on a machine with Python 3.11+ and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: demo test test-faults test-triton lint clean

demo: $(VENV)/installed
	$(BIN)/fastrex train demo

# Several processes (PYTEST_PROCESSES) share the tests file by file: most of them wait for processes that they start.
PYTEST_PROCESSES ?= 3
PYTEST := $(BIN)/python -m pytest -q -n $(PYTEST_PROCESSES) --dist loadfile

test: $(VENV)/dev lint
	$(PYTEST)

# Kills, hangs, full disks and hostile files, for real; the table of RELIABILITY.md is written anew, also after failures.
FAULTS := build/faults.json
FAULT_TESTS := tests/test_faults_*.py tests/test_sharded_training.py tests/test_examples.py
test-faults: $(VENV)/dev
	mkdir -p build && rm -f $(FAULTS)
	$(PYTEST) -m '' $(FAULT_TESTS) --report $(FAULTS); tests=$$?; \
	  $(BIN)/python -m benchmarks reliability $(FAULTS) && exit $$tests

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the build of the package imports it (csrc/ is compiled against the torch that runs it).
$(VENV)/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*) | $(VENV)/bin/python
	$(PIP) -c constraints.txt setuptools wheel ninja torch numpy
	$(PIP) -c constraints.txt --no-build-isolation -e '.[train]'
	touch $@

# torchvision and timm serve comparisons only. Without their dependencies: torchvision would exchange torch for another build.
$(VENV)/dev: $(VENV)/installed
	$(PIP) -c constraints.txt --no-build-isolation -e '.[train,transfer,dev]'
	$(PIP) -c constraints.txt --no-deps torchvision timm
	touch $@

# The kernels on every Triton that a supported torch brings: compiled ahead of time, and run in the interpreter.
TRITONS := 3.6.0 3.7.1 3.9.0
test-triton: $(VENV)/dev $(TRITONS:%=.triton/%)
	for version in $(TRITONS); do \
	  echo "Triton $$version" && \
	  PYTHONPATH=.triton/$$version $(BIN)/python -m pytest -q tests/test_aot.py tests/test_contract.py -k 'aot or triton' || exit 1; \
	done

.triton/%:
	$(PIP) --no-deps --target $@ triton==$*

clean:
	rm -rf $(VENV) .triton build *.egg-info .pytest_cache .mypy_cache .ruff_cache
