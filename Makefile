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

.PHONY: demo test lint docs linkcheck outputs bench clean

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

# Every command that prints figures of the README and of docs/, with how long it takes.
bench: $(VENV)/.installed
	$(VENV)/bin/python bench/all.py

$(VENV)/.installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -c constraints.txt '.[demo,test]'
	touch $@

clean:
	rm -rf build $(VENV) pysolve/_core*.so
