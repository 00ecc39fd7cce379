"""Deep compression of small networks: the example's steps on a stand-in."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from pysolve.cli import demo
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import nbytes
from pysolve.nn.zoo import Mlp
from pysolve.tables import Table
from pysolve.training.fit import fit

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = (196, 24, 10)


@pytest.fixture(scope="module")
def modules():
    """The example's script and the modules beside it, by the ends of their names."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    names = ("deep_compression", "stages", "published", "ternary")
    yield {name: importlib.import_module(f"e5_{name}") for name in names}
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if name.startswith(("e1_", "e2_", "e5_", "kept")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def data():
    """Images of ten classes that differ in where they are bright."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 10
    x = 0.3 * rng.standard_normal((120, 1, 14, 14)).astype(np.float32)
    for image, label in zip(x, y, strict=True):
        image[0, 2 * (label // 2) + 2 : 2 * (label // 2) + 4, 7 * (label % 2) : 7 * (label % 2) + 7] += 2
    with demo.threads(1):
        yield Dataset("stand-in", x, y, x[::2], y[::2])


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    network = Mlp(SIZES)
    fit(network, data.x_train, data.y_train, epochs=4, batch_size=20, progress=False)
    return network


@pytest.fixture(scope="module")
def published(modules):
    rates = {"pruned": 7, "shared": 11, modules["published"].HUFFMAN: 13}
    return modules["published"].Published({"fc1": 0.1, "fc2": 0.4}, 3, rates, (91.25, 92.5))


@pytest.fixture(scope="module")
def stages(modules, model, data, published):
    options = {"smaller": (12,), "count": 100, "epochs": 2}
    return modules["stages"].all_stages(model, data, published, **options)


def test_help_names_the_options_and_missing_data_are_one_sentence(modules, tmp_path):
    app = modules["deep_compression"].app
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    assert all(option in result.output for option in ("--data", "--out", "--seed", "--ternary", "--quick"))
    result = CliRunner().invoke(app, ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is not a folder" in result.output


def test_networks_are_those_of_the_publication(modules):
    networks = modules["deep_compression"].NETWORKS
    # 1,720 and 1,070 kB.
    for name, size in (("LeNet-5", 1720), ("LeNet-300-100", 1070)):
        model, published = networks[name].make(), networks[name].published
        assert abs(nbytes(model) / 1e3 - size) < 5
        weights = {layer: model.get_submodule(layer).weight.numel() for layer in published.kept}
        assert len(weights) == sum(isinstance(one, nn.Linear | nn.Conv2d) for one in model.modules())
        kept = sum(published.kept[layer] * count for layer, count in weights.items())
        assert 11 < sum(weights.values()) / kept < 13


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(0, 40))
def test_packed_bytes_count_codes_gaps_and_fillers(modules, gaps, end):
    weights = [value for gap in gaps for value in (*[0.0] * gap, 0.5)] + [0.0] * end
    layer = nn.Linear(len(weights), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
    published = modules["published"].Published({"0": 0.5}, 4, {}, (0, 0))
    codes, run = 0, 0
    for value in weights:
        # 31 zeros and a value fit; the 32nd zero needs a code of its own.
        codes += bool(value) or run == 31
        run = 0 if value or run == 31 else run + 1
    # The zeros at the end are not written.
    run = len(weights) - 1 - int(np.flatnonzero(weights)[-1])
    codes -= run // 32
    bits = codes * (4 + 5) + 32 * len(set(weights)) + 32
    assert modules["published"].packed_bytes(nn.Sequential(layer), published) == -(-bits // 8)


def test_published_stages_keep_so_many_weights_and_values(modules, model, data, published, monkeypatch):
    kept = []
    count = modules["published"].accuracy
    monkeypatch.setattr(
        modules["published"], "accuracy", lambda net, *xy: kept.append(net) or count(net, *xy)
    )
    ways = list(modules["published"].as_published(model, data, published, 1))
    assert [one.stage for one in ways][:2] == ["pruned", "shared"]
    pruned, shared = kept[:2]
    for name, share in published.kept.items():
        size = model.get_submodule(name).weight.numel()
        zeros = [int((net.get_submodule(name).weight == 0).sum()) for net in (pruned, shared)]
        assert zeros[0] == zeros[1] == int((1 - share) * size)
        assert len(shared.get_submodule(name).weight.unique()) <= 2**published.bits
    assert not torch.equal(pruned.fc1.bias, shared.fc1.bias)


def test_every_way_gets_smaller_from_stage_to_stage(modules, stages, model):
    assert stages[0].bytes == nbytes(model)
    module = modules["stages"]
    for way in (module.WAY, module.ZEROS):
        sizes = [one.bytes for one in stages if one.way == way]
        assert len(sizes) == 4
        # So small a file is a record for the most part, which codes alone do without.
        assert sizes[0] > max(sizes[2:]) > sizes[1]
    targets = {one.stage: one.bytes for one in stages if one.way == module.TARGET}
    assert [*targets] == [f"1/12, {coder}" for coder in (module.HUFFMAN, module.ANS)]
    assert targets[f"1/12, {module.ANS}"] <= nbytes(model) / 12
    assert all(one.accuracy > 50 for one in stages if one.way == module.ZEROS)


def test_published_figures_stand_beside_ours(modules, stages, model, published):
    table = modules["stages"].stages_table("Title", model, stages, published)
    rows = {(row[0], row[1]): row for row in table.rows}
    names = modules["published"]
    assert rows["", "as trained"][6] == "91.25"
    coded = rows[names.WAY, names.HUFFMAN]
    assert (coded[2], coded[6]) == ("13", "92.50")
    assert rows[names.WAY, "pruned"][2] == "7 (weights)"
    assert sum(bool(row[2]) for row in table.rows) == 3
    whole = stages[0].bytes
    for row, one in zip(table.rows, stages, strict=True):
        assert row[3] == f"{whole / one.bytes:.1f}"
        assert float(row[5]) == pytest.approx(8 * one.bytes / 4978, abs=0.006)


def test_the_picture_has_a_panel_for_each_network(modules, stages, published, tmp_path):
    path = tmp_path / "deep.png"
    modules["stages"].draw({"one": (stages, published), "two": (stages, published)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_ternary_networks_have_rows_with_and_without_training(modules, model, data):
    table = modules["ternary"].ternary_table({"small": (model, data)}, (0.3,), count=100)
    assert [row[:2] for row in table.rows] == [
        ("ResNet-32, 44, 56, published", "labels"),
        ("small", ""),
        ("small", "nothing"),
        ("small", "outputs, 0.3 s"),
    ]
    assert all(float(row[3]) > 6 for row in table.rows[2:])
    assert float(table.rows[2][4]) > 50


def test_the_whole_script_prints_its_tables_and_writes_its_files(
    modules, data, published, stages, tmp_path, monkeypatch
):
    script = modules["deep_compression"]
    recipe = {"epochs": 1, "batch_size": 20, "lr": 2e-3}
    network = script.Network(lambda: Mlp(SIZES), recipe, "small.safetensors", published, 1)
    monkeypatch.setattr(script, "mnist", lambda folder: data)
    monkeypatch.setattr(script, "NETWORKS", {"LeNet-5": network})
    monkeypatch.setattr(script, "all_stages", lambda *args, **options: stages)
    monkeypatch.setattr(script, "taught", lambda *args, **options: Table("Ternary", ("a",), ()))
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    assert re.findall(r"^\*\*(.{7})", result.output, re.MULTILINE) == ["LeNet-5", "Ternary"]
    assert {file.name for file in tmp_path.iterdir()} == {"small.safetensors", "deep.png"}
