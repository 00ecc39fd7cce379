"""Divergence is zero between equals, what its formula says otherwise, and independent of batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Net, network, vectors
from torch import nn
from torch.nn.functional import kl_div

from pysolve.errors import DataError
from pysolve.nn.divergence import kl_divergence, mean_divergence, rows_of, run

# Shapes of outputs with classes, and the dimension that these lie along.
CLASSES = {(5, 4): 1, (5, 7, 4): 2, (5, 4, 3, 3): 1, (5, 4, 2, 3, 3): 1}


def draw(shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from([*CLASSES, (5,), (5, 1), ()]), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 30.0]))
def test_divergence_is_zero_between_equals_and_never_negative(shape, seed, scale):
    a, b = draw(shape, seed, scale), draw(shape, seed + 100, scale)
    assert kl_divergence(a, a.clone()) == 0.0
    assert kl_divergence(a, b) >= 0.0
    assert math.isfinite(kl_divergence(a, b))


@pytest.mark.parametrize(("shape", "dim"), CLASSES.items())
def test_divergence_of_classes_is_that_of_torch_per_sample_and_position(shape, dim):
    a, b = draw(shape, 0), draw(shape, 1)
    total = kl_div(b.double().log_softmax(dim), a.double().log_softmax(dim), reduction="sum", log_target=True)
    assert kl_divergence(a, b).item() == pytest.approx(total.item() / (a.numel() / shape[dim]))


@pytest.mark.parametrize(("shape", "rows"), [*zip(CLASSES, (5, 35, 45, 90), strict=True), ((5,), 5), ((), 1)])
def test_rows_are_the_samples_and_positions_that_the_mean_is_taken_of(shape, rows):
    assert rows_of(torch.zeros(shape)) == rows
    assert rows_of({"loss": torch.zeros(()), "logits": torch.zeros(shape)}) == rows


def test_divergence_is_not_changed_by_a_shift_of_all_logits():
    a, b = draw((5, 4), 0), draw((5, 4), 1)
    assert kl_divergence(a + 3, b - 7).item() == pytest.approx(kl_divergence(a, b).item(), rel=1e-5)


@given(st.integers(0, 99))
def test_numbers_are_compared_by_their_squared_error_per_variance(seed):
    a, b = draw((20,), seed), draw((20,), seed + 100)
    wanted = 0.5 * ((b - a) ** 2).mean() / a.var(correction=0)
    assert kl_divergence(a, b).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert kl_divergence(a[:, None], b[:, None]).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_structures_are_compared_by_logits_or_by_what_comes_first():
    a, b = draw((5, 4), 0), draw((5, 4), 1)
    wanted = kl_divergence(a, b)
    other = torch.zeros(5, 4)
    assert kl_divergence({"hidden": other, "logits": a}, {"hidden": other, "logits": b}) == wanted
    assert kl_divergence((a, other), (b, other)) == wanted
    assert kl_divergence([[a], other], [[b], other]) == wanted


@pytest.mark.parametrize("kind", [tuple, lambda pair: {"classes": pair[0], "depths": pair[1]}])
def test_outputs_after_the_first_are_added_as_numbers(kind):
    (a, b), (c, d) = ((draw(shape, 0), draw(shape, 1)) for shape in ((5, 4), (5, 7, 2)))
    by_size = 0.5 * ((d - c) ** 2).mean().item() / (c - c.mean(0)).square().mean().item()
    first = kl_divergence(kind((a, c)), kind((b, c))).item()
    assert first > 0
    assert kl_divergence(kind((a, c)), kind((b, d))).item() == pytest.approx(first + by_size, rel=1e-5)


def test_counts_losses_masks_and_rows_that_data_choose_are_no_further_output():
    a, b = draw((5, 4), 0), draw((5, 4), 1)
    mask = torch.full((4, 4), -torch.inf).triu(1)
    ids, loss = torch.arange(5), torch.tensor(3.0)
    found = kl_divergence(
        (loss, ids, a, mask, draw((3, 2), 0)), (loss + 1, ids + 1, b, mask, draw((2, 2), 0))
    )
    assert found == kl_divergence(a, b)


def test_outputs_of_other_shapes_are_refused_with_a_remedy():
    with pytest.raises(DataError, match=r"shape \[5, 4\], .*\[3, 4\].* give a divergence= that can"):
        kl_divergence(draw((5, 4), 0), draw((3, 4), 0))


def test_padding_counts_in_no_output():
    a, b = draw((2, 6, 4), 0), draw((2, 6, 4), 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "attention_mask": mask}
    found = mean_divergence([(a, 2 * a)], iter([(b, 2 * b)]), [batch], kl_divergence)
    real = mask.bool()
    assert found == pytest.approx(kl_divergence((a[real], 2 * a[real]), (b[real], 2 * b[real])).item())


def test_hidden_states_are_compared_by_squared_errors():
    a, b = draw((5, 7, 4), 0), draw((5, 7, 4), 1)
    spread = (a - a.mean(0)).square().mean()
    found = kl_divergence({"last_hidden_state": a, "pooled": None}, {"last_hidden_state": b, "pooled": None})
    assert found.item() == pytest.approx(0.5 * ((a - b) ** 2).mean().item() / spread.item(), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1)])
def test_single_outputs_and_those_that_never_change_are_compared_by_their_size(shape, value):
    a = torch.full(shape, value)
    assert kl_divergence(a, a) == 0.0
    assert kl_divergence(a, a + 1).item() == pytest.approx(0.5 / (value**2 or 1))


def test_classes_that_are_switched_off_have_no_part():
    a, b = draw((5, 4), 0), draw((5, 4), 1)
    off = torch.full((5, 2), -torch.inf)
    found = kl_divergence(torch.cat([a, off], 1), torch.cat([b, off], 1))
    assert found.item() == pytest.approx(kl_divergence(a, b).item())


@pytest.mark.parametrize("output", ["text", (), {}, None])
def test_an_output_without_tensors_is_refused(output):
    with pytest.raises(TypeError, match="expected a tensor in the network's output"):
        kl_divergence(output, output)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(-2, 2).map(lambda power: 10**power),
    st.floats(-5, 2).map(lambda power: 10**power),
    st.integers(0, 999),
)
def test_logits_of_few_digits_tell_what_the_same_numbers_in_double_tell(kind, size, apart, seed):
    a = draw((5, 40), seed) * size
    b = a + apart * draw((5, 40), seed + 1)
    a, b = a.to(kind), b.to(kind)
    wanted = kl_divergence(a.double(), b.double()).item()
    # Divergences below 1e-9 count as none.
    assert kl_divergence(a, b).item() == pytest.approx(wanted, rel=1e-4, abs=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_mean_over_batches_is_that_over_all_samples(sizes):
    a, b = draw((sum(sizes), 4), 0), draw((sum(sizes), 4), 1)
    found = mean_divergence(a.split(sizes), iter(b.split(sizes)), a.split(sizes), kl_divergence)
    assert found == pytest.approx(kl_divergence(a, b).item())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_original_with_outputs_that_are_not_finite_is_named(value):
    bad = draw((5, 4), 0)
    bad[1, 2] = value
    with pytest.raises(DataError, match="as it was given has NaN or infinity in 1 of 20 outputs"):
        mean_divergence([bad], iter([draw((5, 4), 1)]), [bad], kl_divergence)


@pytest.mark.parametrize("name", ["residual", "keywords", "in_place", "norm_without_affine"])
def test_running_with_other_values_is_running_a_network_that_has_them(name):
    model, batch = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    values = {key: value + 0.1 for key, value in before.items() if value.is_floating_point()}
    some = dict(list(values.items())[::2])
    (found,) = run(model, [batch], some)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (own,) = run(model, [batch])
    model.load_state_dict({**before, **some})
    (wanted,) = run(model, [batch])
    assert kl_divergence(found, wanted).item() == pytest.approx(0, abs=1e-12)
    assert kl_divergence(own, wanted) > 1e-9


def test_a_layer_of_two_names_has_its_own_values_back_afterwards():
    layer = nn.Linear(4, 4)
    model = Net(lambda net, x: net.second(net.first(x)), first=layer, second=layer)
    weight, before = layer.weight, layer.weight.detach().clone()
    (found,) = run(model, [vectors(3, 4)], {"first.weight": 2 * before})
    assert model.first.weight is model.second.weight is weight
    assert torch.equal(weight, before)
    weight.data.mul_(2)
    assert torch.equal(found, next(run(model, [vectors(3, 4)])))


def test_running_leaves_modes_and_batches_alone():
    model = Net(lambda net, x: net.fc(net.drop(x.mul_(2))), fc=nn.Linear(4, 3), drop=nn.Dropout()).train()
    x = vectors(5, 4)
    first = [list(run(model, [x], values)) for values in (None, {}, {"fc.bias": model.fc.bias})]
    assert torch.equal(x, vectors(5, 4))
    assert all(torch.equal(outputs[0], first[0][0]) for outputs in first)
    assert model.training
    assert model.drop.training
    assert not first[0][0].requires_grad


def test_whoever_stops_listening_keeps_gradients_and_modes():
    model = nn.Linear(2, 2).train()
    outputs = run(model, [torch.ones(1, 2)] * 2)
    next(outputs)
    assert torch.is_grad_enabled()
    assert model.training


def test_random_networks_draw_the_same_for_the_same_batch_and_the_state_outside_stays():
    model, batch = network("noisy")
    state = torch.get_rng_state()
    (first,), (second,) = run(model, [batch]), run(model, [batch], {})
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), torch.tensor([0.25]), 1])
def test_a_divergence_of_the_users_may_be_any_single_number(value):
    x = torch.randn(4, 3)
    assert mean_divergence([x], iter([x]), [x], lambda one, other: value) == float(value)


@pytest.mark.parametrize("value", [None, "0.2", True, torch.ones(4, 3), np.ones(2), torch.tensor(1j)])
def test_a_divergence_that_is_no_number_is_refused(value):
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=f"divergence must return one number.*{type(value).__name__}"):
        mean_divergence([x], iter([x]), [x], lambda one, other: value)
