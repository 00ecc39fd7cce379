"""Pruning with and without retraining: the example's steps on a stand-in."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import LeNet5, LeNetC5

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def modules():
    """The example's script and the modules beside it, by the ends of their names."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    names = ("prune_retrain", "weights", "channels", "surgery")
    yield {name: importlib.import_module(f"e5_{name}") for name in names}
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if name.startswith(("e1_", "e5_")):
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


def text_of(*parts):
    console = Console(record=True, file=open(os.devnull, "w"), width=110)  # noqa: SIM115
    for part in parts:
        console.print(part)
    console.file.close()
    return console.export_text()


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def test_help_names_the_options_and_missing_data_are_one_sentence(modules, tmp_path):
    app = modules["prune_retrain"].app
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert all(option in result.output for option in ("--data", "--out", "--seed", "--quick"))
    result = CliRunner().invoke(app, ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is not a folder" in result.output


def test_networks_are_trained_once(modules, data, tmp_path):
    script, path = modules["prune_retrain"], tmp_path / "c5.safetensors"
    recipe = {"epochs": 1, "batch_size": 20, "lr": 2e-3}
    first = script.kept_or_trained(LeNetC5, recipe, data, path, 0)
    written = path.stat().st_mtime_ns
    again = script.kept_or_trained(LeNetC5, recipe, data, path, 0)
    assert path.stat().st_mtime_ns == written
    other = script.kept_or_trained(LeNetC5, recipe, data, path, 1)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


def test_the_published_shares_stay_of_the_linear_layers(modules, data, tmp_path):
    parts = modules["weights"].compare_weights(
        seeded(LeNetC5), data, tmp_path / "weights.png", shares=(1.0,), epochs=1
    )
    text = text_of(*parts)
    # 33,412 of the convolutions, 8,750 and 489 of the Linear layers, and their biases.
    for wanted in ("43,681", "43,685", "8,750", "489", "91.73", "98.69", "standard deviations of fc1"):
        assert wanted in text
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("size", [0.5, 0.1])
def test_rankings_fill_the_size_with_the_best_channels(modules, size, together):
    channels, model = modules["channels"], seeded(LeNet5)
    for values in channels.scores(model).values():
        kept = channels.fitting(model, values, size, together=together)
        network = channels.ps.apply(
            model, channels.ps.Plan(tuple(map(channels.ps.Collapse, channels.SITES, kept)))
        )
        assert parameters(network) == channels.left(kept)
        assert 0.93 * size * 431_080 < parameters(network) <= size * 431_080
        for value, keep in zip(values, kept, strict=True):
            rest = np.delete(value, keep)
            assert not rest.size or value[keep].min() >= rest.max()


def test_every_ranking_has_a_row(modules, data):
    text = text_of(modules["channels"].compare_rankings(seeded(LeNet5), data, sizes=(0.3,)))
    cells = [line.replace("│", " ").split() for line in text.splitlines()]
    rows = [row[1:4] for row in cells if row and row[0] == "30%"]
    rankings = [
        [score, *way] for score in ("norm", "importance") for way in (["by", "layer"], ["over", "all"])
    ]
    assert rows[:4] == rankings
    assert [row[0] for row in rows[4:]] == ["elimination"]


def test_surgery_is_compared_with_gradual_pruning(modules, data, tmp_path):
    parts = modules["surgery"].compare_surgery(
        seeded(LeNet5), data, tmp_path / "surgery.png", amounts=(0.98,), epochs=1
    )
    text = text_of(*parts)
    # 2 % of 430,500 weights, and 580 biases.
    assert text.count("9,190") == 3
    for wanted in ("108", "98.00%", "46.9"):
        assert wanted in text
    assert (tmp_path / "surgery.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_script_prints_every_part(modules, data, tmp_path, monkeypatch):
    script = modules["prune_retrain"]
    console = Console(record=True, file=open(os.devnull, "w"), width=110)  # noqa: SIM115
    monkeypatch.setattr(script, "console", console)
    monkeypatch.setattr(script, "kept_or_trained", lambda make, *args: seeded(make))
    for name in ("weights", "surgery"):
        monkeypatch.setattr(script, f"compare_{name}", lambda *args, name=name, **options: iter([name]))
    monkeypatch.setattr(script, "compare_rankings", lambda *args, **options: "channels")
    script.run(data, tmp_path / "out", 0, quick=True)
    said = console.export_text()
    console.file.close()
    assert said.split()[:3] == ["weights", "channels", "surgery"]
