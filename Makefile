# `make demo` and `make test` set up everything they need: a virtual environment in .venv, pinned dependencies, the
# native build. PYTHON chooses the interpreter, VENV the place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test quick check lint docs bench sanitize clean

demo: $(VENV)/built-run
	$(BIN)/python -m fastadv demo --out demo_run

# Whole files go to a worker, as their tests share what they have trained. WORKERS=0 runs everything in one process.
# Bytecode is kept even where the environment forbids it: hundreds of processes would compile all modules anew.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/built-dev
	$(PYTEST)

quick: $(VENV)/built-dev
	$(PYTEST) --quick

check: lint quick

lint: $(VENV)/built-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Warnings are errors. Needs Python >= 3.11.
docs: $(VENV)/built-docs
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q docs build/docs
	@echo "open build/docs/index.html"

bench: $(VENV)/built-bench
	$(BIN)/python bench/throughput.py

# See docs/testing.md.
sanitize: $(VENV)/built-dev
	tests/sanitizers/run.sh address
	tests/sanitizers/run.sh thread

# One stamp per group of dependencies; each is renewed when pyproject.toml or the native code changes.
$(VENV)/built-run $(VENV)/built-dev: $(VENV)/built-%: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --group $*
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/built-docs: $(VENV)/built-dev
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

# The two attack libraries of the comparison declare dependencies that would replace torch; what they import is here.
$(VENV)/built-bench: $(VENV)/built-dev
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m pip install --quiet --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy==0.30.0
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastadv needs Python >= 3.10; $(PYTHON) is older. Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

clean:
	rm -rf build $(VENV) demo_run
