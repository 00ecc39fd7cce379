"""The smaller network equals the masked one, or the plan is refused and the original is untouched."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Net
from torch import nn

from pysolve.errors import CollapseError, DataError, LayerNotFoundError, PysolveError
from pysolve.forms import Codebook, Integers, LowRank, Sparse
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.evaluate import parameters
from pysolve.nn.zoo import LeNet5, Mlp
from pysolve.plan import Collapse, Plan, Site


def mlp(sizes=(5, 7, 3), seed=0):
    torch.manual_seed(seed)
    return Mlp(sizes)


def chain(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(layer() for layer in layers))


def inputs(n=20, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def collapse(keep, channels=7, writer="fc1", reader="fc2", **changes):
    return Plan((Collapse(Site(channels, (writer,), (reader,)), keep, **changes),))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@st.composite
def plans(draw, sizes):
    """Some channels of some hidden layers of an MLP, with new weights and biases or without."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = []
    for i in draw(st.permutations(range(1, len(sizes) - 1))):
        if draw(st.booleans()):
            continue
        keep = sorted(draw(st.sets(st.integers(0, sizes[i] - 1), min_size=1)))
        reader, h = f"fc{i + 1}", sizes[i + 1]
        weights = {reader: rng.standard_normal((h, len(keep)))} if draw(st.booleans()) else {}
        biases = {reader: rng.standard_normal(h)} if draw(st.booleans()) else {}
        steps.append(Collapse(Site(sizes[i], (f"fc{i}",), (reader,)), keep, weights, biases))
    return Plan(tuple(steps))


SIZES = (5, 7, 6, 4, 3)


@given(plans(SIZES), st.integers(0, 1000))
def test_any_plan_applied_equals_masked(plan, seed):
    model = mlp(SIZES, seed)
    before = copy.deepcopy(model)
    smaller = apply(model, plan, probe=inputs())
    wide = masked(model, plan)
    torch.testing.assert_close(outputs(smaller, inputs()), outputs(wide, inputs()), atol=1e-5, rtol=1e-5)
    assert same_state(model, before)
    assert parameters(wide) == parameters(model)
    for step in plan.steps:
        assert getattr(smaller, step.site.writers[0]).out_features == len(step.keep)
        assert getattr(smaller, step.site.readers[0]).in_features == len(step.keep)


@given(st.sets(st.integers(0, 6), min_size=1), st.integers(0, 1000))
def test_neurons_that_are_silent_leave_without_a_trace(keep, seed):
    model = mlp(seed=seed)
    keep = sorted(keep)
    silent = [i for i in range(7) if i not in keep]
    with torch.no_grad():
        model.fc1.weight[silent] = 0
        model.fc1.bias[silent] = -1
    smaller = apply(model, collapse(keep), probe=inputs())
    torch.testing.assert_close(outputs(smaller, inputs()), outputs(model, inputs()), atol=1e-5, rtol=1e-5)
    assert parameters(smaller) == len(keep) * 6 + 3 * (len(keep) + 1)


def test_keeping_everything_changes_nothing():
    model = mlp()
    for plan in (Plan(), collapse(range(7))):
        smaller = apply(model, plan, probe=inputs())
        assert same_state(smaller, model)
        assert torch.equal(outputs(smaller, inputs()), outputs(model, inputs()))


def test_rows_columns_and_new_values_end_up_where_they_belong():
    model = mlp()
    weight, bias = np.arange(6.0).reshape(3, 2), np.array([7.0, 8.0, 9.0])
    smaller = apply(model, collapse([1, 4], weights={"fc2": weight}, biases={"fc2": bias}))
    assert torch.equal(smaller.fc1.weight, model.fc1.weight[[1, 4]])
    assert torch.equal(smaller.fc1.bias, model.fc1.bias[[1, 4]])
    assert smaller.fc2.weight.tolist() == weight.tolist()
    assert smaller.fc2.bias.tolist() == bias.tolist()
    wide = masked(model, collapse([1, 4], weights={"fc2": weight}))
    assert wide.fc2.weight[:, [1, 4]].tolist() == weight.tolist()
    assert not wide.fc2.weight[:, [0, 2, 3, 5, 6]].any()
    assert str(smaller.fc1) == "Linear(in_features=5, out_features=2, bias=True)"


def test_a_reader_without_bias_gets_one_only_from_the_plan():
    model = mlp()
    model.fc2.bias = None
    assert apply(model, collapse([0])).fc2.bias is None
    given_one = apply(model, collapse([0], biases={"fc2": np.ones(3)}), probe=inputs())
    assert given_one.fc2.bias.tolist() == [1, 1, 1]
    assert model.fc2.bias is None


