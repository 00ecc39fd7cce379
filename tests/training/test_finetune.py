"""Fine-tuning takes any labelled batches; masks that change meanwhile end as they were asked for."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pysolve as ps
from pysolve.layer.masks import lamp_scores, lamp_shares
from pysolve.nn.layers.masking import below, mask_weights, masks_of
from pysolve.nn.zoo import Mlp
from pysolve.training.finetune import finetune
from pysolve.training.moving_masks import gradually, surgery


def mlp(seed=0):
    torch.manual_seed(seed)
    return Mlp((6, 20, 3))


def pairs(n=4, size=16):
    """Batches whose labels are the largest of three inputs."""
    x = torch.randn(n, size, 6, generator=torch.Generator().manual_seed(0))
    return [(one, one[:, :3].argmax(1)) for one in x]


def loader(seed=None):
    x, y = (torch.cat(part) for part in zip(*pairs(), strict=True))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=generator)


def whole(model):
    return {
        name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool) for name in ("fc1", "fc2")
    }


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x[0], y[0]) for x, y in pairs()])


class Scored(nn.Module):
    """Takes its labels along and has a loss of its own, as networks for text do."""

    def __init__(self, kind=SimpleNamespace):
        super().__init__()
        self.fc, self.kind = nn.Linear(6, 3), kind

    def forward(self, x, labels=None):
        logits = self.fc(x)
        return self.kind(logits=logits, loss=None if labels is None else cross_entropy(logits, labels))


# --- fine-tuning


@pytest.mark.parametrize("batches", [pairs(), loader(), DataLoader(Stream(), batch_size=2)])
def test_any_labelled_batches_lower_the_loss(batches):
    history = finetune(mlp(), batches, epochs=8, lr=0.03)
    assert len(history) == 8
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize("labels", [torch.full((6,), 7), torch.zeros(5, dtype=torch.long)])
def test_labels_that_the_cross_entropy_refuses_are_named(labels):
    x = torch.cat([x for x, _ in pairs()])[:6]
    with pytest.raises(ps.DataError, match=r"refuses labels int64\[\d\]: .*counted from 0"):
        finetune(mlp(), [(x, labels)], epochs=1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.int16])
def test_integers_of_any_length_are_labels(dtype):
    ways = [finetune(mlp(), [(x, y.to(kind)) for x, y in pairs()], epochs=2) for kind in (dtype, torch.long)]
    assert ways[0] == ways[1]


@pytest.mark.parametrize("kind", [SimpleNamespace, dict])
def test_mappings_train_a_network_by_its_own_loss(kind):
    history = finetune(Scored(kind), [{"x": x, "labels": y} for x, y in pairs()], epochs=8, lr=0.1)
    assert history[-1] < 0.8 * history[0]


def test_the_same_seed_gives_the_same_network_and_leaves_the_global_state_alone():
    def trained(seed):
        model = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 3))
        torch.manual_seed(5)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        state = torch.get_rng_state()
        finetune(model, loader(), epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        return model[0].weight

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_modes_are_restored_and_what_is_frozen_stays():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    model[2].train()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    finetune(model, pairs(), epochs=1)
    assert [module.training for module in model.modules()] == [False, False, False, True]
    assert torch.equal(model[0].weight, before)
    assert int(model[1].num_batches_tracked) == 4


def test_masked_zeros_stay_zero():
    model = mlp()
    mask = np.random.default_rng(0).random((20, 6)) < 0.3
    mask_weights(model, {"fc1": mask})
    finetune(model, pairs(), epochs=3, lr=0.03, weight_decay=0.01)
    assert not model.fc1.weight[~torch.from_numpy(mask)].any()
    assert model.fc1.weight[torch.from_numpy(mask)].all()


def test_an_own_loss_and_a_time_are_taken():
    shares = []
    history = finetune(
        mlp(),
        pairs(),
        seconds=0.2,
        loss=lambda out, y: (out.argmax(1) - y + out.sum(1)).square().mean(),
        after_step=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert history


def test_a_loss_that_is_not_a_number_is_one_clear_error():
    x, y = pairs(1)[0]
    with pytest.raises(ps.DataError, match="the loss became nan in epoch 1: batch 2 holds NaN or infinity"):
        finetune(mlp(), [(x, y), (x * float("nan"), y)], epochs=2)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (pairs(), {}, "either epochs or seconds"),
        (pairs(), {"epochs": 1, "seconds": 1}, "either epochs or seconds"),
        (pairs(), {"epochs": 0}, "must be positive"),
        (pairs(), {"seconds": float("inf")}, "seconds must be a positive number"),
        (pairs(), {"epochs": 1, "lr": 0}, "lr must be a positive number"),
        ([], {"epochs": 1}, "there are no batches"),
        (torch.zeros(3, 6), {"epochs": 1}, "got one Tensor: wrap it in a list"),
        ([x for x, _ in pairs()], {"epochs": 1}, "batches of inputs and labels, got Tensor"),
        (
            [(x, None) for x, _ in pairs()],
            {"epochs": 1},
            "got tuple of Tensor, NoneType: give tensors of both",
        ),
        ([{"x": x} for x, _ in pairs()], {"epochs": 1}, "whose output has a loss"),
        (pairs(), {"epochs": 1, "loss": lambda *_: 1}, "loss must return a tensor of one number, .* got 1"),
        (pairs(), {"epochs": 1, "loss": lambda output, _: output}, "loss must return a tensor of one number"),
        (pairs(), {"epochs": 1, "loss": lambda *_: torch.ones(())}, "computed from the outputs"),
        (pairs(), {"epochs": 1, "seed": 0.5}, "seed must be an integer within 0"),
        (pairs(), {"epochs": 1, "weight_decay": "l2"}, "weight_decay must be a number of 0 and above"),
        (pairs(), {"epochs": 1, "after_step": 3}, "after_step must be a function, got 3"),
        (pairs(), {"epochs": 1, "evaluate": 3}, "evaluate must be a function, got 3"),
        (pairs(), {"epochs": 1, "checkpoint": "."}, "checkpoint . is a folder: give a file"),
        (pairs(), {"epochs": 1, "progress": None}, "progress must be True or False"),
    ],
)
def test_wrong_arguments_are_named(batches, options, message):
    with pytest.raises((ValueError, TypeError, ps.DataError), match=message):
        finetune(mlp(), batches, **options)


def test_batches_that_run_dry_and_networks_without_parameters_are_named():
    class Once(list):
        def __iter__(self):
            yield from [self.pop() for _ in range(len(self))]

    with pytest.raises(ps.DataError, match="no batches any more"):
        finetune(mlp(), Once(pairs()), epochs=2)
    with pytest.raises(ps.PysolveError, match="no parameter of the network requires a gradient"):
        finetune(mlp().requires_grad_(False), pairs(), epochs=1)
    with pytest.raises(TypeError, match="such as the model of a Compressed; got Compressed"):
        finetune(ps.prune(mlp(), amount=0.5), pairs(), epochs=1)


# --- shares of layers


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.999))
def test_layers_adapt_their_shares_to_an_exact_total(seed, amount):
    rng = np.random.default_rng(seed)
    sizes = {"a": 7, "b": 50, "c": 1}
    weights = {name: rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3) for name, n in sizes.items()}
    shares = lamp_shares(weights, amount)
    gone = {name: round(shares[name] * n) for name, n in sizes.items()}
    assert all(0 <= count <= sizes[name] for name, count in gone.items())
    # The largest weight of each layer scores 1: together they are the last to go.
    wanted = int(amount * 58)
    assert sum(gone.values()) == wanted or (wanted > 55 and sum(gone.values()) >= wanted)
    if wanted <= 55:
        assert all(gone[name] < n for name, n in sizes.items())


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-30, 1e30]))
def test_scores_are_the_parts_of_what_is_left(seed, scale):
    sizes = np.sort(np.abs(np.random.default_rng(seed).standard_normal(9)))
    slow = [w**2 / sum(v**2 for v in sizes[i:]) for i, w in enumerate(sizes)]
    np.testing.assert_allclose(lamp_scores(sizes * scale), slow, rtol=1e-10)
    assert (np.diff(lamp_scores(sizes)) >= 0).all()


def test_scores_of_zeros_are_zero():
    assert lamp_scores(np.zeros(3)).tolist() == [0, 0, 0]
    assert lamp_scores([0, 0, 2]).tolist() == [0, 0, 1]
    assert lamp_scores([]).shape == (0,)


# --- masks that change


def kept(model):
    return {name: int(mask.mask.sum()) for name, mask in masks_of(model).items()}


@given(st.sampled_from([1, 3, 100]), st.floats(0.1, 1.0), st.integers(2, 40))
def test_gradual_pruning_never_gives_back_and_ends_at_the_amount(steps, end, calls):
    model = mlp()
    mask_weights(model, whole(model))
    step = gradually(model, {"fc1": 0.9, "fc2": 0.5}, steps=steps, end=end)
    sizes, masks = [], None
    for share in np.linspace(0, 1, calls):
        step(float(share))
        now = {name: mask.mask.clone() for name, mask in masks_of(model).items()}
        assert masks is None or all(bool((now[name] <= masks[name]).all()) for name in now)
        masks = now
        sizes.append(sum(kept(model).values()))
    assert sizes == sorted(sizes, reverse=True)
    assert kept(model) == {"fc1": 12, "fc2": 30}


def test_the_cubic_schedule_prunes_most_of_it_early():
    model = mlp()
    mask_weights(model, whole(model))
    step = gradually(model, {"fc1": 0.9, "fc2": 0.9}, steps=10, end=1.0)
    step(0.5)
    assert kept(model)["fc1"] == 120 - int(0.9 * (1 - 0.5**3) * 120)


def test_gradual_pruning_keeps_the_largest():
    model = mlp()
    old = model.fc1.weight.detach().abs().flatten()
    mask_weights(model, whole(model))
    gradually(model, {"fc1": 0.7, "fc2": 0.0}, steps=1, end=1.0)(1.0)
    mask = masks_of(model)["fc1"].mask.flatten()
    assert old[mask].min() > old[~mask].max()
    assert masks_of(model)["fc2"].mask.all()


def surgeon(model, **options):
    given_ = {"end": 0.5, "probability": 1.0, "seed": 0} | options
    return surgery(model, **given_)


@pytest.mark.parametrize("amount", [0.8, {"fc1": 0.9, "fc2": 0.5}])
def test_surgery_ends_at_the_amount_exactly_and_masks_then_stay(amount):
    model = mlp()
    mask_weights(model, whole(model), splicing=True)
    step = surgeon(model, amount=amount)
    rng = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.3, 0.5, 0.8):
        with torch.no_grad():
            below(model.fc1).add_(torch.randn(20, 6, generator=rng), alpha=0.02)
        step(share)
        if share == 0.5:
            final = copy.deepcopy(masks_of(model))
    left = kept(model)
    assert sum(left.values()) == 36 if amount == 0.8 else left == {"fc1": 12, "fc2": 30}
    assert all(torch.equal(final[name].mask, mask.mask) for name, mask in masks_of(model).items())


def test_weights_that_grow_are_spliced_in_again_and_those_between_stay_as_they_are():
    model = mlp()
    mask_weights(model, whole(model), splicing=True)
    weight = below(model.fc2)
    with torch.no_grad():
        weight.fill_(1.0)
        weight[0, 0], weight[0, 1] = 0.2, 0.95
    # The weights' sizes have mean 1 − 0.85/60 and next to no deviation.
    step = surgeon(model, rate={"fc1": -10.0, "fc2": 0.0})
    step(0.0)
    mask = masks_of(model)["fc2"].mask
    assert torch.equal(
        ~mask, torch.zeros_like(mask).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(True))
    )
    assert masks_of(model)["fc1"].mask.all()
    for size, inside in ((1.0, False), (1.2, True), (1.0, True), (0.8, False)):
        with torch.no_grad():
            weight[0, 0] = -size
        step(0.0)
        assert bool(mask[0, 0]) is inside
    with torch.no_grad():
        weight[0, 0] = 5.0
    step(0.5)
    assert not mask[0, 0]


def test_masks_are_looked_at_by_chance_and_less_often_towards_the_end():
    model = mlp()
    mask_weights(model, whole(model), splicing=True)
    step = surgeon(model, rate=0.0, probability=0.5, end=1.0)
    looks = []
    for share in np.repeat([0.01, 0.99], 500):
        for mask in masks_of(model).values():
            mask.mask.fill_(True)
        step(float(share))
        looks.append(sum(not mask.mask.all() for mask in masks_of(model).values()))
    assert np.mean(looks[:500]) == pytest.approx(2 * 0.5, abs=0.15)
    assert np.mean(looks[500:]) == pytest.approx(2 * 0.055, abs=0.06)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [nn.MSELoss(), torch.nn.functional.mse_loss, nn.CrossEntropyLoss()])
def test_labels_that_a_loss_of_torchs_refuses_are_named(loss):
    x = torch.cat([x for x, _ in pairs()])[:6]
    with pytest.raises(ps.DataError, match=r"of outputs float32\[6, \d\] refuses labels float32\[5\]: "):
        finetune(mlp(), [(x, torch.zeros(5))], loss=loss, epochs=1)


def test_what_is_no_loss_and_what_is_no_score_are_refused():
    with pytest.raises(TypeError, match="loss must be a function of outputs and labels, got 'mse'"):
        finetune(mlp(), pairs(), loss="mse", epochs=1)
    with pytest.raises(TypeError, match=r"evaluate must return a number, .* got NoneType"):
        finetune(mlp(), pairs(), evaluate=lambda network: None, epochs=1)
