"""A factored layer is the dense one with the product for its weight, whatever its strides and padding."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Turned
from torch import nn

import pysolve as ps
from pysolve.errors import PysolveError
from pysolve.forms import LowRank
from pysolve.nn.layers.base import ASKED
from pysolve.nn.layers.factored import Factored, empty
from pysolve.nn.layers.runtime import to_dense

# What torch says once of even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("zeros", "reflect", "replicate", "circular")


@st.composite
def convolutions(draw):
    """A convolution of any shape, factors that share its kernel out, and an input that it can read."""
    n = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    kernel, dilation = (tuple(draw(st.integers(1, most)) for _ in range(n)) for most in (3, 2))
    mode = draw(st.sampled_from(MODES if n < 3 else ("zeros", "replicate", "circular")))
    padding = draw(st.sampled_from(["valid", "same", 0, 1, "mixed"]))
    stride = tuple(1 if padding == "same" else draw(st.integers(1, 2)) for _ in range(n))
    if padding == "mixed":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(n))
    c, h, bias = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    kind = CONVOLUTIONS[n - 1]
    layer = kind(c, h, kernel, stride, padding, dilation, 1, bias, mode, dtype=torch.float64)
    outside = [draw(st.booleans()) for _ in range(n)]
    form = factors(layer, outside, draw(st.integers(1, 4)))
    return layer, form, torch.randn(2, c, *(draw(st.integers(6, 7)) for _ in range(n)), dtype=torch.float64)


def factors(layer, outside, rank, seed=0):
    """Random factors of a rank, or the largest one, whose outer kernel extends along some dimensions."""
    h, c, *kernel = layer.weight.shape
    outer = [size if out else 1 for size, out in zip(kernel, outside, strict=True)]
    inner = [1 if out else size for size, out in zip(kernel, outside, strict=True)]
    rank = min(rank, h * int(np.prod(outer)), c * int(np.prod(inner)))
    rng = np.random.default_rng(seed)
    return LowRank(rng.standard_normal((h, rank, *outer)), rng.standard_normal((rank, c, *inner)))


def with_product(layer, form):
    """The dense layer that a factored one must equal."""
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(form.dense()))
    return dense


def linear(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias, dtype=dtype)
    return layer, factors(layer, [], 3)


@given(convolutions())
def test_any_convolution_gives_what_the_product_of_its_factors_gives(case):
    layer, form, x = case
    dense, two = with_product(layer, form), Factored.from_form(layer, form)
    torch.testing.assert_close(two(x), dense(x))
    torch.testing.assert_close(two.weight.detach(), dense.weight.detach())
    torch.testing.assert_close(two.to_dense()(x), dense(x))
    assert two.rank == form.rank
    assert two.inner.bias is None
    assert (two.bias is None) == (layer.bias is None)
    whole = two.to_dense()
    assert type(whole) is type(layer)
    names = ("kernel_size", "stride", "dilation", "padding_mode", "in_channels", "out_channels")
    assert all(getattr(whole, name) == getattr(layer, name) for name in names)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_a_linear_layer_gives_what_the_product_of_its_factors_gives(bias, shape):
    layer, form = linear(bias)
    two, dense, x = Factored.from_form(layer, form), with_product(layer, form), torch.randn(*shape).double()
    torch.testing.assert_close(two(x), dense(x))
    torch.testing.assert_close(two.to_dense()(x), dense(x))
    torch.testing.assert_close(torch.from_numpy(two.form().dense()), dense.weight)


@given(convolutions())
def test_gradients_are_those_of_the_product(case):
    layer, form, x = case
    two = Factored.from_form(layer, form)
    outer, inner = (torch.from_numpy(one).requires_grad_() for one in (form.outer, form.inner))
    weight = torch.einsum("hk...,kc...->hc...", outer, inner)
    start = x.clone().requires_grad_()
    other = x.clone().requires_grad_()
    expected = torch.func.functional_call(layer, {"weight": weight}, (start,))
    expected.square().sum().backward()
    two(other).square().sum().backward()
    torch.testing.assert_close(other.grad, start.grad)
    torch.testing.assert_close(two.outer.weight.grad, outer.grad)
    torch.testing.assert_close(two.inner.weight.grad, inner.grad)
    if layer.bias is not None:
        torch.testing.assert_close(two.bias.grad, layer.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_data_type_and_mode_stay(dtype, training):
    layer, form = linear(dtype=dtype)
    layer.train(training)
    two = Factored.from_form(layer, form)
    for one in (two, two.to_dense()):
        assert {p.dtype for p in one.parameters()} == {dtype}
        assert [m.training for m in one.modules()] == [training] * len([*one.modules()])
    x = torch.randn(4, 7, dtype=dtype)
    torch.testing.assert_close(two(x), with_product(layer, form)(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_trained_stays_trained_and_the_rest_stays_as_it_is(weight, bias):
    layer, form = linear()
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    two = Factored.from_form(layer, form)
    assert [p.requires_grad for p in (two.inner.weight, two.outer.weight, two.bias)] == [weight, weight, bias]
    whole = two.to_dense()
    assert [whole.weight.requires_grad, whole.bias.requires_grad] == [weight, bias]


def test_nothing_is_shared_and_no_random_number_is_drawn():
    layer, form = linear()
    state = torch.get_rng_state()
    two = Factored.from_form(layer, form)
    whole = two.to_dense()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in [*two.parameters(), *whole.parameters()]:
            parameter.zero_()
    assert layer.bias.any()
    assert form.outer.all()
    assert form.inner.all()


def test_factors_may_be_views_that_nobody_may_write_to():
    layer, form = linear()
    turned = LowRank(form.outer[:, ::-1], form.inner[::-1])
    turned.outer.setflags(write=False)
    two = Factored.from_form(layer, turned)
    torch.testing.assert_close(two.weight, torch.from_numpy(form.dense()))


def test_it_shows_its_rank():
    assert repr(Factored.from_form(*linear())).startswith("Factored(\n  rank=3")


@pytest.mark.parametrize(
    ("layer", "form", "message"),
    [
        (
            nn.Conv2d(4, 4, 3, groups=2),
            (4, 1, 1, 1, 1, 4, 3, 3),
            "without groups can be factored, got Conv2d",
        ),
        (nn.ConvTranspose2d(4, 4, 3), (4, 1, 1, 1, 1, 4, 3, 3), "got ConvTranspose2d"),
        (nn.Embedding(4, 4), (4, 1, 1, 4), "got Embedding"),
        (nn.Linear(4, 5), (4, 1, 1, 5), r"expected a form of shape \(5, 4\), got \(4, 5\)"),
        (nn.Conv2d(4, 4, 3), (4, 1, 1, 1, 1, 4, 3, 2), "expected a form of shape"),
        (nn.Linear(4, 5), (5, 5, 5, 4), r"\(5, 4\) has a rank of at most 4, got 5"),
        (nn.Conv2d(2, 3, 2), (3, 5, 1, 2, 5, 2, 2, 1), "rank of at most 4, got 5"),
    ],
)
def test_what_cannot_be_factored_is_refused(layer, form, message):
    half = len(form) // 2
    factored = LowRank(np.ones(form[:half]), np.ones(form[half:]))
    with pytest.raises(PysolveError, match=message):
        Factored.from_form(layer, factored)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 5), nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, (3, 2)), nn.Conv3d(2, 3, 2)]
)
def test_empty_factors_fit_the_layer_and_never_exceed_what_it_can_hold(layer, spatial):
    form = empty(layer, 2, spatial=spatial)
    assert form.shape == tuple(layer.weight.shape)
    assert form.rank == 2
    assert not form.dense().any()
    assert not Factored.from_form(layer, form).weight.any()
    huge = empty(layer, 10**12, spatial=spatial)
    assert huge.nbytes < 20 * layer.weight.nbytes
    with pytest.raises(PysolveError, match="rank of at most"):
        Factored.from_form(layer, huge)


def chained():
    """A network whose factored layer has a factored inner layer and a sparse outer one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    for name, rank in (("0", 4), ("0.inner", 2)):
        layer = model.get_submodule(name)
        model = ps.apply(model, ps.Plan(forms={f"{name}.weight": factors(layer, [], rank)}))
    return ps.prune(model, amount={"0.outer": 0.5}, layout="sparse").model


