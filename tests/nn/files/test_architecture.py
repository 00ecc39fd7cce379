"""Networks whose weights are masked or share values come back from files as they were."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pysolve as ps
from pysolve.forms import Codebook
from pysolve.nn.files import storage
from pysolve.nn.files.architecture import modes_record, ordinary, restore_modes
from pysolve.nn.files.storage import bits
from pysolve.nn.layers.masking import mask_weights, masks_of
from pysolve.nn.layers.sharing import codebooks_of, share_weights, shared_of, ternary_weights
from pysolve.nn.zoo import Mlp


def mlp(sizes=(6, 20, 4)):
    torch.manual_seed(0)
    return Mlp(sizes).eval()


def vectors():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def other_values(model):
    fresh = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.uniform_()
    return fresh


def same_outputs(a, b, x=None):
    x = vectors() if x is None else x
    return torch.equal(bits(a(x)), bits(b(x)))


def quantized(model, **options):
    return ps.quantize(model, scheme="codebook", progress=False, **options)


@pytest.mark.parametrize("coding", ["ans", "huffman", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_share_their_values_again_and_compute_the_same(coding, dtype, tmp_path):
    if coding == "ans":
        pytest.importorskip("constriction")
    model = mlp((6, 40, 30, 4)).to(dtype)
    model.again = model.fc2
    result = quantized(model, bits=3, ignore=["fc3"], layout="shared")
    ps.save(result, tmp_path / "a", coding=coding)
    loaded, x = ps.load(tmp_path / "a", other_values(model)), vectors().to(dtype)
    assert same_outputs(loaded, result.model, x)
    assert [*shared_of(loaded)] == [*shared_of(result.model)]
    assert {*loaded.state_dict()} == {*result.model.state_dict()}
    assert loaded.again is loaded.fc2
    for name, book in codebooks_of(loaded).items():
        own = codebooks_of(result.model)[name].dense()
        assert np.array_equal(book.dense(), own)
        assert len(book.centroids) == len(np.unique(own))
    assert type(loaded.fc3) is nn.Linear
    assert not any(module.training for module in ordinary(loaded).modules())
    assert ps.file_bytes(result, coding=coding) == (tmp_path / "a").stat().st_size


def test_files_of_shared_values_are_as_small_as_those_of_dense_layers(tmp_path):
    model = mlp((6, 300, 200, 4))
    for layout in ("dense", "shared"):
        ps.save(quantized(model, layout=layout), tmp_path / layout)
    dense, shared = ((tmp_path / layout).stat().st_size for layout in ("dense", "shared"))
    # The names of three layers.
    assert dense < shared < dense + 40


@pytest.mark.parametrize("way", ["values", "both", "zeros kept", "ternary"])
def test_what_training_made_of_shared_values_is_what_comes_back(way, tmp_path):
    model = mlp()
    result = quantized(model, bits=2)
    trained = copy.deepcopy(result.model)
    if way == "ternary":
        ternary_weights(trained, ["fc1", "fc2"])
    else:
        values = np.array([0.0, -1.0, 0.25, 0.7], np.float32)
        shapes = {"fc1": (20, 6), "fc2": (4, 20)}
        rng = np.random.default_rng(0)
        books = {
            n: Codebook(rng.integers(0, 4, shape).astype(np.uint8), values) for n, shape in shapes.items()
        }
        kind = "values" if way == "values" else "both"
        share_weights(trained, books, trained=kind, keep_zeros=way == "zeros kept")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1).add_(0.01)
    ps.save(replace(result, model=trained), tmp_path / "a")
    loaded = ps.load(tmp_path / "a", model)
    assert same_outputs(loaded, trained)
    for name in ("fc1", "fc2"):
        weight = trained.get_submodule(name).weight
        assert torch.equal(loaded.get_submodule(name).weight, weight)
        book = codebooks_of(loaded)[name]
        assert (book.centroids[0] == 0) == bool((weight == 0).any())
        assert len(book.centroids) == len(weight.unique())
    zeros = loaded.fc1.weight == 0
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    loaded(vectors()).square().sum().backward()
    optimizer.step()
    assert not loaded.fc1.weight[zeros].any()
    assert not torch.equal(loaded.fc1.weight, trained.fc1.weight)


def test_masked_layers_and_those_that_share_values_come_back_together(tmp_path):
    model = mlp()
    result = ps.prune(model, amount={"fc1": 0.5}, layout="dense")
    mask_weights(result.model, {"fc1": result.model.fc1.weight != 0})
    codes = (result.model.fc2.weight.detach() > 0).byte().numpy()
    share_weights(result.model, {"fc2": Codebook(codes, np.array([-1.0, 0.5], np.float32))})
    result.model.fc1.train()
    ps.save(result, tmp_path / "a")
    loaded = ps.load(tmp_path / "a", model)
    assert [*masks_of(loaded)] == ["fc1"]
    assert [*shared_of(loaded)] == ["fc2"]
    assert loaded.fc1.training
    assert not loaded.fc2.training
    assert same_outputs(loaded, result.model)
    assert {*ps.stored_bytes(result.model)} == {*ordinary(result.model).state_dict()} == {*model.state_dict()}
    again = ps.load(tmp_path / "a", result.model)
    assert same_outputs(again, result.model)


def test_networks_of_ordinary_weights_are_not_copied_nor_told_of():
    model = mlp()
    assert ordinary(model) is model
    assert modes_record(model, model) == {"masked": [], "training": False}


SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("nan"), 1e-45]


@given(
    st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=12), st.sampled_from([torch.float32, torch.half])
)
def test_values_are_shared_to_the_bit(values, dtype):
    layer = nn.Sequential(nn.Linear(len(values), 1)).to(dtype)
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([values]))
    if {*map(str, values)} == {"-0.0"}:
        # It is the first value, and zero.
        return
    before = bits(layer[0].weight).clone()
    restore_modes(layer, {"training": False, "shared": ["0"]})
    assert torch.equal(bits(layer[0].weight), before)
    assert codebooks_of(layer)["0"].centroids[0] == 0 or "0.0" not in map(str, values)


def test_layers_of_nothing_share_their_values(tmp_path):
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3))
    restore_modes(model, {"training": False, "shared": ["0", "1"]})
    assert model(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"shared": {}}, "expected shared to be a list"),
        ({"shared": ["fc1", 3]}, "every part of shared to be a string"),
        ({"shared": ["fc9"]}, "has no layer 'fc9'"),
        ({"shared": [""]}, "which has no weight to share"),
        ({"shared": ["fc2"]}, "fc2 has 1200 values to share, more than 256"),
        ({"shared": ["fc1"], "masked": ["fc1"]}, "fc1 is a ParametrizedLinear|has no weight|masked"),
    ],
)
def test_records_that_do_not_hold_are_refused(record, message, tmp_path):
    model = mlp((6, 40, 30, 4))
    result = quantized(model, bits=3, ignore=["fc2"], layout="shared")
    ps.save(result, tmp_path / "a")
    told, tensors = storage.read(tmp_path / "a")
    assert told["shared"] == ["fc1", "fc3"]
    storage.write(tmp_path / "a", {name: one.clone() for name, one in tensors.items()}, told | record)
    with pytest.raises(ps.DataError, match=message):
        ps.load(tmp_path / "a", model)


def test_masks_are_where_weights_are_not_zero():
    model = mlp()
    with torch.no_grad():
        model.fc1.weight[3] = 0.0
    other = copy.deepcopy(model)
    mask_weights(other, {"fc1": model.fc1.weight != 0})
    restore_modes(model, {"training": True, "masked": ["fc1"]})
    assert torch.equal(masks_of(model)["fc1"].mask, masks_of(other)["fc1"].mask)
    assert model.training
