# Two commands: `make quickstart` watches a small model learn, `make test` checks the tree. Each installs what it needs.
#
# PyPI's torch for Linux is the CUDA build: it works on a CPU but is large. For the small CPU build give PyTorch's own
# CPU index:  make quickstart TORCH_INDEX=<url>

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart-$(shell date +%m%d-%H%M%S)

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/rlpost train recipes/quickstart.toml run_dir=$(RUN_DIR)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.installed: pyproject.toml requirements/build.txt requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install -q -r requirements/build.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -r requirements/cpu.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
