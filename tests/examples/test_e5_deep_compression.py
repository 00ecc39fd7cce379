"""Deep compression of small networks: the example's steps on a stand-in."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripts import check_command, images_of, modules_of
from torch import nn
from typer.testing import CliRunner

from pysolve.nn.evaluate import nbytes
from pysolve.nn.zoo import Mlp
from pysolve.tables import Table
from pysolve.training.fit import fit

pytestmark = pytest.mark.slow

SIZES = (196, 24, 10)


modules = modules_of("e5_deep_compression", "e5_stages", "e5_published", "e5_ternary")
data = images_of(120, side=14)


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    network = Mlp(SIZES)
    fit(network, data.x_train, data.y_train, epochs=4, batch_size=20, progress=False)
    return network


@pytest.fixture(scope="module")
def published(modules):
    rates = {"pruned": 7, "shared": 11, modules["e5_published"].HUFFMAN: 13}
    return modules["e5_published"].Published({"fc1": 0.1, "fc2": 0.4}, 3, rates, (91.25, 92.5))


@pytest.fixture(scope="module")
def stages(modules, model, data, published):
    options = {"smaller": (12,), "count": 100, "epochs": 2}
    return modules["e5_stages"].all_stages(model, data, published, **options)


def test_help_names_the_options_and_missing_data_are_one_sentence(modules, tmp_path):
    check_command(modules["e5_deep_compression"].app, tmp_path, "--ternary")


def test_networks_are_those_of_the_publication(modules):
    networks = modules["e5_deep_compression"].NETWORKS
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
    published = modules["e5_published"].Published({"0": 0.5}, 4, {}, (0, 0))
    codes, run = 0, 0
    for value in weights:
        # 31 zeros and a value fit; the 32nd zero needs a code of its own.
        codes += bool(value) or run == 31
        run = 0 if value or run == 31 else run + 1
    # The zeros at the end are not written.
    run = len(weights) - 1 - int(np.flatnonzero(weights)[-1])
    codes -= run // 32
    bits = codes * (4 + 5) + 32 * len(set(weights)) + 32
    assert modules["e5_published"].packed_bytes(nn.Sequential(layer), published) == -(-bits // 8)


def test_published_stages_keep_so_many_weights_and_values(modules, model, data, published, monkeypatch):
    kept = []
    score = modules["e5_published"].score
    monkeypatch.setattr(
        modules["e5_published"], "score", lambda net, images: kept.append(net) or score(net, images)
    )
    ways = list(modules["e5_published"].as_published(model, data, published, 1))
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
    module = modules["e5_stages"]
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
    table = modules["e5_stages"].stages_table("Title", model, stages, published)
    rows = {(row[0], row[1]): row for row in table.rows}
    names = modules["e5_published"]
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
    modules["e5_stages"].draw({"one": (stages, published), "two": (stages, published)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_ternary_networks_have_rows_with_and_without_training(modules, model, data):
    table = modules["e5_ternary"].ternary_table({"small": (model, data)}, (0.3,), count=100)
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
    script = modules["e5_deep_compression"]
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
