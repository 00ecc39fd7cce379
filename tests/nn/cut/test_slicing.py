"""A narrowed layer computes what the wide one computed on the channels that stay."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from pysolve.errors import CollapseError
from pysolve.nn.cut.slicing import Cut, channels_of, check_cut, check_kind, inputs, narrow, outputs, silence
from pysolve.plan import Site

seeds = st.integers(0, 2**32 - 1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def cut(layer, rows=None, passed=None, columns=None):
    """A cut that keeps the given channels, all where none are given."""

    def mask(kept, width):
        return np.isin(np.arange(width), np.arange(width) if kept is None else kept)

    made = Cut(mask(rows, outputs(layer)), mask(passed, outputs(layer)), mask(columns, inputs(layer)))
    check_cut("layer", layer, made)
    return made


def narrowed(layer, made):
    smaller = copy.deepcopy(layer)
    narrow(smaller, made)
    return smaller


def some(rng, groups, width, count):
    """Flags (groups, width) with ``count`` True in each row."""
    return rng.permuted(np.arange(width) < np.full((groups, 1), count), axis=1)


def indices(flags):
    return np.flatnonzero(flags)


def randomised(layer, rng):
    """The layer in double precision with no parameter or statistic at its initial value."""
    layer = layer.double()
    for value in (*layer.parameters(), *(b for b in layer.buffers() if b.ndim)):
        value.data = torch.from_numpy(rng.uniform(0.5, 1.5, value.shape))
    return layer


WEIGHTED = {
    "linear": (nn.Linear, 0),
    "conv1d": (nn.Conv1d, 1),
    "conv2d": (nn.Conv2d, 2),
    "conv3d": (nn.Conv3d, 3),
    "transposed1d": (nn.ConvTranspose1d, 1),
    "transposed2d": (nn.ConvTranspose2d, 2),
    "transposed3d": (nn.ConvTranspose3d, 3),
}


@pytest.mark.parametrize("kind", WEIGHTED)
@given(
    groups=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
    seed=seeds,
)
def test_a_weighted_layer_loses_groups_outputs_and_inputs_at_once(kind, groups, widths, bias, seed):
    make, dims = WEIGHTED[kind]
    rng = np.random.default_rng(seed)
    groups = groups if dims else 1
    taps = (2,) * bool(dims)
    into, out = widths

    def build(groups, into, out):
        options = {"groups": groups} if dims else {}
        return make(groups * into, groups * out, *taps, bias=bias, **options).double()

    layer = randomised(build(groups, into, out), rng)
    left = int(rng.integers(1, groups + 1))
    whole = some(rng, 1, groups, left).T
    kept_in, kept_out = (int(rng.integers(1, width + 1)) for width in (into, out))
    columns, rows = some(rng, groups, into, kept_in), some(rng, groups, out, kept_out)
    made = cut(layer, indices(rows), indices(np.broadcast_to(whole, rows.shape)), indices(columns))
    smaller = narrowed(layer, made)

    assert str(smaller) == str(build(left, kept_in, kept_out))
    build(left, kept_in, kept_out).load_state_dict(smaller.state_dict())
    silent = copy.deepcopy(layer)
    silence(silent, made.columns)
    x = torch.from_numpy(rng.standard_normal((2, groups * into) + (4,) * dims))
    close(smaller(x[:, indices(whole & columns)]), silent(x)[:, indices(whole & rows)])


@given(groups=st.integers(1, 3), seed=seeds)
def test_silence_zeroes_the_removed_inputs_and_nothing_else(groups, seed):
    rng = np.random.default_rng(seed)
    layer = randomised(nn.Conv2d(4 * groups, 2 * groups, 3, groups=groups), rng)
    stays = rng.random(4 * groups) < 0.5
    silent = copy.deepcopy(layer)
    silence(silent, stays)
    for row in range(2 * groups):
        for column in range(4):
            kept = stays[row // 2 * 4 + column]
            assert torch.equal(silent.weight[row, column], layer.weight[row, column] * bool(kept))
    assert torch.equal(silent.bias, layer.bias)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_depthwise_convolution_passes_channels_on(make, multiplier):
    layer = make(5, 5 * multiplier, 3, padding=1, groups=5)
    kept = [0, 3]
    rows = [row for channel in kept for row in range(channel * multiplier, (channel + 1) * multiplier)]
    smaller = narrowed(layer, cut(layer, passed=rows))
    assert str(smaller) == str(make(2, 2 * multiplier, 3, padding=1, groups=2))
    x = torch.randn(2, 5, 4, 4)
    close(smaller(x[:, kept]), layer(x)[:, rows])


NORMS = [
    pytest.param(nn.BatchNorm1d, (), id="batch norm of features"),
    pytest.param(nn.BatchNorm1d, (4,), id="batch norm 1d"),
    pytest.param(nn.BatchNorm2d, (4, 3), id="batch norm 2d"),
    pytest.param(nn.BatchNorm3d, (4, 3, 2), id="batch norm 3d"),
    pytest.param(nn.InstanceNorm1d, (4,), id="instance norm 1d"),
    pytest.param(nn.InstanceNorm2d, (4, 3), id="instance norm 2d"),
    pytest.param(nn.InstanceNorm3d, (4, 3, 2), id="instance norm 3d"),
]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize(("make", "positions"), NORMS)
def test_norms_lose_channels_with_their_statistics(make, positions, affine, tracked):
    def build(width):
        return make(width, affine=affine, track_running_stats=tracked).double()

    rng, kept = np.random.default_rng(0), [1, 2, 5]
    layer = randomised(build(6), rng)
    smaller = narrowed(layer, cut(layer, passed=kept))
    assert str(smaller) == str(build(3))
    build(3).load_state_dict(smaller.state_dict())
    assert {name for name, _ in smaller.named_buffers()} == {name for name, _ in layer.named_buffers()}
    x = torch.from_numpy(rng.standard_normal((5, 6, *positions)))
    for mode in (True, False):
        close(smaller.train(mode)(x[:, kept]), layer.train(mode)(x)[:, kept])
    if tracked:
        close(smaller.running_mean, layer.running_mean[kept])
        assert torch.equal(smaller.num_batches_tracked, layer.num_batches_tracked)


@pytest.mark.parametrize("affine", [True, False])
def test_a_group_norm_loses_whole_groups(affine):
    layer = randomised(nn.GroupNorm(4, 8, affine=affine), np.random.default_rng(0))
    kept = [0, 1, 6, 7]
    smaller = narrowed(layer, cut(layer, passed=kept))
    assert str(smaller) == str(nn.GroupNorm(2, 4, affine=affine))
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    close(smaller(x[:, kept]), layer(x)[:, kept])


def test_a_prelu_loses_the_slopes_of_its_channels():
    layer = randomised(nn.PReLU(5), np.random.default_rng(0))
    smaller = narrowed(layer, cut(layer, passed=[1, 4]))
    assert str(smaller) == str(nn.PReLU(2))
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    close(smaller(x[:, [1, 4]]), layer(x)[:, [1, 4]])


def test_an_embedding_loses_dimensions_and_keeps_its_padding_index():
    layer = nn.Embedding(7, 5, padding_idx=2)
    smaller = narrowed(layer, cut(layer, rows=[0, 3, 4]))
    assert str(smaller) == str(nn.Embedding(7, 3, padding_idx=2))
    words = torch.tensor([[0, 2], [6, 1]])
    assert torch.equal(smaller(words), layer(words)[..., [0, 3, 4]])
    smaller(words).sum().backward()
    assert not smaller.weight.grad[2].any()


PADS = [
    pytest.param(nn.ZeroPad3d, (0, 0, 0, 0, 2, 3), (4, 4, 4), id="3d, maps"),
    pytest.param(nn.ZeroPad3d, (1, 0, 0, 2, 2, 3), (4, 4, 4), id="3d, positions too"),
    pytest.param(lambda p: nn.ConstantPad3d(p, 1.5), (0, 0, 0, 0, 0, 3), (4, 4, 4), id="3d, at the back"),
    pytest.param(nn.ZeroPad2d, (0, 0, 2, 0), (4, 5), id="2d, sequences"),
    pytest.param(lambda p: nn.ConstantPad2d(p, -1.0), (0, 0, 2, 3), (4, 5), id="2d, a constant"),
    pytest.param(nn.ZeroPad1d, (2, 3), (4,), id="1d, features"),
    pytest.param(lambda p: nn.ConstantPad1d(p, 0.0), (1, 0), (4,), id="1d, in front"),
]


@pytest.mark.parametrize(("make", "padding", "shape"), PADS)
@given(seed=seeds)
def test_padding_adds_fewer_channels(make, padding, shape, seed):
    rng = np.random.default_rng(seed)
    layer = make(padding)
    front, back = padding[-2:]
    added, inside = rng.random(front + back) < 0.5, rng.random(shape[0]) < 0.5
    smaller = narrowed(layer, cut(layer, passed=indices(added)))
    assert type(smaller) is type(layer)
    assert smaller.padding == (*padding[:-2], added[:front].sum(), added[front:].sum())
    x = torch.from_numpy(rng.standard_normal((2, *shape)))
    kept = indices(np.concatenate([added[:front], inside, added[front:]]))
    close(smaller(x[:, indices(inside)]), layer(x)[:, kept])


def test_padding_of_the_last_dimension_adds_channels_there():
    layer = nn.ConstantPad2d((1, 2, 0, 0), 0.0)
    assert outputs(layer) == 3
    smaller = narrowed(layer, cut(layer, passed=[1]))
    assert smaller.padding == (0, 1, 0, 0)
    assert smaller(torch.ones(2, 3, 4)).shape == (2, 3, 5)


def test_flags_types_and_contiguity_are_kept():
    layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    smaller = narrowed(layer, cut(layer, rows=[0, 5], columns=[1, 2]))
    assert [(p.requires_grad, p.dtype, p.is_contiguous()) for p in smaller.parameters()] == [
        (False, torch.bfloat16, True),
        (True, torch.bfloat16, True),
    ]
    assert isinstance(smaller.weight, nn.Parameter)


def test_what_a_convolution_does_at_its_borders_stays():
    layer = nn.Conv2d(4, 6, 3, padding=(1, 2), stride=2, dilation=2, padding_mode="circular")
    smaller = narrowed(layer, cut(layer, rows=[0, 5], columns=[1, 2]))
    x = torch.randn(2, 4, 9, 9)
    x[:, [0, 3]] = 0
    torch.testing.assert_close(smaller(x[:, [1, 2]]), layer(x)[:, [0, 5]])
    assert smaller._reversed_padding_repeated_twice == layer._reversed_padding_repeated_twice


@pytest.mark.parametrize(
    ("layer", "kept", "message"),
    [
        (
            nn.Conv2d(4, 8, 3, groups=2),
            {"passed": [0, 1, 2, 3, 4]},
            "4 output channels at a time, and only whole groups",
        ),
        (nn.Conv2d(4, 8, 3), {"passed": [0, 1]}, "only whole groups of them can go"),
        (nn.GroupNorm(2, 8), {"passed": [0, 1]}, "only whole groups of them can go"),
        (nn.GroupNorm(1, 8), {"passed": [0, 1]}, "8 output channels at a time, and only whole"),
        (nn.Conv2d(4, 8, 3, groups=2), {"rows": [0, 1, 4]}, "equally many output channels, got 1 to 2"),
        (nn.Conv2d(4, 8, 3, groups=2), {"columns": [0, 1]}, "equally many input channels, got 0 to 2"),
    ],
)
def test_uneven_groups_are_refused(layer, kept, message):
    with pytest.raises(CollapseError, match=message):
        cut(layer, **kept)


@pytest.mark.parametrize(
    ("layer", "role", "message"),
    [
        (nn.MultiheadAttention(4, 2).out_proj, "readers", "part of nn.MultiheadAttention"),
        (nn.ReLU(), "passed", "ReLU; passed layers .* leave out layers that hold nothing for each channel"),
        (nn.Linear(3, 4), "passed", "Linear; passed layers that can be narrowed are exactly Conv1d, "),
        (nn.Embedding(3, 4), "readers", "Embedding; readers that can be narrowed are exactly Linear, "),
        (nn.BatchNorm1d(3), "writers", "BatchNorm1d; writers .* exactly Linear, .*Embedding"),
        (nn.Embedding(3, 4, max_norm=1.0), "writers", "max_norm to None first"),
        (nn.ZeroPad3d((0, 0, 0, 0, -1, 2)), "passed", "crops channels"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 1)), "writers", "permanent first"),
        (prune.random_unstructured(nn.Conv1d(2, 3, 1), "weight", 1), "writers", "permanent first"),
        (prune.random_unstructured(nn.BatchNorm1d(2), "weight", 1), "passed", "permanent first"),
    ],
)
def test_layers_that_cannot_be_narrowed_say_why(layer, role, message):
    with pytest.raises(CollapseError, match=f"^(the weight of )?layer .*{message}"):
        check_kind("layer", layer, role)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("writers", r"w → r: the site has 3 channels, but the writer makes 4 \(w\).*rows"),
        ("readers", r"the reader reads 8 \(r\).*columns"),
        ("passed", r"the layer between has 5 \(p\).*rows"),
    ],
)
def test_channels_that_cannot_be_shared_out_ask_for_a_table(role, message):
    site = Site(3, ("w",), ("r",), ("p",))
    layers = {"writers": nn.Linear(2, 4), "readers": nn.Linear(8, 2), "passed": nn.BatchNorm1d(5)}
    with pytest.raises(CollapseError, match=message):
        channels_of(site, role, role[0], layers[role])


@pytest.mark.parametrize("rows", [[[0], [4]], [[-1], [0]]])
def test_tables_must_lie_within_the_layer(rows):
    site = Site(2, ("w",), ("r",), rows={"w": rows})
    with pytest.raises(CollapseError, match="rows must lie within 0 … 3 for w"):
        channels_of(site, "writers", "w", nn.Linear(2, 4))
