"""Every layer is y = M x + b for the rows that samples and outputs form, whatever its shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import unfold
from torch.utils._python_dispatch import TorchDispatchMode

from pysolve.nn import layer_matrix as rows

# torch says so of its own padding='same'.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ORDINARY = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def ordinary(draw, dims, kernel, dilation):
    """Options of a convolution, and sizes of an input that it takes."""
    spans = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    sizes = [draw(st.integers(max(span, 2), span + 2)) for span in spans]
    borders = st.tuples(*(st.integers(0, min(2, size - 1)) for size in sizes))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), borders))
    strides = st.tuples(*[st.integers(1, 3)] * dims)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride = (1,) * dims if padding == "same" else draw(strides)
    return dict(stride=stride, padding=padding, padding_mode=mode), sizes


@st.composite
def transposed(draw, dims, dilation):
    stride = draw(st.tuples(*[st.integers(1, 3)] * dims))
    padding = draw(st.tuples(*[st.integers(0, 2)] * dims))
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sizes = [draw(st.integers(2 * border + 1, 2 * border + 3)) for border in padding]
    return dict(stride=stride, padding=padding, output_padding=more), sizes


@st.composite
def calls(draw):
    """A layer in float64 with random weights, an input that it takes and what it writes."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dims, inputs, outputs, n = (draw(st.integers(least, 3)) for least in (0, 1, 1, 1))
    bias, single = draw(st.booleans()), draw(st.booleans())
    if dims == 0:
        layer, sizes = (
            nn.Linear(inputs, outputs, bias, dtype=torch.float64),
            draw(st.sampled_from([(), (3,)])),
        )
        x = torch.randn(*(() if single else (n, *sizes)), inputs, dtype=torch.float64)
        return layer, x, layer(x).detach()
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    turned = draw(st.booleans())
    options, sizes = draw(transposed(dims, dilation) if turned else ordinary(dims, kernel, dilation))
    groups = draw(st.integers(1, 2))
    layer = (TRANSPOSED if turned else ORDINARY)[dims](
        groups * inputs, groups * outputs, kernel, dilation=dilation, groups=groups, bias=bias, **options
    ).double()
    x = torch.randn(*(() if single else (n,)), groups * inputs, *sizes, dtype=torch.float64)
    return layer, x, layer(x).detach()


def bias_of(layer):
    return 0.0 if layer.bias is None else layer.bias.detach()


def reading(layer):
    """The layer with the identity for a matrix: it writes out what it reads."""
    d = rows.channels(layer)[0] * rows.taps(layer)
    kind = next(kind for kind in rows.LAYERS if isinstance(layer, kind))
    names = ["kernel_size", "stride", "padding", "dilation"]
    names += ["output_padding"] if kind in TRANSPOSED.values() else ["padding_mode"]
    options = {} if kind is nn.Linear else {name: getattr(layer, name) for name in names}
    reader = kind(rows.channels(layer)[0], d, bias=False, dtype=torch.float64, **options)
    identity = torch.eye(d, dtype=torch.float64)
    if kind in TRANSPOSED.values():
        value = identity.reshape(d, -1, *layer.kernel_size).transpose(0, 1)
    else:
        value = identity.reshape(reader.weight.shape)
    reader.weight = nn.Parameter(value)
    return reader


@given(calls())
def test_samples_times_the_matrix_plus_the_bias_are_the_outputs(call):
    layer, x, y = call
    read, written, M = rows.samples(layer, x), rows.outputs(layer, y), rows.matrix(layer)
    assert len(read) == len(written) == rows.positions(layer, y)
    assert M.shape == (rows.channels(layer)[1], rows.channels(layer)[0] * rows.taps(layer))
    assert not M.requires_grad
    torch.testing.assert_close(read @ M.T + bias_of(layer), written, rtol=1e-12, atol=1e-12)


@given(calls())
def test_samples_are_what_the_same_layer_with_the_identity_for_a_matrix_writes(call):
    layer, x, _ = call
    with torch.no_grad():
        reader = reading(layer)
        assert torch.equal(rows.samples(layer, x), rows.outputs(reader, reader(x)))