def test_a_writer_without_bias_stays_without():
    model = chain(lambda: nn.Linear(5, 7, bias=False), nn.ReLU, lambda: nn.Linear(7, 3))
    smaller = apply(model, collapse([2, 3], writer="0", reader="2"), probe=inputs())
    assert smaller[0].bias is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype):
    model = mlp().to(dtype)
    plan = collapse([0, 2], weights={"fc2": np.ones((3, 2))}, biases={"fc2": np.ones(3)})
    smaller = apply(model, plan, probe=inputs().to(dtype))
    assert {parameter.dtype for parameter in smaller.parameters()} == {dtype}


def test_devices_are_kept():
    smaller = apply(mlp().to("meta"), collapse([0, 2], weights={"fc2": np.ones((3, 2))}))
    assert {parameter.device.type for parameter in smaller.parameters()} == {"meta"}
    assert smaller.fc2.weight.shape == (3, 2)


def test_modes_and_gradient_flags_are_kept():
    model = mlp().train()
    model.fc2.eval()
    model.fc1.weight.requires_grad_(False)
    model.fc2.bias.requires_grad_(False)
    smaller = apply(model, collapse([0, 2], biases={"fc2": np.ones(3)}), probe=inputs())
    for network in (model, smaller):
        assert [module.training for module in network.modules()] == [True, True, False]
        flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        assert flags == {"fc1.weight": False, "fc1.bias": True, "fc2.weight": True, "fc2.bias": False}


def test_new_parameters_are_contiguous_so_that_they_can_be_saved():
    weight = np.asfortranarray(np.ones((3, 2)))
    smaller = apply(mlp(), collapse([0, 2], weights={"fc2": weight}))
    assert all(parameter.is_contiguous() for parameter in smaller.parameters())


def test_the_result_shares_no_memory_with_the_original_or_the_plan():
    model, weight = mlp(), np.ones((3, 7))
    plan = collapse(range(7), weights={"fc2": weight})
    smaller = apply(model, plan)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.fill_(5)
    assert same_state(model, before)
    assert (weight == 1).all()


def test_the_smaller_network_can_be_trained():
    smaller = apply(mlp(), collapse([0, 2, 5]))
    smaller(inputs()).square().sum().backward()
    assert smaller.fc1.weight.grad.shape == (3, 5)
    assert smaller.fc2.weight.grad.shape == (3, 3)


def test_lenet_collapses_with_outputs_equal_to_1e_5():
    torch.manual_seed(0)
    model, x = LeNet5(), torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    keep = np.flatnonzero(np.random.default_rng(0).random(500) < 0.11)
    plan = collapse(keep, channels=500)
    difference = outputs(apply(model, plan, probe=x), x) - outputs(masked(model, plan), x)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("batch", [inputs(), (inputs(), 1), {"x": inputs()}])
def test_a_probe_has_the_forms_that_gather_takes(batch):
    apply(mlp(), collapse([0, 2]), probe=batch)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.side = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x):
        hidden = torch.relu(self.fc1(x))
        return self.fc2(hidden) + self.side(hidden)


class SumReader(TwoReaders):
    """The second reader works with any number of channels, so only the values tell."""

    def forward(self, x):
        hidden = torch.relu(self.fc1(x))
        return self.fc2(hidden) + hidden.sum(1, keepdim=True)


BETWEEN = [
    pytest.param(lambda: nn.LayerNorm(7), id="layer norm"),
    pytest.param(lambda: nn.BatchNorm1d(7), id="batch norm"),
    pytest.param(lambda: nn.Softmax(-1), id="softmax"),
    pytest.param(lambda: nn.Unflatten(1, (7, 1)), id="reshape"),
    pytest.param(lambda: nn.LayerNorm(7, elementwise_affine=False), id="plain layer norm"),
]


@pytest.mark.parametrize("between", BETWEEN)
def test_what_mixes_channels_in_between_is_found_by_the_probe(between):
    model = chain(lambda: nn.Linear(5, 7), between, lambda: nn.Flatten(1), lambda: nn.Linear(7, 3))
    before = copy.deepcopy(model)
    with pytest.raises(CollapseError, match="channels of 0 → 3 changes more than it should"):
        apply(model, collapse([0, 2, 5], writer="0", reader="3"), probe=inputs())
    assert same_state(model, before)
    assert model[0].out_features == 7


@pytest.mark.parametrize("network", [TwoReaders, SumReader])
def test_a_second_reader_is_found_by_the_probe(network):
    torch.manual_seed(0)
    model = network()
    before = copy.deepcopy(model)
    with pytest.raises(CollapseError, match="another layer read them"):
        apply(model, collapse([0, 2, 5]), probe=inputs())
    assert same_state(model, before)


