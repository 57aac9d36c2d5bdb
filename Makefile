# Two commands do everything on a machine with Python 3.11+ and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: demo test test-all lint clean

demo: $(VENV)/installed
	$(BIN)/fastrex train demo

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -q

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the build of the package imports it (csrc/ is compiled against the torch that runs it).
$(VENV)/installed: setup.py pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt setuptools wheel torch numpy
	$(PIP) -c constraints.txt --no-build-isolation -e '.[train]'
	touch $@

# torchvision and timm serve comparisons only. Without their dependencies: torchvision would exchange torch for another build.
$(VENV)/dev: $(VENV)/installed
	$(PIP) -c constraints.txt --no-build-isolation -e '.[train,dev]'
	$(PIP) -c constraints.txt --no-deps torchvision timm
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
