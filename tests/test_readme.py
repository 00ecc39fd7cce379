"""What the pages show must run, and what they name must exist."""

import functools
import operator
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from families import opened_here

import pysolve as ps
from pysolve.methods import goal, layout, menu, price, rebuild, result, studied, study
from pysolve.methods import weights as of_weights
from pysolve.methods.kinds import codes

ROOT = Path(__file__).parent.parent
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = PYTHON.findall(README + PAGES["docs/guide.md"])
FENCED = re.compile(r"```.*?```", re.DOTALL)
ROOMS = "methods|nn|solve|layer|report|training|cli|csrc|pysolve|bench|examples|tests"
FILES = re.compile(rf"\b(?:{ROOMS})/[\w/.]*\.(?:py|cpp|hpp|pyi)\b")


@pytest.mark.parametrize("code", BLOCKS)
def test_its_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # That a fresh process opens folders is tested in tests/nn/files/test_pretrained.py.
    monkeypatch.setattr("pysolve.nn.files.reopening._run", opened_here)
    exec(compile(code, "an example of the docs", "exec"), {"__name__": "example"})


def test_its_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in (
        "venv .venv",
        "pip install -c constraints.txt '.[demo,test]'",
        "pysolve demo",
        "-m pytest",
    ):
        assert command in README
        assert command in makefile.replace("$(VENV)", ".venv")


@pytest.mark.parametrize("name", PAGES)
def test_pictures_and_pages_that_are_linked_exist(name):
    for link in re.findall(r"\]\((?!http|#)(.*?)(?:#.*?)?\)", FENCED.sub("", PAGES[name])):
        assert (ROOT / name).parent.joinpath(link).is_file(), link


@pytest.mark.parametrize("name", PAGES)
def test_names_and_files_that_are_mentioned_exist(name):
    text = PAGES[name]
    for mentioned in re.findall(r"\bps\.(\w+)", text):
        assert mentioned in ps.__all__
    for module, mentioned in re.findall(r"`(pysolve(?:\.\w+)*)\.(\w+)", text):
        try:
            assert hasattr(import_module(module), mentioned)
        except AttributeError:
            import_module(f"{module}.{mentioned}")
    for path in FILES.findall(FENCED.sub("", text)):
        assert (ROOT / path).exists() or (ROOT / "pysolve" / path).exists(), path


def test_every_name_of_the_contents_page_imports():
    assert {"accuracy", "fit", "page", "digits", "mnist", "cifar"} <= {*ps.__all__}
    for name in ps.__all__:
        assert not isinstance(getattr(ps, name), ModuleType), name


def shown(path):
    """The example of ``docs/architecture.md`` for a file."""
    return next(code for code in PYTHON.findall(ARCHITECTURE) if code.startswith(f"# {path}"))


def test_the_selector_of_the_architecture_page_selects():
    names = dict(vars(import_module("pysolve.solve.selection")))
    exec(shown("pysolve/solve/selection.py"), names)
    x = np.random.default_rng(0).standard_normal((200, 6))
    y = x[:, [1, 4]] @ np.ones((2, 3))
    problem = names["Problem"]([x.T @ x / 200], [y.T @ x / 200], 1, np.ones(6))
    assert sorted(names["_contribution"](problem, 2, "auto")) == [1, 4]


def test_the_kind_of_the_architecture_page_goes_through_the_pipeline():
    names = {"partial": functools.partial, "reduce": functools.reduce, "or_": operator.or_}
    for module in (codes, goal, layout, menu, price, rebuild, result, study, studied, of_weights):
        names |= {key: value for key, value in vars(module).items() if not isinstance(value, ModuleType)}
    names["np"] = np
    exec(shown("pysolve/methods/kinds/powers.py"), names)
    exec(shown("pysolve/methods/powers_of_two.py"), names)
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
    model, batches = torch.nn.Sequential(*layers).eval(), [torch.randn(100, 8) for _ in range(4)]
    found = names["powers_of_two"](model, batches, divergence=1.0)
    weights = found.model[0].weight.detach().numpy()
    powers = np.log2(np.abs(weights[weights != 0]))
    assert np.array_equal(powers, np.rint(powers))
    assert found.report.divergence < 0.1


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pysolve; assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