def test_only_the_steps_that_fail_are_named():
    model = chain(
        lambda: nn.Linear(5, 7),
        nn.ReLU,
        lambda: nn.Linear(7, 6),
        lambda: nn.Softmax(-1),
        lambda: nn.Linear(6, 3),
    )
    steps = (
        Collapse(Site(7, ("0",), ("2",)), [0, 1]),
        Collapse(Site(6, ("2",), ("4",)), [0, 1]),
    )
    with pytest.raises(CollapseError, match="of 2 → 4 changes"):
        apply(model, Plan(steps), probe=inputs())


def test_elementwise_layers_with_randomness_in_training_are_fine():
    model = chain(lambda: nn.Linear(5, 7), nn.GELU, nn.Dropout, nn.Tanh, lambda: nn.Linear(7, 3)).train()
    apply(model, collapse([0, 2, 5], writer="0", reader="4"), probe=inputs())


class Outputs(nn.Module):
    """Any structure, infinities and NaN included, as attention masks produce."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        y = self.fc2(torch.relu(self.fc1(x)))
        blocked = y.masked_fill(torch.eye(*y.shape, dtype=torch.bool), -torch.inf)
        return {"scores": [blocked, (y, None)], "classes": y.argmax(1), "nothing": y * torch.nan}


def test_outputs_may_have_any_structure():
    torch.manual_seed(0)
    apply(Outputs(), collapse([0, 2, 5]), probe=inputs())


def test_an_output_without_tensors_cannot_be_verified():
    model = mlp()
    model.register_forward_hook(lambda module, args, output: "text")
    with pytest.raises(PysolveError, match="no tensor"):
        apply(model, collapse([0]), probe=inputs())


def test_a_probe_that_the_network_refuses_is_told_so():
    with pytest.raises(DataError, match=r"Mlp itself refuses the batch.*shapes"):
        apply(mlp(), collapse([0]), probe=torch.ones(2, 9))


def test_unknown_layers_bring_up_the_close_names():
    with pytest.raises(LayerNotFoundError, match="did you mean 'fc1'"):
        apply(mlp(), collapse([0], writer="fc_1"))
    with pytest.raises(LayerNotFoundError, match="did you mean 'fc2'"):
        apply(mlp(), collapse([0], reader="fc-2"))


def test_layers_that_extend_torchs_own_are_narrowed_like_these():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x.relu()) * 2

    model = mlp()
    model.fc1 = Special(5, 7)
    smaller = apply(model, collapse([0, 3]), probe=inputs())
    assert type(smaller.fc1) is Special
    assert smaller.fc1.weight.shape == (2, 5)
    assert smaller.fc1.out_features == 2


def test_other_layers_are_refused_by_name():
    model = chain(lambda: nn.LSTM(5, 7), lambda: nn.Linear(7, 3))
    with pytest.raises(CollapseError, match="0 is a LSTM; writers that can be narrowed are exactly Linear, "):
        apply(model, collapse([0], writer="0", reader="1"))


def test_weights_computed_from_other_parameters_are_refused():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model.fc1)
    with pytest.raises(CollapseError, match="fc1 is computed from other parameters"):
        apply(model, collapse([0]))
    from torch.nn.utils import prune

    model = mlp()
    prune.l1_unstructured(model.fc2, "weight", 0.5)
    with pytest.raises(CollapseError, match="fc2 is computed from other parameters"):
        apply(model, collapse([0]))
    prune.remove(model.fc2, "weight")
    apply(model, collapse([0]), probe=inputs())


def test_a_layer_under_two_names_is_cut_once():
    model = mlp((5, 7, 3))
    model.again = model.fc1
    smaller = apply(model, collapse([0, 2]), probe=inputs())
    assert smaller.again is smaller.fc1
    assert smaller.fc1.out_features == 2


def test_tied_weights_are_refused():
    model = mlp((5, 7, 3))
    model.other = nn.Linear(7, 3)
    model.other.weight = model.fc2.weight
    with pytest.raises(CollapseError, match=r"fc2 shares its values with other\.weight"):
        apply(model, collapse([0]))
    model = mlp((5, 7, 5))
    model.fc2.weight.data = model.fc1.weight.data.T
    with pytest.raises(CollapseError, match="shares its values"):
        apply(model, collapse([0]))


def test_parameters_that_lie_in_one_buffer_are_not_tied():
    model = mlp()
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat, model.parameters())
    smaller = apply(model, collapse([0, 2]), probe=inputs())
    assert parameters(smaller) == 2 * 6 + 3 * 3


def test_the_site_must_fit_the_layers():
    with pytest.raises(CollapseError, match="the site has 6 channels, but the writer makes 7"):
        apply(mlp(), collapse([0], channels=6))
    with pytest.raises(CollapseError, match="the reader reads 3"):
        apply(mlp((5, 7, 3, 2)), collapse([0], reader="fc3"))


def test_keeping_no_channel_is_refused_with_the_lam_that_keeps_one():
    with pytest.raises(CollapseError, match="lam below lam_max"):
        apply(mlp(), collapse([]))
    with pytest.raises(CollapseError, match="lam below lam_max"):
        masked(mlp(), collapse([]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"fc2": np.ones((3, 3))}}, r"weights of fc2 must have shape \(3, 2\), got \(3, 3\)"),
        ({"weights": {"fc2": np.ones((2, 3))}}, r"must have shape \(3, 2\)"),
        ({"biases": {"fc2": np.ones(2)}}, r"biases of fc2 must have shape \(3,\)"),
        ({"weights": {"fc2": np.full((3, 2), np.nan)}}, "weights of fc2 are not finite"),
        ({"weights": {"fc2": np.full((3, 2), 1e300)}}, r"not finite in torch\.float32"),
        ({"biases": {"fc2": np.full(3, np.inf)}}, "biases of fc2 are not finite"),
    ],
)
def test_new_values_are_checked_before_anything_is_changed(changes, message):
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises(CollapseError, match=message):
        apply(model, collapse([0, 1], **changes))
    assert same_state(model, before)


def test_the_same_channels_may_be_in_one_step_only():
    step = collapse([0, 1]).steps[0]
    with pytest.raises(CollapseError, match="one plan after the other"):
        apply(mlp(), Plan((step, step)))


def interleaved(channels, blocks):
    """Tables of channels that a layer has in several equal blocks."""
    return np.arange(channels * blocks).reshape(blocks, channels).T


def at(*indices):
    """A table of one index a channel."""
    return np.array(indices)[:, None]


IMAGES, SEQUENCES, FEATURES = (2, 2, 5, 5), (2, 2, 6), (3, 5)


def plain(a):
    return nn.Sequential(nn.Conv2d(2, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, 3, 3))


def flattened(a):
    return nn.Sequential(nn.Conv2d(2, a, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(a, 4))


def flattened_maps(a):
    return nn.Sequential(nn.Conv2d(2, a, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9 * a, 4))


def depthwise(a):
    middle = nn.Conv2d(a, 2 * a, 3, padding=1, groups=a)
    return nn.Sequential(nn.Conv2d(2, a, 1), middle, nn.PReLU(2 * a), nn.Conv2d(2 * a, 3, 1))


def grouped(a):
    middle = nn.Conv1d(3 * a, 2 * a, 3, groups=a)
    return nn.Sequential(nn.Conv1d(2, 3 * a, 1), nn.GroupNorm(a, 3 * a), middle, nn.Conv1d(2 * a, 3, 1))


def grouped_reader(a):
    """Both grouped convolutions keep their two groups and lose channels in each."""
    first, second = nn.Conv1d(2, 2 * a, 1, groups=2), nn.ConvTranspose1d(2 * a, 4, 3, groups=2)
    return nn.Sequential(first, nn.SiLU(), second)


def transposed(a, b):
    first, second = nn.ConvTranspose2d(2, a, 2), nn.ConvTranspose2d(a, b, 3, stride=2)
    norms = nn.InstanceNorm2d(a, affine=True), nn.InstanceNorm2d(b, track_running_stats=True)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.Conv2d(b, 3, 1))


def concatenated(a, b):
    layers = {"a": nn.Conv2d(2, a, 3), "b": nn.Conv2d(2, b, 3), "bn": nn.BatchNorm2d(a + b)}
    return Net(
        lambda m, x: m.head(m.bn(torch.cat([m.a(x), m.b(x)], 1)).relu()),
        **layers,
        head=nn.Conv2d(a + b, 3, 2),
    )


def residual(a, b):
    layers = {"stem": nn.Linear(5, a), "up": nn.Linear(a, b), "down": nn.Linear(b, a)}

    def run(m, x):
        x = m.stem(x)
        return m.head(x + m.down(m.up(x).relu()))

    return Net(run, **layers, head=nn.Linear(a, 3))


def padded(a, b, added):
    """An option-A shortcut: the stream of a channels gets channels of zeros on both sides."""
    front, back = added
    layers = {"stem": nn.Conv2d(2, a, 1), "up": nn.Conv2d(a, b, 3), "down": nn.Conv2d(b, a + front + back, 1)}

    def run(m, x):
        x = m.stem(x).relu()
        return m.head(m.down(m.up(x).relu()) + m.pad(x)[..., 1:-1, 1:-1])

    pad = nn.ZeroPad3d((0, 0, 0, 0, front, back))
    return Net(run, **layers, pad=pad, head=nn.Conv2d(a + front + back, 3, 1))


def gated(a):
    def run(m, x):
        value, gate = m.both(x).chunk(2, -1)
        return m.down(value * gate.sigmoid())

    return Net(run, both=nn.Linear(5, 2 * a), down=nn.Linear(a, 3))


def split(a, b):
    """One layer writes two sites, which two layers read."""

    def run(m, x):
        both = m.both(x)
        # The widths are the readers', so that they follow the cut.
        left, right = both.split([m.left.in_features, m.right.in_features], -1)
        return m.left(left.relu()) + m.right(right.tanh())

    return Net(run, both=nn.Linear(5, a + b), left=nn.Linear(a, 3), right=nn.Linear(b, 3))


def recurrent(a):
    def run(m, x):
        hidden = m.into(x)
        for _ in range(3):
            hidden = torch.tanh(m.into(x) + m.loop(hidden))
        return m.head(hidden)

    return Net(run, into=nn.Linear(5, a), loop=nn.Linear(a, a, bias=False), head=nn.Linear(a, 3))


def attention(heads):
    """Two numbers a head; all of a head's queries, keys and values go together."""

    def run(m, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    three = {name: nn.Linear(6, 2 * heads) for name in "qkv"}
    return Net(run, **three, out=nn.Linear(2 * heads, 6))


def embedded(a, b):
    return nn.Sequential(nn.Embedding(9, a, padding_idx=1), nn.Linear(a, b), nn.GELU(), nn.Linear(b, 3))


def s(channels, writers, readers, passed="", **tables):
    return Site(channels, tuple(writers.split()), tuple(readers.split()), tuple(passed.split()), **tables)


# Builders by channels, the sites with all their channels, and the shape of the input.
CASES = {
    "plain": (plain, [s(6, "0", "3", "1")], IMAGES),
    "flattened": (flattened, [s(6, "0", "4")], IMAGES),
    "flattened_maps": (flattened_maps, [s(6, "0", "3")], IMAGES),
    "depthwise": (depthwise, [s(6, "0", "3", "1 2")], IMAGES),
    "grouped": (grouped, [s(4, "0", "3", "1 2")], SEQUENCES),
    "grouped_reader": (
        grouped_reader,
        [s(5, "0", "2", rows={"0": interleaved(5, 2)}, columns={"2": interleaved(5, 2)})],
        SEQUENCES,
    ),
    "transposed": (transposed, [s(5, "0", "3", "1"), s(4, "3", "5", "4")], IMAGES),
    "concatenated": (
        concatenated,
        [
            s(4, "a", "head", "bn", rows={"bn": at(*range(4))}, columns={"head": at(*range(4))}),
            s(5, "b", "head", "bn", rows={"bn": at(*range(4, 9))}, columns={"head": at(*range(4, 9))}),
        ],
        IMAGES,
    ),
    "residual": (residual, [s(6, "stem down", "up head"), s(4, "up", "down")], FEATURES),
    "padded": (
        padded,
        [
            s(4, "stem down", "up head", rows={"down": at(*range(2, 6))}, columns={"head": at(*range(2, 6))}),
            s(5, "up", "down"),
            s(
                *(5, "down", "head", "pad"),
                rows={"down": at(0, 1, 6, 7, 8)},
                columns={"head": at(0, 1, 6, 7, 8)},
            ),
        ],
        IMAGES,
    ),
    "gated": (gated, [s(6, "both", "down", rows={"both": interleaved(6, 2)})], FEATURES),
    "split": (
        split,
        [
            s(4, "both", "left", rows={"both": at(*range(4))}),
            s(3, "both", "right", rows={"both": at(4, 5, 6)}),
        ],
        FEATURES,
    ),
    "recurrent": (recurrent, [s(6, "into loop", "loop head")], FEATURES),
    "attention": (attention, [s(4, "q k v", "out")], (2, 3, 6)),
    "embedded": (embedded, [s(6, "0", "1"), s(5, "1", "3")], "words"),
}


def built(case, keeps, seed=0):
    """The network of a case with these channels, no value at its initial one, and its sites and input."""
    build, sites, shape = CASES[case]
    torch.manual_seed(seed)
    # The padded shortcut asks how many channels are added in front and at the back.
    widths = [len(keep) for keep in keeps]
    if case == "padded":
        widths[2] = (sum(i < 2 for i in keeps[2]), sum(i >= 2 for i in keeps[2]))
    model = build(*widths).double().eval()
    for value in (*model.parameters(), *(b for b in model.buffers() if b.ndim)):
        value.data = torch.rand_like(value) + 0.2
    x = torch.randint(9, (3, 4)) if shape == "words" else torch.randn(shape, dtype=torch.float64)
    return model, sites, x


def whole(case):
    return [range(site.channels) for site in CASES[case][1]]


@st.composite
def whole_plans(draw, case):
    """Some channels of some sites of a case, with new values for some parameters and buffers."""
    seed = draw(st.integers(0, 2**32 - 1))
    model, sites, x = built(case, whole(case), seed)
    rng = np.random.default_rng(seed)
    keeps = [sorted(draw(st.sets(st.integers(0, site.channels - 1), min_size=1))) for site in sites]
    order = draw(st.permutations(range(len(sites))))
    steps = tuple(Collapse(sites[i], keeps[i]) for i in order)
    state = {name: value for name, value in model.state_dict().items() if draw(st.booleans())}
    values = {name: np.asarray(rng.uniform(0.1, 1, value.shape)) for name, value in state.items()}
    return model, x, keeps, Plan(steps, values)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_every_network_applied_equals_masked_and_the_same_network_built_narrower(case, data):
    model, x, keeps, plan = data.draw(whole_plans(case))
    before, seen = copy.deepcopy(model.state_dict()), outputs(model, x)
    smaller, wide = apply(model, plan), masked(model, plan)
    torch.testing.assert_close(outputs(smaller, x), outputs(wide, x), atol=1e-10, rtol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model, x), seen)

    narrower, _, _ = built(case, keeps)
    narrower.load_state_dict(smaller.state_dict())
    assert str(narrower) == str(smaller)
    assert parameters(narrower) == parameters(smaller)
    torch.testing.assert_close(outputs(narrower, x), outputs(smaller, x), atol=1e-12, rtol=1e-12)


