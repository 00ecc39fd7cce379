"""The examples and benchmarks as modules, and images in place of real ones."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import Dataset

EXAMPLES, BENCH = (Path(__file__).parent.parent / name for name in ("examples", "bench"))


@contextmanager
def imported(*names: str) -> Iterator[dict]:
    """Modules of examples or benchmarks by their names, out of reach again afterwards."""
    before, path = set(sys.modules), [*sys.path]
    sys.path[:0] = map(str, (EXAMPLES, BENCH))
    yield {name: importlib.import_module(name) for name in names}
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent in (EXAMPLES, BENCH):
            del sys.modules[name]


def modules_of(*names: str) -> object:
    """A fixture: modules of examples or benchmarks by their names."""

    @pytest.fixture(scope="module")
    def modules() -> Iterator[dict]:
        with imported(*names) as found:
            yield found

    return modules


def one_of(name: str) -> object:
    """A fixture: one of the ``modules``."""

    @pytest.fixture(scope="module")
    def module(modules: dict) -> object:
        return modules[name]

    return module


def images_of(*size: int, **options: int) -> object:
    """A fixture: ``stand_in`` with these options, and one thread meanwhile."""

    @pytest.fixture(scope="module")
    def data() -> Iterator[Dataset]:
        with demo.threads(1):
            yield stand_in(*size, **options)

    return data


def stand_in(n: int = 60, side: int = 28) -> Dataset:
    """Images of ten classes that differ in where they are bright."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 10
    x = 0.3 * rng.standard_normal((n, 1, side, side)).astype(np.float32)
    height, width = side // 5, side // 2
    for image, label in zip(x, y, strict=True):
        top, left = height * (label // 2) + min(2, side - 5 * height), width * (label % 2)
        image[0, top : top + height, left : left + width] += 2
    return Dataset("stand-in", x, y, x[::2], y[::2])


def text_of(*parts: object, width: int = 110) -> str:
    """Parts as a terminal shows them."""
    with open(os.devnull, "w") as file:
        console = Console(record=True, file=file, width=width)
        for part in parts:
            console.print(part)
    return console.export_text()


def check_command(app, tmp_path, *options: str) -> None:
    """Its help names the options; missing data are one sentence, status 2 and no folder."""
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for option in ("--data", "--out", "--seed", "--quick", *options):
        assert option in result.output
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["--data", str(tmp_path / "none"), "--out", str(out)])
    assert result.exit_code == 2
    assert "is not a folder" in result.output
    assert not out.exists()