def test_a_network_becomes_dense_again_however_deep_it_was_factored():
    model, x = chained(), torch.randn(5, 12)
    assert isinstance(model[0].inner, Factored)
    whole = to_dense(model)
    assert [type(layer) for layer in whole] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(whole(x), model(x), atol=1e-5, rtol=1e-4)
    assert isinstance(model[0].inner, Factored)


def test_a_layer_that_is_factored_in_several_steps_still_knows_its_weight():
    model = chained()
    layer = model[0]
    assert layer.rank == 4
    expected = layer(torch.eye(12)) - layer(torch.zeros(1, 12))
    torch.testing.assert_close(to_dense(layer).weight, expected.T, atol=1e-5, rtol=1e-4)


def test_a_layer_under_two_names_becomes_dense_under_both():
    layer, form = linear(dtype=torch.float32)
    two = Factored.from_form(layer, form)
    model = nn.ModuleDict({"a": two, "b": two})
    whole = to_dense(model)
    assert whole["a"] is whole["b"]
    assert type(whole["a"]) is nn.Linear
    assert type(to_dense(two)) is nn.Linear


class Looking(nn.Module):
    """A network whose code tells a Linear from anything else, by a hundredth of its outputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x):
        return self.fc(x) * (1.0 if isinstance(self.fc, nn.Linear) else 1.01)


def test_a_network_that_computes_something_else_with_factors_is_refused():
    model, rng = Looking(), np.random.default_rng(0)
    form = LowRank(rng.standard_normal((8, 2)), rng.standard_normal((2, 6)))
    with pytest.raises(ps.CollapseError, match="outputs differ"):
        ps.apply(model, ps.Plan(forms={"fc.weight": form}), probe=torch.randn(5, 6))
    # In single precision the two agree to far less than that.
    plain = nn.Sequential(nn.Linear(6, 8))
    ps.apply(plain, ps.Plan(forms={"0.weight": form}), probe=torch.randn(5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        ps.apply(plain, ps.Plan(forms={"0.weight": form}), probe=torch.randn(5, 6))


def attributes(layer):
    return {name: getattr(layer, name) for name in ASKED if hasattr(layer, name)}


@given(convolutions())
def test_a_factored_layer_answers_for_the_one_in_whose_place_it_is(case):
    layer, form, _ = case
    assert attributes(Factored.from_form(layer, form)) == attributes(layer)


def test_a_factored_linear_answers_for_the_linear_and_no_convolution():
    layer, form = linear()
    assert attributes(Factored.from_form(layer, form)) == {"in_features": 7, "out_features": 5}


class Same(nn.Conv2d):
    """Pads by itself."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 1, 2)))


