# Everything happens in tools/setup.py, which looks at what is installed and does only what is missing.
PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: help setup demo test lint

help:
	@echo "make demo   set up, then replay the agent workload against stock bf16 and --kv-quant oscar"
	@echo "make test   set up, then ruff and the whole test suite"
	@echo "make setup  set up only: .venv, stock SGLang for the CPU, the embedded model"

setup:
	@$(PYTHON) tools/setup.py

demo: setup
	@$(VENV) -m benchmarks.demo

lint: setup
	@$(VENV) -m ruff check .

test: lint
	@OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist loadgroup  # servers have threads of their own