def form_of(name, tensor, layer, rng):
    """A form that a tensor can take, of random numbers, or none."""
    shape, kinds = tuple(tensor.shape), ["codebook"] if tensor.is_floating_point() and tensor.ndim else []
    whole = type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d) and getattr(layer, "groups", 1) == 1
    if name.rpartition(".")[2] == "weight":
        kinds += ["sparse", "integers"] * (type(layer) in (nn.Linear, nn.Conv2d)) + ["factors"] * whole
    kind = rng.choice(kinds) if kinds else None
    if kind == "codebook":
        return Codebook(rng.integers(0, 3, shape, np.uint8), rng.uniform(0.1, 1, 3))
    if kind == "sparse":
        return Sparse.from_dense(rng.standard_normal(shape) * (rng.random(shape) < 0.5))
    if kind == "integers":
        return Integers(rng.integers(-8, 8, shape, np.int8), rng.random((shape[0], 1)), bits=4)
    if kind == "factors":
        rank = rng.integers(1, 1 + min(shape[:2]))
        outer = rng.standard_normal((shape[0], rank, *[1] * len(shape[2:])))
        return LowRank(outer, rng.standard_normal((rank, *shape[1:])))
    return None


# The code of "split" asks a layer for its width.
@pytest.mark.parametrize("case", [one for one in CASES if one != "split"])
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_cuts_and_forms_in_one_plan_are_the_same_as_one_after_the_other(case, data, seed):
    model, x, _, plan = data.draw(whole_plans(case))
    rng, narrower = np.random.default_rng(seed), apply(model, plan)
    forms = {}
    for name, tensor in narrower.state_dict().items():
        form = form_of(name, tensor, narrower.get_submodule(name.rpartition(".")[0]), rng)
        if form is not None and rng.random() < 0.5:
            forms[name] = form
    after, together = Plan(forms=forms), replace(plan, forms=forms)
    smaller, expected = apply(model, together, probe=x), apply(narrower, after, probe=x)
    assert str(smaller) == str(expected)
    assert same_state(smaller, expected)
    assert torch.equal(outputs(smaller, x), outputs(expected, x))
    torch.testing.assert_close(outputs(smaller, x), outputs(masked(model, together), x))