def test_samples_of_a_plain_convolution_are_those_of_unfold():
    torch.manual_seed(0)
    layer, x = (
        nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        torch.randn(4, 3, 6, 7),
    )
    patches = unfold(x, (2, 3), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    assert torch.equal(rows.samples(layer, x), patches.transpose(1, 2).flatten(0, 1))


@given(calls(), st.data())
def test_chosen_rows_are_those_of_all_rows(call, data):
    layer, x, y = call
    count = rows.positions(layer, y)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(rows.samples(layer, x, chosen), rows.samples(layer, x)[chosen])
    assert torch.equal(rows.outputs(layer, y, chosen), rows.outputs(layer, y)[chosen])


@given(calls(), st.integers(1, 300), st.data())
def test_blocks_are_the_rows_in_order_and_none_is_larger_than_allowed(call, limit, data):
    layer, x, y = call
    count = rows.positions(layer, y)
    some = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=8)), dtype=torch.int64)
    for chosen in (None, some):
        pieces = list(rows.blocks(layer, x, y, chosen, limit=limit))
        assert all(read.numel() <= limit or len(read) == 1 for read, _ in pieces)
        read, written = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        assert torch.equal(read, rows.samples(layer, x, chosen))
        assert torch.equal(written, rows.outputs(layer, y, chosen))


@given(calls())
def test_weight_like_undoes_matrix(call):
    layer, *_ = call
    assert torch.equal(rows.weight_like(layer, rows.matrix(layer)), layer.weight)


@given(calls(), st.data())
def test_an_input_channel_owns_the_columns_from_channel_times_taps_on(call, data):
    layer, x, _ = call
    taps, dim = rows.taps(layer), x.ndim + 1 - layer.weight.ndim
    channel = data.draw(st.integers(0, rows.channels(layer)[0] - 1))
    alone = rows.samples(layer, x.index_select(dim, torch.tensor([channel])))
    assert torch.equal(alone, rows.samples(layer, x)[:, channel * taps : (channel + 1) * taps])


def test_a_linear_layer_reads_its_input_as_it_is():
    layer, x = nn.Linear(5, 2), torch.randn(4, 3, 5)
    assert torch.equal(rows.samples(layer, x), x.reshape(12, 5))
    assert torch.equal(rows.matrix(layer), layer.weight)
    assert (rows.channels(layer), rows.taps(layer), rows.groups(layer)) == ((5, 2), 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_numbers_keep_their_type(kind, dtype):
    layer, x = kind(2, 3, 2, padding=1, dtype=dtype), torch.randn(2, 2, 4, 4, dtype=dtype)
    y, some = layer(x).detach(), torch.tensor([0, 3])
    results = [
        rows.samples(layer, x),
        rows.samples(layer, x, some),
        rows.outputs(layer, y),
        rows.matrix(layer),
    ]
    assert {result.dtype for result in results} == {dtype}


class Largest(TorchDispatchMode):
    """Notes the most bytes that the result of any operator takes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_rows_that_are_not_wanted_take_no_memory(kind):
    layer, x = kind(4, 5, 5, padding=2), torch.randn(3, 4, 40, 40)
    y, chosen = layer(x).detach(), torch.arange(0, 4800, 100)
    padded = 3 * 4 * 44 * 44 * x.itemsize
    assert rows.samples(layer, x).untyped_storage().nbytes() > 20 * padded
    with Largest() as largest:
        read, written = rows.samples(layer, x, chosen), rows.outputs(layer, y, chosen)
        list(rows.blocks(layer, x, y, limit=padded // x.itemsize))
        list(rows.blocks(layer, x, y, chosen))
    assert (read.shape, written.shape) == ((48, 100), (48, 5))
    assert largest.bytes <= max(padded, y.untyped_storage().nbytes())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_no_samples_make_no_rows(kind):
    layer, x, none = kind(2, 3, 3), torch.zeros(0, 2, 5, 5), torch.arange(0)
    y = layer(x).detach()
    for chosen in (None, none):
        (read, written), *others = rows.blocks(layer, x, y, chosen)
        assert (read.shape, written.shape, others) == ((0, 18), (0, 3), [])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_no_channels_make_rows_of_nothing(kind):
    layer, x = kind(2, 3, 3), torch.zeros(4, 2, 5, 5)
    y = layer(x).detach()
    for chosen in (None, torch.arange(7)):
        (read, written), *others = rows.blocks(layer, x[:, :0], y, chosen)
        count = y[:, 0].numel() if chosen is None else 7
        assert (read.shape, written.shape, others) == ((count, 0), (count, 3), [])


def test_shapes_that_do_not_fit_are_refused():
    layer, x = nn.Conv2d(2, 3, 3), torch.zeros(1, 2, 5, 5)
    with pytest.raises(ValueError, match=r"4 dimensions, or 3 for one sample, got shape \(5, 5\)"):
        rows.samples(layer, x[0, 0])
    with pytest.raises(ValueError, match=r"matrix of Conv2d.* is 3 x 18, got one of shape \(18, 3\)"):
        rows.weight_like(layer, torch.zeros(18, 3))
    turned = nn.ConvTranspose2d(2, 3, 3, stride=2)
    with pytest.raises(ValueError, match=r"\(1, 11, 11\) samples and positions, .* has \(1, 12, 12\)"):
        list(rows.blocks(turned, x, turned(x, output_size=(12, 12)).detach()))
