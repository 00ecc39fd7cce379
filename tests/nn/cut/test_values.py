"""New values reach the network in its own shapes and data types, or are refused by name."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pysolve.errors import CollapseError
from pysolve.nn.cut.values import load, new_values
from pysolve.plan import Collapse, Plan, Site


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3)
    )


def loaded(model, plan):
    changed = copy.deepcopy(model)
    load(changed, new_values(model, plan))
    return changed


@given(st.sets(st.sampled_from([*network().state_dict(), "0.bias"])), st.integers(0, 2**32 - 1))
def test_every_parameter_and_buffer_can_get_new_values(names, seed):
    model, rng = network(), np.random.default_rng(seed)
    before = {**copy.deepcopy(model.state_dict()), "0.bias": torch.zeros(4)}
    values = {name: 9 * rng.standard_normal(before[name].shape) for name in names}
    after = loaded(model, Plan(values=values)).state_dict()
    assert after.keys() == before.keys() - ({"0.bias"} - names)
    for name, value in after.items():
        wanted = torch.as_tensor(values.get(name, before[name])).to(before[name].dtype)
        assert torch.equal(value, wanted)
        assert value.dtype == before[name].dtype


@given(st.permutations(range(4)), st.sets(st.integers(0, 3), min_size=1), st.integers(0, 2**32 - 1))
def test_a_step_gives_the_columns_of_its_channels_one_channel_after_the_other(order, keep, seed):
    rng, keep = np.random.default_rng(seed), sorted(keep)
    columns = np.arange(16).reshape(4, 4)[list(order)]
    site = Site(4, ("0",), ("3",), columns={"3": columns})
    matrix = rng.standard_normal((3, 4 * len(keep)))
    weight = new_values(network(), Plan((Collapse(site, keep, {"3": matrix}),)))["3.weight"]
    for i, channel in enumerate(keep):
        for j, column in enumerate(columns[channel]):
            np.testing.assert_allclose(weight[:, column], matrix[:, 4 * i + j], rtol=1e-6)
    assert torch.count_nonzero(weight) == matrix.size


def test_a_step_gives_a_convolution_its_taps_in_order():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, (2, 3)))
    matrix = np.arange(5 * 2 * 6.0).reshape(5, 12)
    step = Collapse(Site(4, ("0",), ("1",)), [1, 3], {"1": matrix}, {"1": np.arange(5.0)})
    values = new_values(model, Plan((step,)))
    assert torch.equal(values["1.weight"][:, [1, 3]].flatten(1), torch.tensor(matrix, dtype=torch.float32))
    assert not values["1.weight"][:, [0, 2]].any()
    assert values["1.bias"].tolist() == [0, 1, 2, 3, 4]


def test_a_new_bias_trains_as_the_weight_does():
    for trains in (True, False):
        model = network()
        model[0].weight.requires_grad_(trains)
        changed = loaded(model, Plan(values={"0.bias": np.ones(4)}))
        assert isinstance(changed[0].bias, nn.Parameter)
        assert changed[0].bias.requires_grad is trains
        assert changed[0].bias.dtype == torch.float32


def test_arrays_of_any_layout_and_tensors_are_taken():
    value = np.arange(9.0).reshape(3, 3)
    backwards = value[::-1].copy()[::-1]
    for given_as in (value, np.asfortranarray(value), backwards, torch.from_numpy(value), value.tolist()):
        assert loaded(network(), Plan(values={"4.weight": given_as}))[4].weight.tolist() == value.tolist()


def test_what_the_plan_holds_is_copied():
    given = {"0.bias": torch.ones(4), "3.bias": torch.ones(3)}
    changed = loaded(network(), Plan(values=given))
    with torch.no_grad():
        for name in given:
            changed.get_parameter(name).fill_(5)
    assert all(bool((value == 1).all()) for value in given.values())


def test_a_layer_under_two_names_may_get_its_values_under_both():
    layer = nn.Linear(3, 3)
    model, ones = nn.Sequential(layer, layer), np.ones(3)
    assert loaded(model, Plan(values={"0.bias": ones, "1.bias": ones}))[0].bias.tolist() == [1, 1, 1]
    with pytest.raises(
        CollapseError, match=r"different values for 0\.bias and 1\.bias, which are one tensor"
    ):
        new_values(model, Plan(values={"0.bias": ones, "1.bias": 2 * ones}))


def test_a_parameter_may_not_get_two_different_values():
    step = Collapse(Site(3, ("3",), ("4",)), [0], biases={"4": np.ones(3)})
    with pytest.raises(CollapseError, match=r"two different values for 4\.bias: give one"):
        new_values(network(), Plan((step,), {"4.bias": np.zeros(3)}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"3.wieght": np.ones((3, 16))}, r"Sequential has no '3\.wieght' .*did you mean '3\.weight'"),
        ({"9.weight": np.ones(3)}, r"no '9\.weight'"),
        ({"something": np.ones(3)}, r"see model\.state_dict"),
        ({"2.bias": np.ones(3)}, r"no '2\.bias'"),
        ({"3.weight": np.ones((3, 4))}, r"value of 3\.weight must have shape \(3, 16\), got \(3, 4\)"),
        ({"0.bias": np.ones(3)}, r"must have shape \(4,\), got \(3,\)"),
        ({"1.num_batches_tracked": np.ones(1)}, r"must have shape \(\), got \(1,\)"),
        ({"3.weight": np.full((3, 16), 1e39)}, r"not finite in torch\.float32"),
        ({"1.running_var": np.full(4, np.nan)}, "value of 1.running_var are not finite"),
        ({"1.num_batches_tracked": np.array(np.nan)}, r"not finite in torch\.int64"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message):
    with pytest.raises(CollapseError, match=message):
        new_values(network(), Plan(values=values))


@pytest.mark.parametrize(
    ("reader", "columns"),
    [
        (nn.ConvTranspose1d(4, 3, 1), [[0], [1], [2], [3]]),
        (nn.Conv1d(4, 2, 1, groups=2), [[0], [1], [2], [3]]),
        (nn.Linear(6, 3), [[0], [1], [2], [3]]),
    ],
)
def test_readers_whose_weight_is_no_matrix_of_the_site_get_theirs_as_values(reader, columns):
    site = Site(4, ("0",), ("1",), columns={"1": columns})
    with pytest.raises(CollapseError, match=r"give 1\.weight in the plan's values"):
        new_values(
            nn.Sequential(nn.Linear(2, 4), reader), Plan((Collapse(site, [0], {"1": np.ones((3, 1))}),))
        )
