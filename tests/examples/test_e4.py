"""Pruning and distillation of small convolutional networks: the example's steps on a stand-in."""

import numpy as np
import pytest
import torch
from scripts import check_command, modules_of
from torch import nn
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import accuracy, parameters

pytestmark = pytest.mark.slow


modules = modules_of("e4_efficiency", "e4_networks", "e4_pruning", "e4_quantization", "e4_distillation")


@pytest.fixture(scope="module")
def data():
    """Images of ten classes that differ in where, and in which colour, they are bright."""
    rng = np.random.default_rng(0)
    y = np.arange(80) % 10
    x = 0.3 * rng.standard_normal((80, 3, 32, 32)).astype(np.float32)
    for image, label in zip(x, y, strict=True):
        image[
            label % 3, 6 * (label // 2) : 6 * (label // 2) + 8, 16 * (label % 2) : 16 * (label % 2) + 16
        ] += 2
    with demo.threads(1):
        yield Dataset("stand-in", x, y, x[::2], y[::2])


class Tiny(nn.Sequential):
    """In place of the large teacher."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))


@pytest.fixture(scope="module")
def model(modules, data, tmp_path_factory):
    recipe = {"epochs": 8, "batch_size": 10, "lr": 2e-3}
    path = tmp_path_factory.mktemp("kept") / "simple.safetensors"
    return modules["e4_efficiency"].kept(modules["e4_networks"].SimpleCnn, data, path, recipe)


def test_help_names_the_options_and_missing_data_are_one_sentence(modules, tmp_path):
    check_command(modules["e4_efficiency"].app, tmp_path)


def test_networks_are_as_large_as_the_published_ones(modules):
    networks, megabytes = modules["e4_networks"], modules["e4_distillation"].megabytes
    made = (networks.SimpleCnn(), networks.SimpleCnn(padding=2), networks.ResNet18())
    assert [f"{megabytes(network):.3g}" for network in made] == ["0.488", "1.09", "44.8"]
    assert [parameters(network) for network in made] == [121_182, 270_942, 11_181_642]
    for network in made:
        assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_published_files_keep_their_size_and_ours_shrink(modules, model, data, monkeypatch):
    pruning = modules["e4_pruning"]
    monkeypatch.setattr(pruning, "CUTS", (pruning.CUTS[1], pruning.CUTS[-1]))
    table = pruning.pruning_table(model, data, 0, 40)
    assert [row[2] for row in table.rows] == ["488.3"] * 3
    # Half of both convolutions' channels: 8 and 16 of them stay.
    left = 608 + 3216 + 48_120 + 10_164 + 850
    zeros, channels = table.rows[1:]
    assert float(zeros[4]) < 450
    assert channels[6] == f"{left:,}"
    # What is left is entropy-coded, which takes about a sixth from weights in single precision.
    assert 0.75 * 4 * left / 1e3 < float(channels[4]) < 4 * left / 1e3


def test_files_at_8_bits_are_a_third(modules, model, data):
    table = modules["e4_quantization"].int8_table(model, data, 40)
    whole, dynamic, plain = ([float(row[2]), float(row[4])] for row in table.rows)
    assert [row[1] for row in table.rows] == ["488", "170", ""]
    # Published files keep the convolutions as they are.
    assert dynamic[0] < 0.35 * whole[0]
    assert plain[0] < 0.26 * whole[0]
    assert abs(dynamic[1] - whole[1]) <= 2.5
    assert abs(plain[1] - whole[1]) <= 2.5


def test_masks_by_torch_are_the_same_weights(modules, model, data):
    pruning = modules["e4_pruning"]
    masked = pruning.as_published(model, pruning.CUTS[2], 0)
    pruned = pruning.by_prune(model, data, pruning.CUTS[2], "none", 0, 40).model
    assert torch.equal(masked.fc1.weight, pruned.fc1.weight)
    channels = pruning.by_prune(model, data, pruning.CUTS[-1], "none", 0, 40).model
    masked = pruning.as_published(model, pruning.CUTS[-1], 0)
    rows = [row for row in masked.conv1.weight if row.any()]
    assert torch.equal(torch.stack(rows), channels.conv1.weight)


def test_every_way_trains_the_padded_student(modules, model, data):
    distillation = modules["e4_distillation"]
    labels, published, alone, ours = (
        distillation.distilled(model, data, way.options, {"epochs": 3, "batch_size": 10}, 0)
        for way in distillation.WAYS
    )
    assert {parameters(student) for student in (labels, published, alone, ours)} == {270_942}
    assert not torch.equal(labels.fc3.weight, published.fc3.weight)
    assert not torch.equal(alone.fc3.weight, ours.fc3.weight)
    # One class of ten is known to a network that has not learnt.
    assert accuracy(ours, data.x_test, data.y_test) > 15


def test_the_whole_script_prints_both_tables_and_writes_its_files(modules, data, tmp_path, monkeypatch):
    script = modules["e4_efficiency"]
    monkeypatch.setattr(script, "cifar", lambda folder: data)
    monkeypatch.setattr(modules["e4_distillation"], "ResNet18", Tiny)
    monkeypatch.setattr(modules["e4_pruning"], "CUTS", modules["e4_pruning"].CUTS[-1:])
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    titles = [line[:14] for line in lines if line.startswith("**")]
    assert titles == ["**Pruned, not ", "**At 8 bits, n", "**Distillation"]
    assert sum(line.startswith("| student") for line in lines) == 4
    assert {file.name for file in tmp_path.iterdir()} == {
        "simple.safetensors",
        "resnet18.safetensors",
        "files.png",
    }
    assert (tmp_path / "files.png").read_bytes().startswith(b"\x89PNG")
