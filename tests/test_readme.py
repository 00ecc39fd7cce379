"""What the pages show must run, and what they name must exist."""

import functools
import operator
import re
import socket
import subprocess
import sys
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from families import opened_here
from outputs import alike, current

import pysolve as ps
from pysolve.methods import goal, layout, menu, price, rebuild, result, studied, study
from pysolve.methods import weights as of_weights
from pysolve.methods.kinds import codes

ROOT = Path(__file__).parent.parent
FILES = ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = PYTHON.findall(README + PAGES["docs/guide.md"] + PAGES["docs/index.md"])
FENCED = re.compile(r"```.*?```", re.DOTALL)
ROOMS = "methods|nn|solve|layer|report|training|cli|csrc|pysolve|bench|examples|tests"
MENTIONED = re.compile(rf"\b(?:{ROOMS})/[\w/.]*\.(?:py|cpp|hpp|pyi)\b")


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS)
def test_its_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # That a fresh process opens folders is tested in tests/nn/files/test_pretrained.py.
    monkeypatch.setattr("pysolve.nn.pretrained.reopening._run", opened_here)
    exec(compile(code, "an example of the docs", "exec"), {"__name__": "example"})


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells a process that is alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [pytest.param("docs/plots.md", marks=pytest.mark.slow), "docs/scale.md"])
@pytest.mark.usefixtures("one_process")
def test_examples_that_go_on_from_a_network_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    widths = {"fc1": (16, 128), "fc2": (128, 64), "fc3": (64, 4)}
    layers = OrderedDict()
    for name, width in widths.items():
        layers |= {name: torch.nn.Linear(*width), f"{name}-relu": torch.nn.ReLU()}
    batches = [torch.randn(100, 16) for _ in range(8)]
    names = {"ps": ps, "dist": torch.distributed, "batches": batches, "loader_of_this_rank": batches}
    names |= {"model": torch.nn.Sequential(layers).eval()}
    names |= {"evaluate": lambda network: network(batches[0]).mean().item(), "retrain": lambda network: None}
    for code in PYTHON.findall(PAGES[page]):
        exec(compile(code, page, "exec"), names)


@pytest.mark.slow
def test_the_guide_shows_what_its_commands_print(tmp_path):
    pasted = PAGES["docs/guide.md"]
    printed = current(pasted, tmp_path)
    assert printed.splitlines() == pasted.splitlines(), (
        "`make outputs` writes them anew; see what is said of them"
    )


@pytest.mark.parametrize(
    ("pasted", "printed", "same"),
    [
        ("bytes on disk  25,876 12.1%", "bytes on disk  18,819  8.8%", False),
        ("parameters  5,285", "parameters 5,301", True),
        ("latency 0.07 ms (0.07 … 0.08)  81.7%", "latency 10.07 ms (9.1 … 12)  40.2%", True),
        ("divergence 7.537e-05", "divergence 0.0001", True),
        ("0 → 4  32", "0 → 6  32", False),
        ("Wrote a.json to small/", "Wrote a.json to swept/", False),
    ],
)
def test_outputs_are_compared_beyond_times_and_roundings(pasted, printed, same):
    assert alike(pasted, printed) is same


def test_every_command_that_prints_figures_is_listed():
    listed = (ROOT / "bench/all.py").read_text()
    for page in PAGES.values():
        for script in re.findall(r"`python ((?:bench|examples)/\w+\.py(?: [a-z]\w*)?)", page):
            assert f'"{script}' in listed, script


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
    for module, mentioned in re.findall(r"`(pysolve(?:\.\w+)*)\.(?!(?:json|lock)\b)(\w+)", text):
        try:
            assert hasattr(import_module(module), mentioned)
        except AttributeError:
            import_module(f"{module}.{mentioned}")
    for path in MENTIONED.findall(FENCED.sub("", text)):
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


def test_the_citation_has_the_version_and_the_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {ps.__version__}\n" in citation
    assert "\nlicense: MIT\n" in citation