def test_the_network_s_own_weight_takes_forms():
    torch.manual_seed(0)
    layer, rng = nn.Linear(6, 5), np.random.default_rng(0)
    codes, scales = rng.integers(-8, 8, (5, 6), np.int8), np.ones((5, 1), np.float32)
    for form in (Sparse.from_dense(np.eye(5, 6, dtype=np.float32)), Integers(codes, scales)):
        smaller = apply(layer, Plan(forms={"weight": form}), probe=torch.randn(3, 6))
        assert torch.equal(smaller.to_dense().weight, torch.tensor(form.dense(), dtype=torch.float32))
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: nn.Embedding(9, 6), "weight"),
        (lambda: nn.MultiheadAttention(6, 2), "in_proj_weight"),
        (lambda: nn.GRU(6, 5), "weight_ih_l0"),
        (lambda: nn.BatchNorm1d(6), "running_var"),
    ],
)
def test_any_tensor_takes_the_values_of_a_codebook(build, name):
    torch.manual_seed(0)
    model = build()
    shape = tuple(model.state_dict()[name].shape)
    book = Codebook(np.random.default_rng(0).integers(0, 3, shape, np.uint8), np.array([0.5, 1, 2]))
    for made in (apply(model, Plan(forms={name: book})), masked(model, Plan(forms={name: book}))):
        assert type(made) is type(model)
        assert np.array_equal(made.state_dict()[name], book.dense())
    with pytest.raises(CollapseError, match=f"{name} cannot take this form: .* shape"):
        apply(model, Plan(forms={name: book.with_codes(book.codes[:-1])}))
    with pytest.raises(CollapseError, match=f"{name} cannot take this form: .* not finite"):
        apply(model, Plan(forms={name: replace(book, centroids=np.array([0.5, np.inf, 2]))}))


