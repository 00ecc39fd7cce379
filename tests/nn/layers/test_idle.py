"""Layers without channels give the shapes, and the constants, that these layers of torch would."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Turned, vectors
from torch import nn

from pysolve.nn.layers.idle import (
    Constant,
    Empty,
    PassedBy,
    norm_of_nothing,
    sizes,
    spatial_of,
    without_inputs,
    without_outputs,
)

CONVOLUTIONS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@st.composite
def convolutions(draw):
    """A convolution of 2 to 3 channels of any geometry, and a batch or a sample for it."""
    dims, turned = draw(st.integers(1, 3)), draw(st.booleans())
    each = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    padding = tuple(min(p, k - 1) for p, k in zip(draw(each), kernel, strict=True))
    more = {}
    if turned:
        more["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    elif draw(st.booleans()):
        padding, stride = draw(st.sampled_from(["same", "valid"])), 1
    layer = CONVOLUTIONS[turned][dims - 1](
        2, 3, kernel, stride, padding, dilation=dilation, bias=draw(st.booleans()), **more
    )
    lead = (2,) * draw(st.integers(0, 1))
    return layer, torch.randn(*lead, 2, *draw(st.tuples(*[st.integers(7, 9)] * dims)))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(convolutions())
def test_convolutions_without_channels_have_their_shapes(given):
    layer, x = given
    wanted = layer(x)
    assert sizes(x, 3, spatial_of(layer)) == wanted.shape
    channel = wanted.ndim - len(spatial_of(layer)) - 1
    nothing = without_outputs(layer)(x)
    assert nothing.shape == (*wanted.shape[:channel], 0, *wanted.shape[channel + 1 :])


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(convolutions(), st.booleans())
def test_convolutions_without_inputs_are_those_of_zeros(given, written):
    layer, x = given
    channel = x.ndim - len(spatial_of(layer)) - 1
    constant = without_inputs(layer, written=written)
    y = constant(x.narrow(channel, 0, 0))
    with torch.no_grad():
        layer.weight.zero_()
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), Turned(4, 3)])
@pytest.mark.parametrize("shape", [(), (2,), (2, 5)])
def test_linear_layers_without_inputs_are_their_biases(layer, shape):
    constant = without_inputs(layer)
    bias = torch.zeros(3) if layer.bias is None else layer.bias
    torch.testing.assert_close(constant(torch.ones(*shape, 0)), bias.expand(*shape, 3), rtol=0, atol=0)
    assert without_outputs(layer)(torch.ones(*shape, 4)).shape == (*shape, 0)
    # Code may ask for a weight.
    assert constant.weight.shape == (3, 0)
    assert constant.weight.dtype == layer.weight.dtype
    assert without_outputs(layer).weight.shape == (0, layer.weight.shape[1])
    assert not without_outputs(layer).state_dict()


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(4), nn.Dropout()])
def test_what_takes_a_layers_place_is_in_its_mode(layer):
    assert without_outputs(layer.train()).training
    assert not without_outputs(layer.eval()).training


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_behind_it_takes_the_constant(dims, bias):
    torch.manual_seed(0)
    layer, norm = CONVOLUTIONS[False][dims - 1](2, 3, 3, stride=2, bias=bias), NORMS[dims - 1](3).eval()
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 1.5)
    constant, x = norm_of_nothing(norm, layer), torch.randn(2, 2, *[7] * dims)
    with torch.no_grad():
        layer.weight.zero_()
        wanted = norm(layer(x))
    torch.testing.assert_close(constant(without_outputs(layer)(x)), wanted)


def test_a_constant_that_is_written_into_has_bytes_of_its_own():
    bias = nn.Parameter(vectors(3))
    shared, own = Constant(bias)(torch.ones(2, 0)), Constant(bias, written=True)(torch.ones(2, 0))
    assert shared.untyped_storage().nbytes() == bias.nbytes
    before = bias.detach().clone()
    with torch.no_grad():
        own += 1.0
    assert own.is_contiguous()
    torch.testing.assert_close(bias.detach(), before, rtol=0, atol=0)


def test_constants_are_of_the_type_that_is_read():
    assert Constant(nn.Parameter(vectors(3)))(torch.ones(2, 0, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argument", "given"), [(0, ((torch.ones(2, 5, 4),), {})), ("x", ((), {"x": torch.ones(2, 5, 4)}))]
)
def test_a_module_that_is_passed_by_returns_what_it_did(argument, given):
    args, kwargs = given
    bias = nn.Parameter(vectors(3))
    other = PassedBy("inner.o", Constant(bias), argument, 3, 1)
    first, y, last = other(*args, **kwargs)
    assert first is None
    assert last is None
    assert y.shape == (2, 5, 3)
    alone = PassedBy("o", Constant(bias), argument, 0, 0)(*args, **kwargs)
    torch.testing.assert_close(alone, y, rtol=0, atol=0)
    assert [*other.state_dict()] == ["inner.o.bias"]


def test_they_can_be_exported_and_trained():
    net = nn.Sequential(Empty(torch.ones(0, 4)), nn.ReLU(), Constant(nn.Parameter(vectors(3))))
    x = torch.ones(2, 4)
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=0, atol=0)
    net(x).sum().backward()
    torch.testing.assert_close(net[2].bias.grad, torch.full((3,), 2.0))
