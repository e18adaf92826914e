# What a newcomer and a developer type. Each target first installs what it needs into .venv, once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs wheel aot sanitize counts bench clean

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
RUN := $(VENV)/bin/python
BUILD := setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh)

# The pins hold for the package and for what builds it (pip < 25.3 reads the first for both). For the installation alone: the tests run pip
# in other folders, where this relative path means nothing, and pip would split an absolute one at a blank.
PINS := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1

define install
	@start=$$SECONDS; echo "installing ttcfast$(1) into $(VENV) (once)"; \
	test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { echo "make: '$(PYTHON) -m venv' failed; install your system's python3-venv package" >&2; exit 1; }; \
	$(PINS) $(RUN) -m pip install -qq -e '.$(1)'; \
	touch $@; echo "installation took $$((SECONDS - start)) s"
endef

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo '  ARGS="..." is handed on, for example: make test ARGS="tests/ops -x", make demo ARGS="out=/tmp/demo"'

demo: $(VENV)/.installed-demo ## install, roll out the shipped model with and without test-time compute, print one table, draw the figures
	@start=$$SECONDS; $(RUN) -m ttcfast.cli.demo $(ARGS); echo "the demo took $$((SECONDS - start)) s"

test: $(VENV)/.installed-test ## the test suite, in two processes (JOBS=4 for more; ARGS="-m slow" for the long tests)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-lint ## ruff, mypy, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.installed-lint ## let ruff and clang-format rewrite the sources
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

docs: $(VENV)/.installed-docs ## the site, in site/: runs the gallery (once), then mkdocs, strictly (ARGS="serve" to write with a preview)
	OMP_NUM_THREADS=1 $(RUN) docs/gallery/build.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs $(or $(ARGS),build --strict)

wheel: $(VENV)/.installed-test ## the sdist, and a wheel for every Linux of this processor and glibc, in dist/
	rm -rf build/wheel
	$(RUN) -m build --no-isolation --outdir build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --only-plat -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist && ls dist

aot: $(VENV)/.installed-test ## compile every Triton kernel ahead of time for sm_80, sm_90 and sm_100, and check its limits
	$(RUN) -m bench.aot $(ARGS)

sanitize: $(VENV)/.installed-test ## tests/ops on an extension with sanitizers (ARGS=thread for races)
	VENV=$(VENV) bash .ci/sanitize $(ARGS)

counts: $(VENV)/.installed-test ## instructions of every operation under valgrind, against bench/counts.json (ARGS=--write renews it)
	$(RUN) -m bench.counts $(ARGS)

bench: $(VENV)/.installed-test ## write docs/benchmarks.md from bench/results (ARGS="arm" or ARGS=all measures first; ARGS="arm --quick" is a try)
	$(if $(ARGS),$(RUN) -m bench $(ARGS))
	$(RUN) -m bench.report

clean: ## remove what make made: .venv, builds, caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis ttcfast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-demo: $(BUILD)
	$(call install,)

$(VENV)/.installed-test: $(BUILD)
	$(call install,[test$(comma)gpu])

$(VENV)/.installed-docs: $(BUILD)
	$(call install,[docs])

$(VENV)/.installed-lint: $(BUILD)
	$(call install,[lint])

comma := ,