def test_a_tensor_under_two_names_takes_one_form():
    shared = nn.Linear(4, 4)
    form = Sparse.from_dense(np.eye(4, dtype=np.float32))
    with pytest.raises(CollapseError, match=r"0\.weight and 1\.weight are one tensor"):
        apply(nn.Sequential(shared, shared), Plan(forms={"0.weight": form, "1.weight": form}))


@pytest.mark.parametrize("case", CASES)
def test_the_empty_plan_gives_an_equal_copy(case):
    model, _, x = built(case, whole(case))
    for plan in (Plan(), Plan(tuple(Collapse(site, range(site.channels)) for site in CASES[case][1]))):
        for copied in (apply(model, plan, probe=x), masked(model, plan)):
            assert same_state(copied, model)
            assert torch.equal(outputs(copied, x), outputs(model, x))
            assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}


def many(depth, bad=(), width=6):
    """A deep network of narrow layers with a softmax after some of them, and a step for every layer."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, width), *(nn.Linear(width, width) for _ in range(depth))]
    mixes = [nn.Softmax(-1) if i in bad else nn.Tanh() for i in range(depth)]
    model = nn.Sequential(*(m for pair in zip(layers, mixes, strict=False) for m in pair), layers[-1])
    steps = (Collapse(Site(width, (f"{2 * i}",), (f"{2 * i + 2}",)), [0, 2, 5]) for i in range(depth))
    return model.double(), Plan(tuple(steps))


def test_one_bad_step_among_many_is_found_in_few_runs():
    model, plan = many(32, bad=[21])
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(CollapseError, match="channels of 42 → 44 changes"):
        apply(model, plan, probe=inputs().double())
    assert len(runs) <= 4 + 2 * 2 * np.log2(32)


def test_a_bad_step_is_named_whatever_forms_come_with_it():
    model, plan = many(4, bad=[1])
    forms = {"4.weight": Sparse.from_dense(np.eye(3))}
    with pytest.raises(CollapseError, match="channels of 2 → 4 changes"):
        apply(model, replace(plan, forms=forms), probe=inputs().double())


def test_a_few_of_many_bad_steps_are_named():
    model, plan = many(8, bad=range(8))
    with pytest.raises(CollapseError, match="of 0 → 2, 2 → 4, 4 → 6, 6 → 8, 8 → 10 and others change"):
        apply(model, plan, probe=inputs().double())


def test_steps_that_fail_only_together_are_all_named():
    def run(m, x):
        together = m.a.out_features < 7 and m.b.out_features < 7
        return m.c(torch.relu(m.b(torch.relu(m.a(x))))) + together

    model = Net(run, a=nn.Linear(5, 7), b=nn.Linear(7, 7), c=nn.Linear(7, 3))
    plan = Plan((Collapse(s(7, "a", "b"), [0, 1]), Collapse(s(7, "b", "c"), [2])))
    with pytest.raises(CollapseError, match="channels of a → b, b → c changes"):
        apply(model, plan, probe=inputs())


def test_steps_that_keep_groups_even_only_together_are_verified_together():
    def run(m, x):
        return m.c(torch.cat([m.a(x), m.b(x)], 1)).softmax(1)

    build = partial(Net, run, a=nn.Conv1d(2, 3, 1), b=nn.Conv1d(2, 3, 1), c=nn.Conv1d(6, 4, 1, groups=2))
    first = s(3, "a", "c", columns={"c": at(0, 1, 2)})
    second = s(3, "b", "c", columns={"c": at(3, 4, 5)})
    plan = Plan((Collapse(first, [0, 1]), Collapse(second, [1, 2])))
    assert apply(build(), plan, probe=torch.randn(SEQUENCES)).c.in_channels == 4
    model = Net(lambda m, x: run(m, x) + m.a.out_channels, **dict(build().named_children()))
    with pytest.raises(CollapseError, match="channels of a → c, b → c changes"):
        apply(model, plan, probe=torch.randn(SEQUENCES))
    with pytest.raises(
        CollapseError, match="c has 2 groups, which must all keep equally many input channels"
    ):
        apply(build(), replace(plan, steps=plan.steps[:1]))


def test_a_network_that_is_random_in_evaluation_cannot_be_verified():
    model = Net(lambda m, x: m.fc2(nn.functional.dropout(m.fc1(x))), fc1=nn.Linear(5, 7), fc2=nn.Linear(7, 3))
    with pytest.raises(CollapseError, match=r"another output each time .* give no probe"):
        apply(model, collapse([0]), probe=inputs())


def test_pinned_sites_are_refused_with_their_reason():
    site = Site(7, ("fc1",), ("fc2",), pinned="the network returns them")
    for cut in (apply, masked):
        with pytest.raises(CollapseError, match="fc1 → fc2 cannot be removed: the network returns them"):
            cut(mlp(), Plan((Collapse(site, [0]),)))


def test_hooks_and_buffers_stay():
    model, x = built("plain", whole("plain"))[::2]
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[1].register_buffer("extra", torch.ones(2), persistent=False)
    smaller = apply(model, Plan((Collapse(CASES["plain"][1][0], [0, 3]),)))
    smaller(x)
    assert calls == [1]
    assert [name for name, _ in smaller.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert smaller[1].running_mean.tolist() == model[1].running_mean[[0, 3]].tolist()


def test_names_of_one_layer_must_lose_the_same_channels():
    layer = nn.Linear(6, 6)
    model = Net(
        lambda m, x: m.head(m.b(m.a(m.stem(x)))), stem=nn.Linear(5, 6), a=layer, b=layer, head=nn.Linear(6, 3)
    )
    site = s(6, "stem a b", "a b head")
    smaller = apply(model, Plan((Collapse(site, [0, 2, 5]),)), probe=inputs())
    assert smaller.a is smaller.b
    assert parameters(smaller) == 3 * 6 + 3 * 4 + 3 * 4
    with pytest.raises(CollapseError, match="a and b are one layer under two names, which would lose diff"):
        apply(model, Plan((Collapse(s(6, "a", "b"), [0, 2]),)))


def test_values_of_tied_weights_are_refused_but_tied_weights_elsewhere_are_fine():
    model = Net(
        lambda m, x: m.head(m.fc2(m.fc1(m.words(x)).relu())),
        **{
            "words": nn.Embedding(9, 5),
            "fc1": nn.Linear(5, 7),
            "fc2": nn.Linear(7, 5),
            "head": nn.Linear(5, 9),
        },
    )
    model.head.weight = model.words.weight
    smaller = apply(model, collapse([0, 3]), probe=torch.arange(9))
    assert smaller.head.weight is smaller.words.weight
    with pytest.raises(
        CollapseError, match=r"(words|head) shares its values with (words|head)\.weight: untie"
    ):
        apply(model, Plan(values={"head.weight": np.ones((9, 5))}))
    smaller = apply(model, Plan(values={"head.bias": np.ones(9)}))
    assert smaller.head.weight is smaller.words.weight
    assert smaller.head.bias.tolist() == [1.0] * 9


def test_batch_norms_that_share_a_statistic_are_refused():
    model, _, _ = built("transposed", whole("transposed"))
    model[1] = nn.BatchNorm2d(5)
    model.append(nn.BatchNorm2d(5))
    model[6].running_mean = model[1].running_mean
    with pytest.raises(CollapseError, match=r"1 shares its values with 6\.running_mean"):
        apply(model, Plan((Collapse(CASES["transposed"][1][0], [0]),)))


def test_an_attention_loses_outputs_once_it_is_a_layer_for_each_projection():
    model = Net(lambda m, x: m.fc(m.mha(x, x, x)[0]), mha=nn.MultiheadAttention(4, 2), fc=nn.Linear(4, 3))
    plan = Plan((Collapse(s(4, "mha.out_proj", "fc"), [0, 3]),))
    smaller = apply(model, plan, probe=torch.randn(5, 2, 4))
    assert smaller.mha.out_proj.weight.shape == (2, 4)
    assert smaller.fc.weight.shape == (3, 2)
    assert isinstance(model.mha, nn.MultiheadAttention)


def tied():
    torch.manual_seed(0)
    layers = {"words": nn.Embedding(9, 6), "mid": nn.Linear(6, 6), "head": nn.Linear(6, 9)}
    model = Net(lambda m, ids: m.head(m.words(ids) + m.mid(m.words(ids)).relu()), **layers)
    model.head.weight = model.words.weight
    return model


def test_weights_that_are_tied_are_cut_together_and_stay_tied():
    model, site = tied(), s(6, "words mid", "mid head")
    plan = Plan((Collapse(site, [0, 2, 5]),))
    smaller = apply(model, plan, probe=torch.arange(9))
    assert smaller.head.weight is smaller.words.weight
    assert smaller.words.weight.shape == (9, 3)
    assert (smaller.words.embedding_dim, smaller.head.in_features) == (3, 3)
    assert parameters(smaller) == 9 * 3 + 3 * 3 + 3 + 9
    assert cost_model(model, [site], torch.arange(9)).cost(np.array([3]))["params"] == parameters(smaller)
    with pytest.raises(CollapseError, match="shares its values with"):
        apply(model, Plan((Collapse(s(6, "words mid", "mid"), [0, 2]),)))
    with pytest.raises(CollapseError, match="shares its values with"):
        apply(model, Plan((Collapse(site, [0, 2]),), values={"head.weight": np.ones((9, 6))}))
