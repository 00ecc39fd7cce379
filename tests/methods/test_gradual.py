"""Pruning with training: never the original, exactly the amount, and a plan that makes the same again."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pysolve as ps
from pysolve.cli.datasets import digits
from pysolve.methods.gradual import network_surgery, prune_gradually
from pysolve.nn.cost.nonzeros import nonzeros
from pysolve.nn.evaluate import accuracy
from pysolve.nn.layers.masking import masks_of, unmasked
from pysolve.nn.layers.sparse import SparseLinear
from pysolve.nn.zoo import Mlp
from pysolve.training.fit import fit

BOTH = pytest.mark.parametrize("prune", [prune_gradually, network_surgery])


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 40), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(40, 5)).eval()


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, 0, :5, 0].argmax(1)), batch_size=10, shuffle=True)


def zeros(model):
    return {name: int((weight == 0).sum()) for name, weight in unmasked(model).named_parameters()}


def same(a, b):
    a, b = unmasked(a).state_dict(), unmasked(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@BOTH
@pytest.mark.parametrize("layout", ["dense", "masked", "auto"])
def test_the_amount_is_met_exactly_and_the_original_is_not_changed(prune, layout):
    model = network()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    result = prune(model, loader(), amount=0.8, epochs=2, layout=layout, evaluate=lambda _: 1.0)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in unmasked(result.model).modules()] == [False] * 8
    weights = [f"{i}.weight" for i in (0, 4, 6)]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if layout != "auto":
        assert sum(zeros(result.model)[name] for name in weights) == int(0.8 * sum(sizes[n] for n in weights))
    assert {line.name for line in result.report.layers} == {"0", "4", "6"}
    assert result.report.score_after == 1.0
    assert "trained on labels for 2 epochs" in str(result.report)
    assert bool(masks_of(result.model)) is (layout == "masked")


@BOTH
@pytest.mark.parametrize("layout", ["dense", "sparse", "masked"])
def test_the_plan_and_the_file_make_the_same_network(prune, layout, tmp_path):
    model = network()
    result = prune(model, loader(), amount=0.8, epochs=1, layout=layout)
    changed = {"0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked", "4.bias"}
    assert changed <= result.plan.values.keys()
    assert same(ps.apply(model, result.plan), result.model)
    ps.save(result, tmp_path / "a.safetensors")
    loaded = ps.load(tmp_path / "a.safetensors", network())
    x = torch.randn(7, 3, 8, 8)
    assert torch.equal(loaded(x), result.model(x))


@BOTH
def test_layers_without_an_amount_and_ignored_ones_keep_all(prune):
    result = prune(network(), loader(), amount={"4": 0.9, "6": 0.5}, ignore=["6"], epochs=1, layout="dense")
    assert zeros(result.model)["4.weight"] == int(0.9 * 288 * 40)
    assert [zeros(result.model)[f"{i}.weight"] for i in (0, 6)] == [0, 0]
    assert [line.name for line in result.report.layers] == ["4"]


@BOTH
def test_the_same_seed_gives_the_same_network(prune):
    results = [prune(network(), loader(), amount=0.7, epochs=1, seed=seed).model for seed in (3, 3, 4)]
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@BOTH
def test_stages_chain_also_after_a_masked_one(prune, tmp_path):
    model = network()
    first = ps.prune(model, amount={"4": 0.5}, layout="masked")
    result = prune(first, loader(), amount=0.8, epochs=1, layout="masked")
    assert masks_of(first.model)
    again = model
    for plan in (*result.earlier, result.plan):
        again = ps.apply(again, plan)
    assert same(again, result.model)
    ps.save(result, tmp_path / "a.safetensors")
    assert same(ps.load(tmp_path / "a.safetensors", network()), result.model)


@BOTH
def test_a_masked_network_can_be_the_first(prune, tmp_path):
    masked = ps.prune(network(), amount=0.5, layout="masked").model
    result = prune(masked, loader(), amount=0.8, epochs=1)
    ps.save(result, tmp_path / "a.safetensors")
    assert same(ps.load(tmp_path / "a.safetensors", masked), result.model)


@BOTH
def test_batches_may_be_a_generator_and_layers_sparse_already(prune):
    sparse = ps.prune(network(), amount={"4": 0.9}, ignore=["0", "6"], layout="sparse")
    assert isinstance(sparse.model[4], SparseLinear)
    result = prune(sparse, (batch for batch in loader()), amount={"0": 0.5}, epochs=1, layout="dense")
    assert zeros(result.model)["0.weight"] == 108
    assert any(note.startswith("sparse layers got no more zeros: 4;") for note in result.report.notes)
    assert same(ps.apply(sparse.model, result.plan), result.model)


def test_more_zeros_are_asked_for_by_a_higher_rate():
    counts = [
        sum(zeros(network_surgery(network(), loader(), rate=c, epochs=1, layout="dense").model).values())
        for c in (-5.0, 0.0, {"4": 2.0, "6": 1.0, "0": 1.0})
    ]
    assert counts[0] == 0
    assert counts == sorted(set(counts))


def test_a_layer_under_two_names_is_pruned_once():
    torch.manual_seed(0)
    model = Mlp((6, 8, 8, 3))
    model.again = model.fc2
    x = torch.randn(40, 6)
    result = prune_gradually(model, [(x, x[:, :3].argmax(1))], amount=0.5, epochs=2, layout="masked")
    assert [line.name for line in result.report.layers] == ["fc1", "fc2", "fc3"]
    assert result.model.again is result.model.fc2
    assert same(ps.apply(model, result.plan), result.model)


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"amount": 1.0}, ValueError, r"amount of all must be in \[0, 1\), got 1.0"),
        ({"amount": {"4": -0.1}}, ValueError, r"amount of 4 must be in \[0, 1\)"),
        ({"amount": {"1": 0.5}}, ValueError, "amount names 1, a BatchNorm2d; layers with weights: 0, 4, 6"),
        ({"amount": {"9": 0.5}}, ps.LayerNotFoundError, "no layer '9'"),
        ({"amount": 0.5, "layout": "coo"}, ValueError, "unknown layout 'coo'"),
        ({"amount": 0.5, "epochs": 0}, ValueError, "must be positive"),
        ({"amount": 0.5, "epochs": None}, ValueError, "either epochs or seconds"),
        ({"amount": 0.5, "lr": 1e30}, ps.PysolveError, "the loss became"),
    ],
)
def test_wrong_arguments_are_named(prune, options, error, message):
    with pytest.raises(error, match=message):
        prune(network(), loader(), **{"epochs": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either amount or rate"),
        ({"amount": 0.5, "rate": 1.0}, "give either amount or rate"),
        ({"rate": float("nan")}, "rate of all must be a finite number"),
        ({"rate": {"4": float("inf")}}, "rate of 4 must be a finite number"),
        ({"amount": 0.5, "probability": 0.0}, r"probability must be in \(0, 1\]"),
        ({"amount": 0.5, "probability": "often"}, "probability must be in .* got often"),
        ({"amount": 0.5, "probability": {"0": 0.5}}, "probability must name every pruned layer"),
    ],
)
def test_wrong_arguments_of_surgery_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        network_surgery(network(), loader(), epochs=1, **options)


def test_wrong_steps_and_shared_weights_are_named_before_training():
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        prune_gradually(network(), loader(), amount=0.5, epochs=1, steps=0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        prune_gradually("network", loader(), amount=0.5, epochs=1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for prune in (prune_gradually, network_surgery):
        with pytest.raises(ps.CollapseError, match="untie them"):
            prune(model, iter(()), amount=0.5, epochs=1)


def test_digits_keep_their_accuracy_with_a_thirtieth_of_the_weights():
    data = digits()
    torch.manual_seed(0)
    model = Mlp((64, 100, 10))
    fit(model, data.x_train, data.y_train, epochs=8, batch_size=64, lr=5e-3, progress=False)
    dense = accuracy(model, data.x_test, data.y_test)
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train).long()
    batches = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    plain = ps.prune(model, amount=0.93).model
    scores = [
        accuracy(prune(model, batches, amount=0.93, epochs=12, lr=1e-2).model, data.x_test, data.y_test)
        for prune in (prune_gradually, network_surgery)
    ]
    assert accuracy(plain, data.x_test, data.y_test) < dense - 10
    assert min(scores) > dense - 4
    assert np.max(scores) > dense - 3


@BOTH
def test_networks_with_a_loss_of_their_own_are_pruned_on_mappings(prune):
    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x, labels=None):
            logits = self.fc(x)
            loss = nn.functional.cross_entropy(logits, labels)
            return {"logits": logits, "loss": loss}

    torch.manual_seed(0)
    model, x = Scored(), torch.randn(16, 6)
    result = prune(model, [{"x": x, "labels": x[:, :3].argmax(1)}], amount=0.5, epochs=2, layout="sparse")
    assert nonzeros(result.model).tensors[0].nonzeros == 9
    assert result.report.divergence >= 0
