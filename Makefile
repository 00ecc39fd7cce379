# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer and a C++ compiler.
# Without make, the plain commands behind them:
#
#     python3 -m venv .venv
#     .venv/bin/pip install -c constraints.txt '.[demo,test]'
#     .venv/bin/pysolve demo              (make demo)
#     .venv/bin/python -m pytest -n 2     (make test; `-m ''` runs the slow ones as well)
#     .venv/bin/python -m pysolve.testing (make fuzz: hostile problems for the solvers, for SECONDS=60)

PYTHON ?= python3
VENV ?= .venv
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc pysolve -name '*.[chp]*' -not -name '*.pyc')

.PHONY: demo test lint fuzz clean

# How long `make fuzz` goes on.
SECONDS ?= 60

demo: $(VENV)/.installed
	$(VENV)/bin/pysolve demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n 2

fuzz: $(VENV)/.installed
	$(VENV)/bin/python -m pysolve.testing --seconds $(SECONDS)

lint: $(VENV)/.installed
	$(VENV)/bin/pip install -q -c constraints.txt '.[dev]'
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt '.[demo,test]'
	touch $@

clean:
	rm -rf build $(VENV) pysolve/_core*.so
