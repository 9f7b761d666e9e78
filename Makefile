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
	@# Starting servers leaves a core idle for most of the time: the other tests run beside them, and are printed afterwards.
	@OMP_NUM_THREADS=1 $(VENV) -m pytest --ignore tests/serving >build/tests.log 2>&1 & others=$$!; \
	$(VENV) -m pytest tests/serving; servers=$$?; wait $$others; others=$$?; cat build/tests.log; exit $$((servers || others))
