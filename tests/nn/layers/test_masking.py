"""Masked weights are zero whatever an optimiser does, and leave no trace when the masks go."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pysolve as ps
from pysolve.nn.files.storage import bits
from pysolve.nn.layers.masking import below, mask_weights, masks_of, remove_masks, unmasked
from pysolve.nn.zoo import Mlp

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}


def mlp():
    torch.manual_seed(0)
    return Mlp((6, 8, 3))


def random_masks(model, seed=0, names=("fc1", "fc2")):
    rng = np.random.default_rng(seed)
    return {name: rng.random(tuple(model.get_submodule(name).weight.shape)) < 0.5 for name in names}


def steps(model, optimizer, count=3, seed=0):
    x = torch.randn(count, 10, 6, generator=torch.Generator().manual_seed(seed))
    for batch in x:
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()


def same_bits(a, b):
    return torch.equal(bits(a.detach()), bits(b.detach()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("splicing", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_zeros_stay_zero_and_the_others_move(kind, splicing, before):
    model = mlp()
    masks = random_masks(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    if before:
        # Momentum from before the masks pushes also what is pruned.
        steps(model, optimizer)
    mask_weights(model, masks, splicing=splicing)
    old = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    steps(model, optimizer)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.detach()
        assert torch.equal(bits(weight[~torch.from_numpy(mask)]), bits(torch.zeros(int((~mask).sum()))))
        assert (weight != old[name])[torch.from_numpy(mask)].all()


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans()
)
def test_what_is_in_use_is_exactly_the_kept_weights(seed, dtype, splicing):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(5, 4).to(dtype)
    scale = 10.0 ** torch.randint(-20, 20, (4, 5), generator=generator)
    weight = (torch.randn(4, 5, generator=generator) * scale).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    mask = torch.rand(4, 5, generator=generator) < 0.5
    model = nn.Sequential(layer)
    mask_weights(model, {"0": mask}, splicing=splicing)
    wanted = torch.where(mask, weight, 0.0)
    assert same_bits(layer.weight, wanted)
    remove_masks(model)
    assert same_bits(layer.weight, wanted)


def test_pruned_weights_that_are_not_finite_are_zero_too():
    model = mlp()
    with torch.no_grad():
        model.fc1.weight[0, :2] = torch.tensor([float("inf"), float("nan")])
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[0, :2] = False
    mask_weights(model, {"fc1": mask})
    assert model.fc1.weight[0, :2].tolist() == [0, 0]


def test_pruned_weights_get_a_gradient_only_where_they_may_come_back():
    for splicing in (False, True):
        model = mlp()
        masks = random_masks(model)
        mask_weights(model, masks, splicing=splicing)
        model(torch.randn(4, 6)).square().sum().backward()
        gone = below(model.fc2).grad[~torch.from_numpy(masks["fc2"])]
        assert bool((gone != 0).all()) is splicing
        assert bool((gone == 0).all()) is not splicing


def test_a_spliced_weight_comes_back_as_it_became_meanwhile():
    model = mlp()
    mask_weights(model, {"fc2": np.zeros((3, 8), bool)}, splicing=True)
    old = below(model.fc2).detach().clone()
    # Below all pruned weights gradients are those of the network without them.
    steps(model, torch.optim.SGD(model.parameters(), 0.1))
    masks_of(model)["fc2"].mask.fill_(True)
    assert torch.equal(model.fc2.weight, below(model.fc2))
    assert not torch.equal(model.fc2.weight, old)


@pytest.mark.parametrize("splicing", [False, True])
def test_optimisers_keep_their_parameters_through_masking_and_removing(splicing):
    model = mlp()
    given_to = {id(parameter) for parameter in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask_weights(model, random_masks(model), splicing=splicing)
    assert {id(parameter) for parameter in model.parameters()} == given_to
    remove_masks(model)
    assert {id(parameter) for parameter in model.parameters()} == given_to
    assert type(model.fc1) is nn.Linear
    assert not masks_of(model)
    old = model.fc1.weight.detach().clone()
    steps(model, optimizer)
    assert (model.fc1.weight != old).all()


def test_state_dicts_go_round_between_masked_copies():
    model = mlp()
    mask_weights(model, random_masks(model, seed=1))
    other = mlp()
    mask_weights(other, random_masks(model, seed=2))
    other.load_state_dict(model.state_dict())
    assert same_bits(other.fc1.weight, model.fc1.weight)
    assert torch.equal(masks_of(other)["fc1"].mask, masks_of(model)["fc1"].mask)


def test_copies_are_masked_and_independent():
    model = mlp()
    mask_weights(model, random_masks(model))
    again = copy.deepcopy(model)
    assert [*masks_of(again)] == ["fc1", "fc2"]
    used = model.fc1.weight.detach().clone()
    masks_of(again)["fc1"].mask.fill_(False)
    steps(again, torch.optim.SGD(again.parameters(), 0.1))
    assert torch.equal(model.fc1.weight, used)
    assert not again.fc1.weight.any()


def test_data_types_and_modes_follow_the_network():
    model = mlp()
    masks = random_masks(model)
    mask_weights(model, masks)
    model.double().eval()
    assert model.fc1.weight.dtype == torch.float64
    assert masks_of(model)["fc1"].mask.dtype == torch.bool
    assert not model.fc1.weight[~torch.from_numpy(masks["fc1"])].any()


def test_another_mask_replaces_the_first_and_what_was_pruned_is_zero():
    model = mlp()
    first = random_masks(model, seed=1, names=["fc1"])["fc1"]
    mask_weights(model, {"fc1": first})
    mask_weights(model, {"fc1": np.ones_like(first)})
    assert len(model.fc1.parametrizations.weight) == 1
    assert not model.fc1.weight[~torch.from_numpy(first)].any()


def test_removing_the_masks_of_a_copy_leaves_the_network_masked():
    model = mlp()
    assert unmasked(model) is model
    mask_weights(model, random_masks(model))
    plain = unmasked(model)
    assert masks_of(model)
    assert not masks_of(plain)
    x = torch.randn(4, 6)
    assert torch.equal(plain(x), model(x))
    assert [*plain.state_dict()] == [*mlp().state_dict()]


def test_layers_with_other_computed_parameters_are_masked_and_unmasked():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    model = nn.Sequential(layer)
    mask_weights(model, {"0": np.eye(4, dtype=bool)})
    other, used = copy.deepcopy(model), layer(torch.eye(4))
    remove_masks(model)
    for one in (model, other):
        assert torch.equal(one(torch.eye(4)), used)
        assert isinstance(one[0].parametrizations.bias[0], nn.Tanh)
    assert isinstance(layer.weight, nn.Parameter)


def test_a_layer_under_two_names_has_one_mask():
    model = mlp()
    model.again = model.fc1
    mask = random_masks(model)["fc1"]
    mask_weights(model, {"fc1": mask, "again": mask})
    assert [*masks_of(model)] == ["fc1"]
    assert model.again.weight is not None
    assert len(model.fc1.parametrizations.weight) == 1
    remove_masks(model)
    with pytest.raises(ValueError, match="fc1 and again are one layer and need one mask, got two different"):
        mask_weights(model, {"fc1": mask, "again": ~mask})
    assert not masks_of(model)


def test_weights_of_several_layers_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="1 shares its weight with 0: untie them"):
        mask_weights(model, {"1": np.ones((4, 4), bool)})


def test_computed_weights_are_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="the weight of 0 is computed from other values"):
        mask_weights(model, {"0": np.ones((4, 4), bool)})


def test_masks_that_do_not_fit_are_refused_before_anything_is_changed():
    model = mlp()
    good = np.ones((8, 6), bool)
    with pytest.raises(TypeError, match="masks must be a mapping of layers to masks, got list"):
        mask_weights(model, [good])
    for name, mask in (("fc2", np.ones((8, 3), bool)), ("fc2", np.ones((3, 8))), ("", good)):
        with pytest.raises(ValueError, match=f"the mask of {name} must be of booleans in its weight's shape"):
            mask_weights(model, {"fc1": good, name: mask})
    with pytest.raises(ps.LayerNotFoundError, match="fc9"):
        mask_weights(model, {"fc1": good, "fc9": good})
    assert not masks_of(model)
