# Everything one does with a clone of udptun. `make` alone lists the targets.

PYTHON ?= python3
ifeq ($(origin CC),default)
CC := gcc
endif
CFLAGS ?= -O2
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
EXTENSION_SOURCES := setup.py udptun/drops.py \
  $(filter-out %.c src_ext/drops.pxd,$(wildcard src_ext/*.* src_ext/*/*.*))
STEPS_SOURCES := $(wildcard tests/steps/build.py tests/steps/*.p*)
BUILT := $(wildcard udptun/_core.*.so)
# Tools of administrators live in the sbin folders, which a user's PATH may leave out.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export DEBIAN_FRONTEND := noninteractive

DEMO_TOOLS := ip:iproute2 ping:iputils-ping iperf3:iperf3 nft:nftables ethtool:ethtool \
  sysctl:procps
TEST_TOOLS := $(DEMO_TOOLS) tcpdump:tcpdump traceroute:traceroute etcd:etcd-server

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo demo-etcd test soak bench bench-full bench-micro bench-instructions sanitize lint clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z\/-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(VENV)/extension.stamp ## make .venv with udptun in it (.venv/bin/udptun)

demo: build ## show it: two hosts, a tunnel, pings and TCP (as root)
	$(call need,$(DEMO_TOOLS),exit 1)
	@$(VENV)/bin/udptun demo $(ARGS)

demo-etcd: build ## show a cluster: etcd, nodes that join and leave, pods (as root)
	$(call need,$(DEMO_TOOLS) etcd:etcd-server,exit 1)
	@$(PY) -m udptun.lab.demo_etcd $(ARGS)

test: build $(VENV)/steps.stamp $(VENV)/test.stamp bench/onepacket ## run all tests, those in network namespaces as root
	$(call need,$(TEST_TOOLS),true)
	@$(PY) -m pytest $(ARGS)

soak: build $(VENV)/test.stamp ## ten minutes of full load with a route change every 10 ms (as root)
	@UDPTUN_SOAK_SECONDS=600 $(PY) -m pytest tests/netns/test_tunnel_life.py -k under_load -s $(ARGS)

SANITIZE_TESTS = tests/wire tests/table tests/path
sanitize: build $(VENV)/test.stamp ## run the core's tests under AddressSanitizer and UBSan
	@scripts/sanitize $(PY) $(SANITIZE_TESTS) $(ARGS)

lint: build $(VENV)/test.stamp $(VENV)/dev.stamp ## check style and types
	@$(VENV)/bin/ruff check udptun tests bench setup.py
	@$(VENV)/bin/mypy
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/cython-lint src_ext tests/steps

BENCH_PROGRAMS := bench/onepacket bench/udpload bench/copylimit

bench: build $(VENV)/steps.stamp $(VENV)/bench.stamp $(BENCH_PROGRAMS) ## compare it: TCP and round trips, 8 minutes (as root)
	$(call need,$(DEMO_TOOLS),exit 1)
	@$(PY) -m bench quick $(ARGS)

bench-full: build $(VENV)/steps.stamp $(VENV)/bench.stamp $(BENCH_PROGRAMS) ## compare all there is to compare, 60 minutes (as root)
	$(call need,$(DEMO_TOOLS),exit 1)
	@$(PY) -m bench full $(ARGS)

bench-micro: build $(VENV)/steps.stamp $(VENV)/test.stamp ## time the single steps of the core, beside the saved times
	@$(PY) -m pytest bench/micro --benchmark-enable --benchmark-only \
	  --benchmark-storage=bench/baselines --benchmark-compare='*/0001' \
	  -W default::pytest_benchmark.logger.PytestBenchmarkWarning \
	  --benchmark-columns=min,median,rounds $(ARGS)

bench-instructions: build $(VENV)/steps.stamp $(VENV)/test.stamp ## count the core's instructions, hold them to the last count
	$(call need,valgrind:valgrind,exit 1)
	@$(PY) -m bench instructions --check bench/baselines/instructions.json $(ARGS)

$(BENCH_PROGRAMS): %: %.c
	@$(CC) $(CFLAGS) -Wall -Wextra -o $@ $<

clean: ## remove all that was made here
	@rm -rf $(VENV) build dist *.egg-info udptun/*.so src_ext/*.c src_ext/drops.pxd tests/steps/*.so tests/steps/*.c $(BENCH_PROGRAMS)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find udptun tests bench -name __pycache__ -type d -exec rm -rf {} +

# Install Debian packages of the tools that are missing, as root; else say so, and $(2).
# $(1) holds tool:package pairs.
define need
@missing=""; \
for pair in $(1); do \
  command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair##*:}"; \
done; \
$(call install,$$missing,$(2))
endef

# The list of packages is only fetched when the one at hand does not have them.
define install
if [ -n "$(strip $(1))" ]; then \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "installing$(1)"; \
    apt-get install -y -qq $(1) >/dev/null 2>&1 || \
      { apt-get update -qq && apt-get install -y -qq $(1) >/dev/null; }; \
  else \
    echo "missing here; install with: apt-get install -y$(1)" >&2; $(2); \
  fi; \
fi
endef

# What pyproject.toml asks for under a key, one requirement a line.
requirements = $(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))$(1), sep="\n")'

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "udptun needs Python 3.11 or newer: make PYTHON=/path/to/it" >&2; exit 1; }
	@missing=""; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
	  2>/dev/null || missing="$$missing python3-dev"; \
	command -v $(CC) >/dev/null || missing="$$missing gcc libc6-dev"; \
	$(call install,$$missing,exit 1)
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed.stamp: pyproject.toml $(VENV)/made.stamp
	@echo "installing what udptun is built with and runs on"
	@$(call requirements,["build-system"]["requires"]) >$@.txt
	@$(call requirements,["project"]["dependencies"]) >>$@.txt
	@$(call requirements,["project"]["optional-dependencies"]["etcd"]) >>$@.txt
	@$(call requirements,["project"]["optional-dependencies"]["kube"]) >>$@.txt
	@$(PY) -m pip install -q -r $@.txt
	@echo "compiling the extension, installing udptun"
	@$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# Compiled anew when a source changed, or when somebody removed the result. The installation has
# just compiled it when no source is newer than that.
$(VENV)/extension.stamp: $(VENV)/installed.stamp $(EXTENSION_SOURCES) $(if $(BUILT),,FORCE)
	@if [ -z "$$(ls udptun/_core.*.so 2>/dev/null)" ] || \
	  [ -n "$$(find $(EXTENSION_SOURCES) -newer $(VENV)/installed.stamp)" ]; then \
	  echo "compiling the extension"; $(PY) setup.py -q build_ext --inplace; \
	fi
	@touch $@

# The compiled steps alone, for tests and benchmarks.
$(VENV)/steps.stamp: $(VENV)/extension.stamp $(STEPS_SOURCES)
	@$(PY) tests/steps/build.py
	@touch $@

$(VENV)/%.stamp: pyproject.toml $(VENV)/made.stamp
	@echo "installing what the $* targets take"
	@$(call requirements,["project"]["optional-dependencies"]["$*"]) >$@.txt
	@$(PY) -m pip install -q -r $@.txt
	@touch $@
