"""Weights of recurrent layers are fitted, pruned and coded to what they read."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.methods import rebuild
from pysolve.nn.gathering.recurrent import gather_recurrent, recurrent_weights

QUIET = {"progress": False, "latency": False}


class Tagger(nn.Module):
    def __init__(self, kind, **how):
        super().__init__()
        self.table = nn.Embedding(15, 6)
        self.layer = kind(6, 10, batch_first=True, **how)
        self.head = nn.Linear(20 if how.get("bidirectional") else 10, 15)

    def forward(self, ids):
        return self.head(self.layer(self.table(ids))[0])


@cache
def network(kind=nn.LSTM, **how):
    torch.manual_seed(0)
    model = Tagger(kind, **how).eval()
    # Fewer directions than units, so that some units follow from others.
    for name, weight in recurrent_weights(model).items():
        if "hh" in name:
            U, S, V = torch.linalg.svd(weight.detach())
            weight.data = 2 * (U[:, :10] * S * (torch.arange(10) < 5)) @ V
    return model


@cache
def batches():
    torch.manual_seed(1)
    return [torch.randint(15, (16, 9)) for _ in range(10)]


def restored(result, model, tmp_path):
    ps.save(result, tmp_path / "small.safetensors")
    with torch.no_grad():
        x = batches()[0]
        torch.testing.assert_close(ps.load(tmp_path / "small.safetensors", model)(x), result.model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gates_are_fitted_to_what_they_were(kind, monkeypatch, tmp_path):
    model = network(kind)
    result = ps.compress(model, batches(), target={"macs": 0.6}, **QUIET)
    assert result.model.layer.hidden_size < 10
    restored(result, model, tmp_path)
    monkeypatch.setattr(rebuild, "_gates_refitted", lambda *given: {})
    plain = ps.compress(model, batches(), target={"macs": 0.6}, **QUIET)
    assert any("not refitted: layer.weight_hh_l0:oi" in note for note in plain.report.notes)
    assert not any("not refitted" in note for note in result.report.notes)
    assert result.report.divergence < plain.report.divergence


@pytest.mark.parametrize("how", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_fitted_gates_have_the_least_error_on_their_inputs(how):
    model = network(nn.LSTM, **how)
    sites = [site for site in ps.find_sites(model, batches()[0]) if site.channels == 10]
    result = ps.compress(model, batches(), sites=sites, keep=0.5, **QUIET)
    assert result.plan.steps
    found = gather_recurrent(model, batches(), recurrent_weights(model))
    for step in result.plan.steps:
        for name in {reader.partition(":")[0] for reader in step.site.readers if ":" in reader}:
            known, left = found[name], step.keep
            M = np.asarray(result.plan.values[name], float)[:, left]
            old = model.state_dict()[name].double().numpy()[:, left]
            part = known.restrict(left)
            best = np.linalg.lstsq(part.centered().r_xx, part.centered().r_yx.T, rcond=1e-10)[0].T
            if not how.get("bias", True):
                best = np.linalg.lstsq(part.r_xx, part.r_yx.T, rcond=1e-10)[0].T
            errors = [
                part.error(one, part.bias(one) if how.get("bias", True) else None) for one in (best, M, old)
            ]
            # An eighth of the samples was not fitted to.
            assert errors[0] <= errors[1] * (1 + 1e-9)
            assert errors[1] <= 1.3 * errors[0] + 1e-4 * errors[2]
            assert errors[1] < errors[2]


def test_gates_that_lead_farther_from_the_original_are_not_taken(monkeypatch):
    def worse(study, keep, state):
        return {"layer.weight_hh_l0": 3 * state["layer.weight_hh_l0"]}

    monkeypatch.setattr(rebuild, "_gates_refitted", worse)
    model = network()
    result = ps.compress(model, batches(), target={"macs": 0.6}, **QUIET)
    assert any("keep the weights that they have" in note for note in result.report.notes)
    (units,) = (step for step in result.plan.steps if "layer.weight_hh_l0:oi" in step.site.readers)
    old, new = (one.layer.weight_hh_l0.detach().unflatten(0, (4, -1)) for one in (model, result.model))
    assert torch.equal(new, old[:, units.keep][..., units.keep])


def shares_of_zeros(result):
    return [
        result.model.state_dict()[name].eq(0).double().mean().item() for name in recurrent_weights(network())
    ]


def test_single_weights_go_by_what_they_read(tmp_path):
    model = network()
    found = {
        method: ps.prune(model, batches(), amount=0.5, method=method, **QUIET)
        for method in ("obs", "magnitude")
    }
    for result in found.values():
        assert shares_of_zeros(result) == pytest.approx([0.5, 0.5], abs=0.01)
        restored(result, model, tmp_path)
    assert found["obs"].report.divergence < 0.5 * found["magnitude"].report.divergence
    whole = ps.prune(model, batches(), amount=0.5, method="obs", scope="global", **QUIET)
    names = [line.name for line in whole.report.layers]
    assert "layer.weight_hh_l0" in names
    half = ps.prune(model, batches(), pattern="2:4", method="obs", ignore=["table", "head"], **QUIET)
    # Six inputs and ten hold one and two groups of four.
    assert shares_of_zeros(half) == pytest.approx([2 / 6, 4 / 10])


def test_masks_and_training_leave_recurrent_weights_alone():
    masked = ps.prune(network(), batches(), amount=0.5, method="magnitude", layout="masked", **QUIET)
    layouts = {line.name: line.layout for line in masked.report.layers}
    assert layouts == {"layer.weight_ih_l0": "dense", "layer.weight_hh_l0": "dense", "head": "masked"}
    trained = ps.prune(network(), batches(), amount=0.5, distill={"epochs": 1}, **QUIET)
    assert shares_of_zeros(trained) == [0, 0]
    assert any("a weight of LSTM" in note for note in trained.report.notes)


def test_codes_of_few_bits_know_what_they_read(tmp_path):
    model = network()
    feedback = ps.quantize(model, batches(), scheme="codebook", bits=2, **QUIET)
    for name in recurrent_weights(model):
        assert len(feedback.model.state_dict()[name].unique()) <= 4
    restored(feedback, model, tmp_path)
    nearest = ps.quantize(model, batches(), scheme="codebook", bits=2, method="nearest", **QUIET)
    assert feedback.report.divergence < nearest.report.divergence


def test_channels_and_codes_of_recurrent_layers_go_together(tmp_path):
    model = network()
    for how in ({"params": 0.5}, {"bytes": 0.12}):
        result = ps.deep_compress(model, batches(), target={"bytes": 0.2} | how, **QUIET)
        restored(result, model, tmp_path)
    assert result.model.layer.hidden_size <= 10