def test_the_first_factor_keeps_the_code_of_a_layer_that_extends_torchs_own():
    torch.manual_seed(0)
    layer, x = Same(3, 4, 3, stride=2, dtype=torch.float64), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    form = factors(layer, [False, False], 2)
    two = Factored.from_form(layer, form)
    torch.testing.assert_close(two(x), with_product(layer, form)(x))
    torch.testing.assert_close(two.to_dense()(x), two(x))
    assert (type(two.inner), type(two.outer), type(two.to_dense())) == (Same, nn.Conv2d, Same)
    with pytest.raises(PysolveError, match="the code of a Same may rely on its kernel"):
        Factored.from_form(layer, factors(layer, [True, False], 2))


def test_hooks_of_a_layer_that_extends_torchs_own_run_once_in_its_factored_place():
    torch.manual_seed(0)
    model, seen = nn.Sequential(Same(4, 6, 3), nn.ReLU()).eval(), []
    model[0].register_forward_hook(lambda layer, args, y: seen.append(len(y[0])))
    plan = ps.Plan(forms={"0.weight": empty(model[0], 2)})
    factored, x = ps.apply(model, plan), torch.randn(2, 4, 5, 5)
    for network in (factored, to_dense(factored)):
        seen.clear()
        network(x)
        assert seen == [6]


def test_a_weight_that_stores_inputs_first_becomes_two_linear_layers():
    layer, x = Turned(7, 5), torch.randn(6, 7)
    form = factors(layer, [], 3)
    two = Factored.from_form(layer, form)
    torch.testing.assert_close(two(x), with_product(layer, form)(x), rtol=1e-4, atol=1e-4)
    assert (two.inner.out_features, two.in_features, two.out_features) == (3, 7, 5)
