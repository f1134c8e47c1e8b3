# make demo   everything from set-up to demo/report.md
# make test   set-up, then all checks and tests
# make lint   the checks without the tests
# make matrix the tests that take no long training, with each of PYTHONS (default python3.10 python3.12)
# make clean  remove what the others made, except the environment (make distclean removes that too)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Threads and worker processes of nnU-Net: tests are small, and two cores are soon full.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive nnUNet_def_n_proc=1 nnUNet_compile=f

.DEFAULT_GOAL := help
.PHONY: help demo test lint matrix clean distclean

PYTHONS ?= python3.10 python3.12

help:
	@sed -n 's/^# make/make/p' Makefile

$(READY): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "python3 is older than 3.10: install a newer one and run make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev,solvers]'
	touch $@

demo: $(READY)
	$(BIN)/nnunet_diffusion demo --folder demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files in their own order: the long ones, in tests/nnunet, are not the last, so both workers end together.
test: lint
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

matrix:
	for python in $(PYTHONS); do \
		folder=.ci/cache/$$(basename $$python); \
		{ test -x $$folder/bin/pytest || $$python -m venv $$folder && \
		  $$folder/bin/python -m pip install -q -e '.[dev,solvers]' && \
		  $(TEST_ENVIRONMENT) $$folder/bin/python -m pytest -m "not slow"; } || exit 1; \
	done

clean:
	rm -rf demo build dist .ci/cache .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info
