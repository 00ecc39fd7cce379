"""Sparse layers do what the dense ones do that they were made from."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

from pysolve.errors import PysolveError
from pysolve.layer.sparse_matrix import SparseMatrix
from pysolve.nn.evaluate import macs, nbytes
from pysolve.nn.layers.base import answers_of
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear


def pruned(layer, density=0.3, seed=0):
    """The layer with most of its weights zero."""
    keep = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < density
    with torch.no_grad():
        layer.weight.mul_(keep)
    return layer


def sparse(layer):
    return (SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d).from_dense(layer)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": (3, 2), "padding": (1, 2)},
    "strided": {"kernel_size": 3, "stride": (2, 1), "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": (1, 2), "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 0), "padding_mode": "circular"},
}


def layers():
    torch.manual_seed(0)
    yield "linear", pruned(nn.Linear(20, 7)), torch.randn(5, 20)
    yield "linear without bias", pruned(nn.Linear(20, 7, bias=False)), torch.randn(2, 3, 20)
    yield "linear of one sample", pruned(nn.Linear(20, 7)), torch.randn(20)
    yield "linear of no sample", pruned(nn.Linear(20, 7)), torch.randn(0, 20)
    yield "empty", pruned(nn.Linear(20, 7), 0.0), torch.randn(5, 20)
    yield "double", pruned(nn.Linear(20, 7).double()), torch.randn(5, 20).double()
    for name, options in CONVOLUTIONS.items():
        yield name, pruned(nn.Conv2d(4, 6 if name != "depthwise" else 8, **options)), torch.randn(3, 4, 9, 8)
    yield "one image", pruned(nn.Conv2d(4, 6, 3)), torch.randn(4, 9, 8)


ALL = [pytest.param(layer, x, id=name) for name, layer, x in layers()]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("dense", "x"), ALL)
def test_a_sparse_layer_computes_what_the_dense_one_does(dense, x):
    layer = sparse(dense)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x), dense(x))
    assert layer.values.numel() == int((dense.weight != 0).sum())
    assert answers_of(copy.deepcopy(layer)) == answers_of(dense)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("dense", "x"), ALL)
def test_a_trace_is_shown_what_the_layer_computes(dense, x):
    layer = sparse(dense)
    torch.testing.assert_close(layer.traced(x), layer.computed(x))
    assert torch.equal(layer.scattered(), dense.weight)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_scattered_entries_are_the_dense_weight(h, d, density, seed):
    torch.manual_seed(seed)
    dense = pruned(nn.Linear(d, h), density, seed)
    assert torch.equal(sparse(dense).scattered(), dense.weight)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_a_dense_layer_has_the_type_of_the_sparse_one(kind):
    layer = sparse(pruned(nn.Conv2d(4, 6, 3, groups=2))).to(kind)
    dense = layer.to_dense()
    assert dense.weight.dtype == dense.bias.dtype == layer.weight.dtype == kind
    assert dense.weight.shape == layer.weight.shape


def test_the_weight_of_a_sparse_layer_has_no_values_to_mistake_for_its_own():
    layer = sparse(pruned(nn.Linear(12, 5)))
    assert layer.weight.is_meta
    assert "weight" not in layer.state_dict()
    with pytest.raises(RuntimeError, match="meta"):
        layer.bias + layer.weight.sum(1)


@pytest.mark.parametrize(("dense", "x"), ALL)
def test_there_and_back_is_the_same_layer(dense, x):
    back = sparse(dense.eval()).to_dense()
    assert not back.training
    assert str(back) == str(dense)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), dense.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("dense", "x"), ALL)
def test_gradients_are_those_of_the_dense_layer_where_it_has_weights(dense, x):
    layer, dense = sparse(dense), copy.deepcopy(dense)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for one, inputs in ((layer, ours), (dense, theirs)):
        out = one(inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    if dense.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    if getattr(dense, "groups", 1) == 1:
        expected = dense.weight.grad.flatten(1)[dense.weight.flatten(1) != 0]
        torch.testing.assert_close(layer.values.grad, expected)


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = sparse(pruned(nn.Conv2d(2, 3, 3, padding=1).double()))
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)

    def by_values(values, bias):
        layer.values.data, layer.bias.data = values.detach().clone(), bias.detach().clone()
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, x.detach())

    start = layer.values.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(by_values, start)


def test_fine_tuning_trains_what_is_left_and_nothing_else():
    torch.manual_seed(0)
    dense = pruned(nn.Linear(10, 4), 0.4)
    layer, x = sparse(dense), torch.randn(64, 10)
    goal = pruned(nn.Linear(10, 4), 0.4)
    with torch.no_grad():
        goal.weight[dense.weight == 0] = 0
        y = goal(x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(layer.to_dense().weight, goal.weight, atol=1e-3, rtol=0)
    assert not layer.to_dense().weight[dense.weight == 0].any()


@settings(max_examples=10)
@given(st.sampled_from([0.0, 0.1, 0.7]), st.booleans(), st.integers(0, 9))
def test_a_state_dict_of_any_number_of_entries_can_be_loaded(density, bias, seed):
    torch.manual_seed(seed)
    layer = sparse(pruned(nn.Linear(12, 5, bias=bias), density, seed))
    fresh = SparseLinear(csr_array((5, 12), dtype=np.float32), torch.zeros(5) if bias else None)
    x = torch.randn(3, 12)
    fresh(x)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    again = {name: value.clone() for name, value in layer.state_dict().items()}
    again["values"] *= 2
    fresh.load_state_dict(again)
    torch.testing.assert_close(fresh.to_dense().weight, 2 * layer.to_dense().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": [0, 9, 1]}, "within 0 and 2, got 9"),
        ({"indices": [1, 0, 1]}, "must increase within each row"),
        ({"indices": [0, 0, 1]}, "must increase within each row"),
        ({"indptr": [0, 2, 1]}, "index pointer|decreases"),
        ({"values": [1.0, 2.0]}, "length|same size"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message):
    layer = SparseLinear(csr_array(np.array([[1, 2, 0], [0, 3, 0]], np.float32)), None)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(2, 3)
    damaged = {name: torch.as_tensor(change.get(name, value)) for name, value in before.items()}
    expected = layer(x)
    with pytest.raises((ValueError, RuntimeError), match=message):
        layer.load_state_dict(damaged)
    assert torch.equal(layer(x), expected)


def test_a_state_of_a_convolution_in_other_groups_is_refused():
    one, two, four = (sparse(nn.Conv2d(4, 8, 3, groups=groups)) for groups in (1, 2, 4))
    for wrong, layer in ((one, two), (two, four)):
        with pytest.raises(ValueError, match="within the groups"):
            layer.load_state_dict(wrong.state_dict())
    two.load_state_dict(four.state_dict())
    torch.testing.assert_close(two.computed(torch.ones(1, 4, 5, 5)), four.computed(torch.ones(1, 4, 5, 5)))


@pytest.mark.parametrize("how", ["deepcopy", "save", "double", "in place", "data", "replaced"])
def test_whatever_happens_to_the_values_the_product_follows(how):
    torch.manual_seed(0)
    layer, x = sparse(pruned(nn.Linear(12, 5))), torch.randn(3, 12)
    layer(x).sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
        layer.values.data.zero_()
        assert torch.equal(layer(x), layer.bias.expand(3, 5))
        layer = other
    elif how == "save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        layer = torch.load(buffer, weights_only=False)
    elif how == "double":
        layer, x = layer.double(), x.double()
    elif how == "in place":
        with torch.no_grad():
            layer.values.mul_(3)
    elif how == "data":
        layer.values.data.mul_(3)
    else:
        layer.values.data = torch.ones_like(layer.values)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    inputs = x.clone().requires_grad_()
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.to_dense().weight.sum(0).expand(3, 12))


def test_values_that_change_before_the_backward_pass_are_an_error():
    layer, x = sparse(pruned(nn.Linear(12, 5))), torch.randn(3, 12, requires_grad=True)
    out = layer(x).sum()
    with torch.no_grad():
        layer.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_inputs_that_do_not_fit_are_refused():
    layer = sparse(pruned(nn.Linear(12, 5)))
    with pytest.raises(PysolveError, match=r"expected torch.float32 on cpu .* got torch.float64"):
        layer(torch.randn(3, 12).double())
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.randn(3, 11))
    with pytest.raises(PysolveError, match=r"on the CPU in float32 or float64, got torch\.float16"):
        layer.half()(torch.randn(3, 12).half())


def test_a_sparse_layer_costs_its_entries():
    dense = pruned(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))[0])
    layer, x = sparse(dense), torch.randn(1, 3, 8, 8)
    entries = int((dense.weight != 0).sum())
    assert macs(layer, x) == 36 * entries
    assert nbytes(layer) == 4 * entries + 4 * entries + 8 * (8 + 1) + 4 * 8
    assert "27 to 8, density" in repr(layer)


def test_a_convolution_whose_padding_was_changed_later_is_padded_as_it_is_now():
    conv, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 2, 8, 8)
    conv.dilation, conv.padding = (2, 2), (2, 2)
    with torch.no_grad():
        torch.testing.assert_close(SparseConv2d.from_dense(conv)(x), conv(x))


def test_sparse_layers_use_as_many_threads_as_torch(monkeypatch):
    layer, used = SparseLinear.from_dense(nn.Linear(8, 6)), []
    original = SparseMatrix.matmul

    def matmul(self, *args, threads=None, **options):
        used.append(threads)
        return original(self, *args, threads=threads, **options)

    monkeypatch.setattr(SparseMatrix, "matmul", matmul)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(4, 8, requires_grad=True)
    layer(x).sum().backward()
    assert used == [3, 3]
