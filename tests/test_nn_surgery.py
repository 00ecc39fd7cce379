"""The smaller network equals the masked one, or the plan is refused and the original is untouched."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pysolve.errors import CollapseError, LayerNotFoundError, PysolveError
from pysolve.nn.evaluate import parameters
from pysolve.nn.surgery import apply, masked
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


def test_an_error_of_the_probe_itself_comes_through():
    with pytest.raises(RuntimeError, match="shapes"):
        apply(mlp(), collapse([0]), probe=torch.ones(2, 9))


def test_unknown_layers_bring_up_the_close_names():
    with pytest.raises(LayerNotFoundError, match="did you mean 'fc1'"):
        apply(mlp(), collapse([0], writer="fc_1"))
    with pytest.raises(LayerNotFoundError, match="did you mean 'fc2'"):
        apply(mlp(), collapse([0], reader="fc-2"))


def test_only_plain_layers_can_be_narrowed():
    class Special(nn.Linear):
        pass

    model = mlp()
    model.fc1 = Special(5, 7)
    with pytest.raises(CollapseError, match="fc1 is a Special"):
        apply(model, collapse([0]))
    model = chain(lambda: nn.LSTM(5, 7), lambda: nn.Linear(7, 3))
    with pytest.raises(CollapseError, match="0 is a LSTM; writers that can be narrowed are exactly Linear, "):
        apply(model, collapse([0], writer="0", reader="1"))


def test_weights_computed_from_other_parameters_are_refused():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model.fc1)
    with pytest.raises(CollapseError, match="fc1 is a ParametrizedLinear"):
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
