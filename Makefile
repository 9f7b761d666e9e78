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

# Two sets of servers beside each other, a core each; everything else follows the shorter set, whose output is printed at the end.
SERVERS := tests/serving
FIRST := $(patsubst %,$(SERVERS)/test_%.py,attention_policy quality stock fold_values)

test: lint
	@export OMP_NUM_THREADS=1; \
	{ $(VENV) -m pytest $(FIRST); first=$$?; $(VENV) -m pytest --ignore=$(SERVERS) && exit $$first; } >build/tests.log 2>&1 & others=$$!; \
	$(VENV) -m pytest $(SERVERS) $(addprefix --ignore=,$(FIRST)); servers=$$?; \
	wait $$others; others=$$?; cat build/tests.log; exit $$((servers || others))
