# Every target makes what it needs, its own .venv included.
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
IMAGE ?=
PYTEST := HF_HUB_OFFLINE=1 $(PY) -m pytest
# Tests that start no server, side by side. A file's share what they build.
SIDE_BY_SIDE := -n logical --maxprocesses 8 --dist loadfile
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help build demo test test-all test-fast test-emulated test-server test-load test-browser test-gpu sanitize lint format bench clean distclean check-latency check-network test-multinode test-compat

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: requirements/cpu.txt requirements/dev.txt scripts/setup_env.sh
	@bash scripts/setup_env.sh $(VENV)
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "building csrc/ into sglang_macs/_C (about a minute)"
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable . 2>build.log \
		|| { tail -40 build.log; echo "build failed: see build.log"; exit 1; }
	@rm -f build.log
	@touch $@

build: $(VENV)/.built  ## environment in .venv and the extension

demo: build  ## the real server on two EP ranks, without and with MACS (IMAGE=path for your own picture)
	@$(PY) scripts/demo.py $(if $(IMAGE),--image "$(IMAGE)")

test: test-fast  ## everything that CI runs
	@$(PYTEST) -m "server and not multinode and not nightly"

test-all: test-fast test-server  ## and more families of models, and more layouts of ranks, on real servers

test-fast: build  ## without real servers
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu and not server"

test-emulated: build  ## the CUDA kernels on an emulated machine: no GPU needed, data races are found
	@$(PYTEST) tests/test_emulator.py tests/test_plan_emulated.py tests/test_fused_emulated.py tests/test_bounded_emulated.py tests/test_races_emulated.py

test-server: build  ## only the tests that start a real server
	@$(PYTEST) -m "server and not multinode"

test-load: build  ## 500 mixed requests, three times, and faults, on the real server (minutes)
	@$(PY) scripts/load_test.py

test-browser: build  ## the report in a real browser (needs Chromium: apt-get install chromium)
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "no Chromium: apt-get install chromium"; exit 1; }
	@$(PYTEST) tests/test_report.py

test-gpu: build  ## the operators on a CUDA device (without one every test fails)
	@$(PYTEST) -m gpu

sanitize: build  ## compute-sanitizer's memcheck and racecheck over the CUDA kernels
	@bash scripts/sanitize.sh $(PY)

lint: build  ## ruff, and the checks of the tables in README and docs
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(PY) scripts/docs_tables.py --check

format: build  ## ruff format, and the tables in README and docs
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .
	@$(PY) scripts/docs_tables.py

bench: build  ## the plan on this CPU against a vectorised torch version
	@$(PY) scripts/bench_plan.py

clean:  ## build products
	@rm -rf build dist *.egg-info sglang_macs/_C*.so $(VENV)/.built

distclean: clean  ## and the environment
	@rm -rf $(VENV)

check-latency: build  ## is the plan or the CPU dispatch slower than this hardware's baseline? (exit 2: cannot be said)
	@$(PY) scripts/check_latency.py

check-network: build  ## the fused dispatch compiles over NCCL's GIN (needs nvcc; fetches NCCL's headers)
	@PY=$(PY) bash scripts/check_network.sh

test-multinode: build  ## one server over two network namespaces, a cable cut (root; minutes)
	@$(PYTEST) -m multinode

test-compat: build  ## hooks, launches and servers against other releases of SGLang (600 MB on disk; a quarter of an hour)
	@$(PY) scripts/check_compat.py 0.5.23 0.5.22
	@$(PY) scripts/check_compat.py 0.5.20 --stages refused
