# The tasks for a clone of udptun. `make` alone lists the targets. A recipe of more than a few lines is
# a script in scripts/.

PYTHON ?= python3
ifeq ($(origin CC),default)
CC := gcc
endif
CFLAGS ?= -O2
ARGS ?=

# A Python named on the command line has a virtual environment of its own, e.g. .venv-3.12.
VENV = .venv
ifneq ($(PYTHON),python3)
VENV = .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
PY = $(VENV)/bin/python
# The ending of extension modules, e.g. .cpython-312-x86_64-linux-gnu.so: each Python has its own.
SUFFIX := $(shell $(or $(wildcard $(PY)),$(PYTHON)) -c \
  'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
EXTENSION_SOURCES := setup.py udptun/drops.py udptun/model.py \
  $(filter-out %.c src_ext/drops.pxd src_ext/limits.pxd,$(wildcard src_ext/*.* src_ext/*/*.*))
STEPS_SOURCES := $(wildcard tests/steps/build.py tests/steps/*.p*)
BUILT := $(wildcard udptun/_core$(SUFFIX))
# Some tools are in directories that a user's PATH may not contain. CNI plugins are in the last one.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/cni
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export DEBIAN_FRONTEND := noninteractive

DEMO_TOOLS := ip:iproute2 ping:iputils-ping iperf3:iperf3 nft:nftables ethtool:ethtool \
  sysctl:procps
E2E_TOOLS := go:golang-go buildah:buildah nsenter:util-linux etcd:etcd-server \
  containerd:containerd runc:runc openssl:openssl nft:nftables ip:iproute2 iptables:iptables \
  busybox:busybox-static portmap:containernetworking-plugins
TEST_TOOLS := $(DEMO_TOOLS) tcpdump:tcpdump traceroute:traceroute etcd:etcd-server clang:clang \
  host-local:containernetworking-plugins

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo demo-etcd test test-all test-kernels soak chaos e2e package wheels bundle deb image lock bench bench-full bench-micro bench-instructions express sanitize fuzz fuzz-planted lint docs clean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9\/-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(VENV)/extension.stamp ## create .venv with udptun in it (.venv/bin/udptun)

demo: build ## show two hosts, a tunnel between them, pings and TCP; root
	@scripts/need $(DEMO_TOOLS)
	@$(VENV)/bin/udptun demo $(ARGS)

demo-etcd: build ## show a cluster: etcd, nodes that join and leave, pods; root
	@scripts/need $(DEMO_TOOLS) etcd:etcd-server
	@$(PY) -m udptun.lab.demo_etcd $(ARGS)

test: build $(VENV)/steps.stamp $(VENV)/test.stamp $(VENV)/dev.stamp $(VENV)/docs.stamp bench/onepacket ## run what CI runs, 10 minutes; with ARGS: only pytest ARGS
	@scripts/need --optional $(TEST_TOOLS)
	@scripts/test $(PY) $(ARGS)

test-all: build $(VENV)/steps.stamp $(VENV)/test.stamp $(VENV)/dev.stamp $(VENV)/docs.stamp ## run every test: all Pythons, slow tests, sanitizers, soak
	@scripts/need --optional chromium:chromium
	@MAKE=$(MAKE) PYTHON=$(PYTHON) scripts/test-all

KERNEL_TOOLS := $(DEMO_TOOLS) qemu-system-x86_64:qemu-system-x86 busybox:busybox-static \
  depmod:kmod dpkg-deb:dpkg
test-kernels: build $(VENV)/steps.stamp $(VENV)/test.stamp bench/onepacket ## run tests on other kernels, in QEMU; root
	@scripts/need $(KERNEL_TOOLS)
	@$(PY) -m tests.kernels $(ARGS)

SOAK_SECONDS ?= 600
soak: build $(VENV)/test.stamp ## load, take-overs, kills, outages, floods at once, for SOAK_SECONDS, 600; root
	@scripts/need $(DEMO_TOOLS) etcd:etcd-server
	@$(PY) -m tests.soak --seconds $(SOAK_SECONDS) $(ARGS)

chaos: build ## disturb a cluster of five nodes for ten minutes, at random; root
	@scripts/need $(DEMO_TOOLS) etcd:etcd-server iptables:iptables
	@$(PY) -m tests.chaos $(ARGS)

e2e: $(VENV)/test.stamp ## run a whole Kubernetes cluster with our image; root; slow the first time
	@scripts/need $(E2E_TOOLS)
	@$(MAKE) --no-print-directory image ARGS=
	@$(PY) -m tests.e2e $(ARGS)

express: ## compile the programs of the express path; the result is committed
	@scripts/need clang:clang
	@scripts/express udptun/forwarder/express.bpf.o

SANITIZE_TESTS = tests/wire tests/table tests/path
THREAD_TESTS = tests/path/test_worker_threads.py
sanitize: build $(VENV)/test.stamp ## run the core's tests under AddressSanitizer, UBSan and TSan
	@scripts/sanitize address $(PY) $(SANITIZE_TESTS) $(ARGS)
	@scripts/sanitize thread $(PY) $(THREAD_TESTS)

FUZZ_SECONDS ?= 120
fuzz: build $(VENV)/steps.stamp $(VENV)/test.stamp $(VENV)/fuzz.stamp ## fuzz the core and all parsers for FUZZ_SECONDS, 120
	@scripts/need clang:clang
	@$(PY) -m tests.fuzz run --seconds $(FUZZ_SECONDS) $(ARGS)

fuzz-planted: build $(VENV)/steps.stamp $(VENV)/test.stamp $(VENV)/fuzz.stamp ## show that each fuzz harness finds a planted bug
	@scripts/need clang:clang
	@$(PY) -m tests.fuzz planted $(ARGS)

lint: build $(VENV)/test.stamp $(VENV)/dev.stamp ## check style and types, and that the fuzz harnesses fit the source
	@scripts/lint $(PY)

docs: build $(VENV)/docs.stamp ## build the documentation site, build/docs/index.html
	@$(PY) scripts/docsite.py $(ARGS)

package: build ## build sdist and wheel, check their contents
	@$(PY) scripts/check_package.py

wheels: build $(VENV)/package.stamp $(VENV)/cross.stamp ## build the sdist and the wheels of a release into dist/, each twice
	@$(PY) scripts/wheels.py --twice $(ARGS)

# a compiler for the other CPU, if ARGS names it
CROSS = $(if $(filter %aarch64,$(ARGS)),$(VENV)/cross.stamp)
bundle: build $(VENV)/package.stamp $(CROSS) ## build dist/udptun-VERSION-CPU.run, which installs udptun offline
	@$(PY) scripts/bundle.py $(ARGS)

deb: build $(VENV)/package.stamp $(CROSS) ## build a Debian package of the same files, for Debian 12
	@$(PY) scripts/deb.py $(ARGS)

image: build $(VENV)/package.stamp ## build the container image without an engine, for ctr images import; root
	@scripts/need buildah:buildah debootstrap:debootstrap
	@$(PY) scripts/image.py $(ARGS)

lock: build ## update the packages in bundles and images: deploy/bundle.lock
	@$(PY) scripts/lock.py

BENCH_PROGRAMS := bench/onepacket bench/udpload bench/copylimit bench/icmpflood

bench: build $(VENV)/steps.stamp $(VENV)/bench.stamp $(BENCH_PROGRAMS) ## compare with other tunnels: TCP, round trips; 8 minutes, root
	@scripts/need $(DEMO_TOOLS)
	@$(PY) -m bench quick $(ARGS)

bench-full: build $(VENV)/steps.stamp $(VENV)/bench.stamp $(BENCH_PROGRAMS) ## run all comparisons; about an hour, at most 88 minutes, root
	@scripts/need $(DEMO_TOOLS)
	@$(PY) -m bench full $(ARGS)

bench-micro: build $(VENV)/steps.stamp $(VENV)/test.stamp ## time single steps of the core, compare with the saved times
	@$(PY) -m pytest bench/micro --benchmark-enable --benchmark-only \
	  --benchmark-storage=bench/baselines --benchmark-compare='*/0001' \
	  -W default::pytest_benchmark.logger.PytestBenchmarkWarning \
	  --benchmark-columns=min,median,rounds $(ARGS)

bench-instructions: build $(VENV)/steps.stamp $(VENV)/test.stamp ## count the core's instructions, compare with the saved count
	@scripts/need valgrind:valgrind
	@$(PY) -m bench instructions --check bench/baselines/instructions.json $(ARGS)

$(BENCH_PROGRAMS): %: %.c
	@$(CC) $(CFLAGS) -Wall -Wextra -o $@ $<

clean: ## remove everything that the other targets made
	@rm -rf .venv .venv-* build dist *.egg-info udptun/*.so src_ext/*.c src_ext/drops.pxd src_ext/limits.pxd tests/steps/*.so tests/steps/*.c $(BENCH_PROGRAMS)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find udptun tests bench -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/made.stamp:
	@CC=$(CC) scripts/make-venv $(PYTHON) $(VENV)
	@touch $@

$(VENV)/installed.stamp: pyproject.toml $(VENV)/made.stamp
	@echo "installing the build tools and the dependencies"
	@scripts/install-requirements $(PY) build run etcd kube
	@echo "compiling the extension, installing udptun"
	@$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# Recompile if a source has changed or if the compiled file is missing. Do not recompile if no source
# is newer than the installation, because the installation has compiled the extension.
$(VENV)/extension.stamp: $(VENV)/installed.stamp $(EXTENSION_SOURCES) $(if $(BUILT),,FORCE)
	@if [ ! -e udptun/_core$(SUFFIX) ] || \
	  [ -n "$$(find $(EXTENSION_SOURCES) -newer $(VENV)/installed.stamp)" ]; then \
	  echo "compiling the extension"; $(PY) setup.py -q build_ext --inplace; \
	fi
	@touch $@

# The compiled steps alone, for tests and benchmarks.
$(VENV)/steps.stamp: $(VENV)/extension.stamp $(STEPS_SOURCES)
	@$(PY) tests/steps/build.py
	@touch $@

$(VENV)/%.stamp: pyproject.toml $(VENV)/made.stamp
	@echo "installing the packages of the $* targets"
	@scripts/install-requirements $(PY) $*
	@touch $@
