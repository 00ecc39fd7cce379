"""Linear layers at 8 bits: the example's steps on a stand-in, and its claim on the network itself."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import Dataset
from pysolve.nn import QuantLinear
from pysolve.nn.zoo import Mlp

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def script():
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("e2_quantization")
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if name.startswith(("e1_", "e2_", "e4_", "kept")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def data():
    """Images of ten classes that differ in where they are bright."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 10
    x = 0.3 * rng.standard_normal((60, 1, 28, 28)).astype(np.float32)
    for image, label in zip(x, y, strict=True):
        image[0, 5 * (label // 2) + 2 : 5 * (label // 2) + 7, 14 * (label % 2) : 14 * (label % 2) + 14] += 2
    with demo.threads(1):
        yield Dataset("stand-in", x, y, x[::2], y[::2])


def test_help_names_the_options_and_missing_data_are_one_sentence(script, tmp_path):
    result = CliRunner().invoke(script.app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert all(option in result.output for option in ("--data", "--out", "--seed", "--quick"))
    out = tmp_path / "out"
    result = CliRunner().invoke(script.app, ["--data", str(tmp_path / "none"), "--out", str(out)])
    assert result.exit_code == 2
    assert "is not a folder" in result.output
    assert not out.exists()


def test_layers_round_their_inputs_as_the_row_says(script, data):
    torch.manual_seed(0)
    model = Mlp((784, 24, 10)).eval()
    for scheme, dynamic in (("int8-dynamic", True), ("int8", False)):
        result = script.quantized(model, data, scheme, 40)
        layers = [one for one in result.model.modules() if isinstance(one, QuantLinear)]
        assert [layer.dynamic for layer in layers] == [dynamic] * 2


def test_the_whole_script_prints_its_table(script, data, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "mnist", lambda folder, **how: data)
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:-1] for line in result.output.splitlines() if line.startswith("|")]
    names, published, ours, sizes = (
        [cell.strip() for cell in column] for column in [*zip(*rows[2:], strict=True)][:4]
    )
    assert names == ["as trained", "dynamic int8", "int8, inputs as they are"]
    assert published == ["", "97.24", ""]
    kilobytes = [float(size.replace(",", "")) for size in sizes]
    assert all(size < 0.26 * kilobytes[0] for size in kilobytes[1:])
    # One image of 30 is 3.3 %.
    assert all(abs(float(score) - float(ours[0])) <= 3.4 for score in ours)
    assert [file.name for file in tmp_path.iterdir()] == ["mlp.safetensors"]
