# Every target makes what it needs, its own .venv included.
.DEFAULT_GOAL := help
VENV ?= .venv
PY := $(VENV)/bin/python
# What an archive needs: the environment, or that of PY=... on the command line, which is left as it is.
MADE := $(if $(findstring command,$(origin PY)),,$(VENV)/.installed)
IMAGE ?=
ARCHS ?= 90a,100a
PYTEST := HF_HUB_OFFLINE=1 $(PY) -m pytest
# Tests of one file stay together: they share what they build, and servers.
SIDE_BY_SIDE := --dist loadfile -n logical --maxprocesses 8
TWO_SERVERS := --dist loadfile -n 2
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help build demo check test test-all test-fast test-emulated test-server test-load test-browser test-gpu sanitize lint format sdist wheel bench clean distclean check-latency test-multinode test-compat

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: sglang_macs/releases.py requirements/cpu.txt requirements/dev.txt scripts/setup_env.sh
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
	@$(PY) -m scripts.demo $(if $(IMAGE),--image "$(IMAGE)")

check: lint  ## before a commit: lint, types, tests of units, and one real server (4 minutes on two cores)
	@$(PYTEST) $(SIDE_BY_SIDE) -m "smoke or not (gpu or server or emulated or nightly)"

test: test-fast  ## what CI runs: the kernels on an emulated machine and real servers too (16 minutes on two cores)
	@$(PYTEST) $(TWO_SERVERS) -m "server and not (multinode or nightly)"

test-all: build  ## every night: and more families of models, layouts of ranks and shapes of kernels
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not (gpu or server)"
	@MACS_TEST_START=spawn $(PYTEST) $(TWO_SERVERS) -m "server and not multinode"

test-fast: build  ## of `make test` what starts no server
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not (gpu or server or nightly)"

test-emulated: build  ## the CUDA kernels on an emulated machine, all shapes: no GPU needed, data races are found
	@$(PYTEST) $(SIDE_BY_SIDE) -m emulated

test-server: build  ## of `make test-all` what starts a real server
	@MACS_TEST_START=spawn $(PYTEST) $(TWO_SERVERS) -m "server and not multinode"

test-load: build  ## 500 mixed requests, three times, and faults, on the real server (minutes)
	@$(PY) -m benchmarks.run load_test

test-browser: build  ## the report in a real browser (needs Chromium: apt-get install chromium)
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "no Chromium: apt-get install chromium"; exit 1; }
	@$(PYTEST) tests/test_report.py

test-gpu: build  ## the operators on a CUDA device (without one every test fails)
	@$(PYTEST) -m gpu

sanitize: build  ## compute-sanitizer's memcheck and racecheck over the CUDA kernels
	@bash tools/sanitize.sh $(PY)

lint: build  ## ruff, mypy, hadolint, and the checks of the tables in README and docs
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/hadolint deploy/kubernetes/Dockerfile
	@$(PY) -m tools.docs_tables --check

format: build  ## ruff format, and the tables in README and docs
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .
	@$(PY) -m tools.docs_tables

sdist: $(MADE)  ## dist/: the source archive, from which `pip wheel` and the Dockerfile build
	@rm -rf dist
	@$(PY) setup.py -q sdist

wheel: sdist  ## dist/: a wheel from it, for the GPUs of ARCHS (90a,100a) where there is nvcc and torch for CUDA, else for CPUs
	@MACS_CUDA_ARCH=$(ARCHS) $(PY) -m pip wheel --quiet --no-build-isolation --no-deps -w dist dist/*.tar.gz
	@ls dist

bench: build  ## the plan on this CPU against a vectorised torch version
	@$(PY) -m benchmarks.run bench_plan

clean:  ## build products
	@rm -rf build dist *.egg-info sglang_macs/_C*.so $(VENV)/.built

distclean: clean  ## and the environment
	@rm -rf $(VENV)

check-latency: build  ## is the plan or the CPU dispatch slower than this hardware's baseline? (exit 2: cannot be said)
	@$(PY) -m benchmarks.run check_latency

test-multinode: build  ## one server over two network namespaces, a cable cut (root; minutes)
	@$(PYTEST) -m multinode

test-compat: build  ## hooks, launches, servers and families against other releases of SGLang (600 MB on disk; an hour)
	@$(PY) -m scripts.check_compat
	@$(PY) -m scripts.check_compat 0.5.20 --stages refused
