# Two commands do everything: `make quickstart` and `make test`. Both make .venv first and are quick when nothing changed.
#   PYTHON=python3.12 make test     another Python (3.11 to 3.13); `make clean` first when .venv exists already
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# setuptools warns of the folder mapping, which is meant (PYTHONSAFEPATH below).
PIP := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install -q --disable-pip-version-check
FOLDERS := vchitect_fast autotune profiling curation benchmarks
LINTED := $(FOLDERS) $(wildcard examples) tests setup.py
INPUTS := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)
# Away from the repository's root: the folder profiling/ must not hide Python 3.15's own package of that name.
export PYTHONSAFEPATH := 1

.PHONY: quickstart test soak gpu lint ctest mypy clean help

help:
	@echo "make quickstart   install into .venv, then real videos to a plan, a training run, a sample and a report"
	@echo "make test         what CI runs: C++ tests, linters, types, all Python tests, coverage of vchitect_fast"
	@echo "make soak         the long runs: 40 kills leave no trace, what torchrun starts, the quickstart learns every clip (fifteen minutes), 20,000 random offload steps"
	@echo "make gpu          all that only a GPU can show: tests, goals, planner, profile, in stages, about twelve minutes; tables at the end"
	@echo "make lint         linters and types only"
	@echo "make clean        remove .venv, build and caches (runs/ stays)"

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo "expected Python 3.11 to 3.13 as $(PYTHON), got $$($(PYTHON) --version 2>/dev/null || echo none); name another with PYTHON=python3.12 make ..." >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
	  { echo "expected a C++17 compiler as $${CXX:-c++}, found none; install one (Debian, Ubuntu: apt install g++)." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { echo "expected $(PYTHON) to make a virtual environment, it did not; install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "== .venv: the build tools"
	@$(PIP) --upgrade pip 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' wheel
	@touch $@

.venv/quickstart: .venv/made $(INPUTS)
	@echo "== .venv: vchitect-fast and what the quickstart needs (the first time: torch with CUDA, several GB to download)"
	@$(PIP) --no-build-isolation -e '.[quickstart]'
	@touch $@

.venv/dev: .venv/quickstart
	@echo "== .venv: what the tests need besides"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

quickstart: .venv/quickstart
	@echo "== quickstart: real videos to a plan, a training run, a sample and a report (at most 8 minutes on two cores)"
	@$(BIN)/vchitect-fast quickstart
	@echo "== done: open runs/quickstart/report.html"

ctest: .venv/dev
	@echo "== C++ tests"
	@mkdir -p build
	@$(BIN)/cmake -S . -B build/ctest -DCMAKE_BUILD_TYPE=Release > build/ctest.log 2>&1 || { cat build/ctest.log; exit 1; }
	@$(BIN)/cmake --build build/ctest --parallel > build/ctest.log 2>&1 || { cat build/ctest.log; exit 1; }
	@$(BIN)/ctest --test-dir build/ctest --output-on-failure

# mypy does not see setup.py's folder mapping, so it gets a tree of links that looks like the installed package.
mypy: .venv/dev
	@echo "== mypy"
	@rm -rf build/types && mkdir -p build/types/vchitect_fast
	@cd build/types/vchitect_fast && ln -s ../../../vchitect_fast/* . && ln -s $(filter-out ../../../vchitect_fast,$(FOLDERS:%=../../../%)) .
	@cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p vchitect_fast

lint: mypy
	@echo "== ruff, clang-format"
	@$(BIN)/ruff check $(LINTED)
	@$(BIN)/ruff format --check $(LINTED)
	@$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.cu csrc/tests/*

# Coverage is of vchitect_fast itself; the tests of the folders beside it run without, in two thirds of the time.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10
BESIDE := $(filter-out tests/vchitect_fast,$(FOLDERS:%=tests/%))
test: ctest lint
	@echo "== Python tests of vchitect_fast"
	@$(PYTEST) $(BESIDE:%=--ignore=%) --cov=vchitect_fast --cov-report= tests
	@echo "== Python tests of $(filter-out vchitect_fast,$(FOLDERS))"
	@$(PYTEST) $(BESIDE)
	@$(BIN)/coverage report --skip-covered
	@$(BIN)/coverage report --fail-under=85 --format=total > build/line-rate.txt || \
	  { echo "line coverage of vchitect_fast is $$(cat build/line-rate.txt) %, expected at least 85 %." >&2; exit 1; }
	@echo "== all passed: C++ tests, linters, types, Python tests; line coverage of vchitect_fast $$(cat build/line-rate.txt) %"

soak: .venv/dev
	@$(BIN)/pytest -q -m soak tests

# Its first stage builds the CUDA copier. Without .venv: the top of benchmarks/gpu.py. make gpu GPU='--minutes 5 --only block'
gpu: .venv/dev
	@$(BIN)/python -P -m vchitect_fast.benchmarks.gpu $(GPU)

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache *.egg-info vchitect_fast/_C.*.so
