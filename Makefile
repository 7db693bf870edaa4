# Two commands for users, `make demo` and `make test`; each makes the virtual environment .venv first.
#   make bench     our figures beside their floors, as ratios of one run
#   make check     style, types and the C tests; SANITIZE=address|undefined|thread for the C tests under a sanitizer
#   make stress    the long ones: millions of races, every call failing once, hours of Hypothesis if asked
#   make models    the protocols in spin (Debian package spin)
#   make xen       the conformance list of the grant devices on a real Xen with three domains, under QEMU: lab/xen/README.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SANITIZE ?=
C_SOURCES := $(wildcard $(addprefix libusermm/,src/* python/* preload/* include/*.h include/linux/* man/* *.map *.in))

demo: $(VENV)/.built
	$(BIN)/usermm demo

test: $(VENV)/.built
	$(MAKE) -s -C libusermm check
	$(BIN)/pytest -q

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

check: $(VENV)/.built
ifeq ($(SANITIZE),)
	$(BIN)/ruff check src tests benchmarks examples setup.py
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard libusermm/*/*.[ch] libusermm/include/linux/*.h examples/*/*.[ch])
	$(MAKE) -s -C libusermm check
else
	$(MAKE) -s -C libusermm check SANITIZE=$(SANITIZE)
endif

stress: $(VENV)/.built
	$(MAKE) -s -C libusermm faults
	$(MAKE) -s -C libusermm stress
	USERMM_STRESS=1 $(BIN)/pytest -q tests/property tests/stress

models:
	$(MAKE) -C docs/models

xen: $(VENV)/.built
	sh lab/xen/build.sh build/xen
	sh lab/xen/run.sh build/xen

build: $(VENV)/.built

# The environment first names what Debian must bring, since pip's own messages bury it.
$(VENV)/.made: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: python3 is missing: apt install python3"; exit 1; }
	@command -v gcc >/dev/null || { echo "make: gcc is missing: apt install gcc libc6-dev"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make: venv is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
		|| { echo "make: Python.h is missing: apt install python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "setuptools>=77" wheel
	@touch $@

$(VENV)/.built: $(VENV)/.made pyproject.toml setup.py $(C_SOURCES)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[test,check]"
	@touch $@

clean:
	$(MAKE) -C libusermm clean
	rm -rf build dist $(VENV) src/usermm/*.so src/usermm/lib src/usermm/include src/usermm/share src/*.egg-info

.PHONY: demo test bench check stress models xen build clean
