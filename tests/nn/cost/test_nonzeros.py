"""Counts of what is not zero, and bytes that real formats take."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

import pysolve as ps
from pysolve.forms import Integers
from pysolve.methods.result import costs
from pysolve.nn import QuantLinear, to_dense
from pysolve.nn.cost.nonzeros import TensorNonzeros, nonzeros
from pysolve.nn.evaluate import parameters
from pysolve.nn.layers.sharing import unshared
from pysolve.nn.zoo import Mlp
from pysolve.tables import as_html, as_markdown, as_text


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 20), nn.Linear(20, 5))


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]), st.floats(0, 1))
def test_bytes_are_those_of_real_formats(seed, dtype, density):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 30, 2).tolist())
    dense = (rng.random(shape) + 1).astype(dtype) * (rng.random(shape) < density)
    one = TensorNonzeros("w", shape, np.count_nonzero(dense), dense.itemsize)
    csr = csr_array(dense)
    assert one.csr == csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes
    assert one.bitmask == np.packbits(dense != 0).nbytes + dense[dense != 0].nbytes
    assert one.dense == dense.nbytes


@pytest.mark.parametrize("layout", ["dense", "masked", "sparse"])
def test_a_pruned_network_counts_the_same_however_its_layers_run(layout):
    model = ps.prune(network(), amount=0.75, layout=layout).model
    counted = {one.name: one for one in nonzeros(model).tensors}
    assert set(counted) == {name for name, _ in network().named_parameters()}
    assert counted["2.weight"].nonzeros == 288 * 20 // 4
    assert counted["2.weight"].shape == (20, 288)
    assert counted["0.weight"].size == 216
    assert counted["0.bias"].nonzeros == 8
    assert all(parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"scheme": "int8"}, {"scheme": "int8", "group": 7, "bits": 4}])
def test_layers_of_whole_numbers_count_by_their_codes(options):
    result = ps.quantize(ps.prune(network(), amount=0.75, layout="dense"), progress=False, **options)
    counted = {one.name: one for one in nonzeros(result.model).tensors}
    assert set(counted) == {name for name, _ in network().named_parameters()}
    for name, layer in to_dense(result.model).named_children():
        if name != "1":
            assert counted[f"{name}.weight"].nonzeros == int(layer.weight.count_nonzero())
            assert counted[f"{name}.weight"].shape == tuple(layer.weight.shape)
            assert counted[f"{name}.weight"].itemsize == 1
    assert costs(result.model)["nonzeros"] == nonzeros(result.model).nonzeros
    assert nonzeros(result.model).size == parameters(result.model) == parameters(network())


def test_codes_of_zero_are_those_of_the_layer():
    codes = np.array([[3, 3, 1], [0, -2, 5]], np.int8)
    form = Integers(codes, np.ones((2, 1), np.float32), np.array([[3], [0]], np.int8))
    model = nn.Sequential(QuantLinear.from_form(nn.Linear(3, 2, bias=False), form))
    assert nonzeros(model).nonzeros == np.count_nonzero(form.dense()) == 3


def test_weights_that_share_values_count_as_many_as_they_are():
    result = ps.quantize(network(), scheme="codebook", bits=1, layout="shared", progress=False)
    dense = unshared(result.model)
    assert nonzeros(result.model).tensors == nonzeros(dense).tensors
    assert parameters(result.model) == parameters(network())


def test_totals_are_sums_and_the_rate_is_their_ratio():
    found = nonzeros(ps.prune(network(), amount=0.75, layout="dense").model)
    assert found.size == sum(parameter.numel() for parameter in network().parameters())
    assert found.rate == found.size / found.nonzeros
    assert found.bytes("dense") == 4 * found.size
    assert found.bytes("bitmask") < found.bytes("csr") < found.bytes("dense")


def test_the_table_has_a_row_for_every_parameter_and_one_for_all():
    table = nonzeros(ps.prune(network(), amount=0.5, layout="dense").model).table("Sparse")
    assert [row[0] for row in table.rows] == [*(name for name, _ in network().named_parameters()), "all"]
    assert table.rows[2] == ("2.weight", "20x288", "2,880", "50.00 %", "2,880", "23,040", "12,240", "23,124")
    text = "\n".join([*as_text(table), *as_markdown(table), as_html(table)])
    assert text.count("23,124") == 3


def test_shared_parameters_count_once_and_empty_ones_do_no_harm():
    model = Mlp((6, 6, 6))
    model.fc2.weight = model.fc1.weight
    assert nonzeros(model).size == 36 + 12
    model = nn.ParameterList([torch.zeros(0, 3), torch.zeros(4)])
    found = nonzeros(model)
    assert found.rate == float("inf")
    assert found.table().rows[0][1:5] == ("0x3", "0", "", "0")
