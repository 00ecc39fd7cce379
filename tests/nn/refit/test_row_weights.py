"""Rows of networks of tokens weigh what errors there mean to the tokens; least squares are weighed so."""

import numpy as np
import pytest
import torch
from graphs import traced as trace
from hypothesis import given
from hypothesis import strategies as st
from small import network
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pysolve.nn.graph.branches import Kept
from pysolve.nn.ranks import ALONE
from pysolve.nn.refit import lockstep, row_weights
from pysolve.nn.refit.layer_refit import Sampling


class Tokens(nn.Module):
    """Predicts tokens from those in front of them; two layers read one tensor."""

    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(9, 5), nn.Linear(5, 7), nn.Linear(5, 7, bias=False)
        self.mix, self.head = nn.Linear(7, 6), nn.Linear(6, 9)

    def forward(self, ids):
        x = self.words(ids)
        y = (self.a(x) * torch.sigmoid(self.b(x))).cumsum(1) / 3
        return self.head(F.gelu(self.mix(y)))


def tokens(batches=2):
    torch.manual_seed(0)
    model = Tokens().eval()
    nn.init.normal_(model.head.weight, std=2.0)
    return model, [torch.randint(9, (4, 6)) for _ in range(batches)]


def expected_squares(model, ids, name):
    """E‖∂ log p(t) / ∂y‖² of a layer's rows, over all tokens t of all positions."""
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda layer, args, y: kept.append(y))
    log_p = model(ids).log_softmax(-1)
    handle.remove()
    total = torch.zeros(ids.shape)
    for place in range(ids.shape[1]):
        for t in range(log_p.shape[-1]):
            gradient = torch.autograd.grad(log_p[:, place, t].sum(), kept[0], retain_graph=True)[0]
            total += (log_p[:, place, t].exp()[:, None] * gradient.square().sum(-1)).detach()
    return total


def test_weights_are_the_expected_gradients_of_drawn_predictions(monkeypatch):
    # It takes longer than all else here.
    monkeypatch.setattr(row_weights, "give_back", lambda: None)
    model, (ids,) = tokens(1)
    graph = trace(model, ids)
    draws = 600
    mean = dict.fromkeys(("mix", "head", "a", "b"), torch.zeros(()))
    for seed in range(draws):
        weights = row_weights.row_weights(graph, model, [ids], seed=seed, ranks=ALONE)
        mean = {name: one + weights[name][0][..., 0] ** 4 / draws for name, one in mean.items()}
    wanted = {name: expected_squares(model, ids, name) for name in mean}
    # Layers that read one tensor weigh the same.
    wanted["a"] = wanted["b"] = wanted["a"] + wanted["b"]
    for name, one in mean.items():
        assert (one - wanted[name]).abs().sum() <= 0.1 * wanted[name].sum(), name


@pytest.mark.parametrize("least", [1, 2])
def test_large_batches_run_in_parts(least, monkeypatch):
    model, batches = tokens()
    graph = trace(model, batches[0])
    whole = row_weights.row_weights(graph, model, batches, ranks=ALONE)
    monkeypatch.setattr(row_weights, "traced_bytes", lambda graph: 10**15)
    calls = []
    model.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    parts = row_weights.row_weights(graph, model, batches, ranks=ALONE, least=least)
    # The first to see what the network predicts.
    assert calls == [least] * (1 + 8 // least)
    for name, one in parts.items():
        for own, all_at_once in zip(one, whole[name], strict=True):
            torch.testing.assert_close(own, all_at_once, rtol=1e-4, atol=1e-6)


def test_products_of_bfloat16_weigh_alike(monkeypatch):
    """But for the few tokens of which another was drawn."""
    model, batches = tokens(6)
    graph = trace(model, batches[0])
    exact = row_weights.row_weights(graph, model, batches, ranks=ALONE)
    monkeypatch.setattr(row_weights, "_LARGE", 1)
    monkeypatch.setattr(row_weights, "_multiplies_bfloat16", lambda device: True)
    rough = row_weights.row_weights(graph, model, batches, ranks=ALONE)
    for name, weights in exact.items():
        a, b = torch.cat(weights), torch.cat([*rough[name]])
        assert b.dtype == a.dtype
        assert 0 < ((a - b).abs() / a).median() <= 0.02, name
    monkeypatch.setattr(row_weights, "_LARGE", 10**6)
    same = row_weights.row_weights(graph, model, batches, ranks=ALONE)
    assert all(torch.equal(torch.cat(one), torch.cat(same[name])) for name, one in map(tuple, exact.items()))


@pytest.mark.parametrize("name", ["residual", "swiglu"])
def test_networks_of_one_prediction_a_sample_weigh_nothing(name):
    model, batch = network(name)
    graph = trace(model, batch)
    assert row_weights.row_weights(graph, model, [batch], ranks=ALONE) == {}


def test_code_that_runs_again_for_the_gradient_weighs_the_same():
    model, (ids,) = tokens(1)
    graph = trace(model, ids)
    plain = row_weights.row_weights(graph, model, [ids], ranks=ALONE)
    run = model.forward
    model.forward = lambda ids: checkpoint(run, ids, use_reentrant=False)
    again = row_weights.row_weights(graph, model, [ids], ranks=ALONE)
    assert again.keys() == plain.keys() != set()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_networks_without_gradients_weigh_nothing():
    model, (ids,) = tokens(1)
    graph = trace(model, ids)
    run = model.forward
    model.forward = lambda ids: run(ids).detach()
    assert row_weights.row_weights(graph, model, [ids], ranks=ALONE) == {}


@given(st.integers(0, 100), st.sampled_from([3, 10**6]))
def test_a_refit_is_the_weighed_least_squares(seed, rows):
    model, batches = tokens()
    graph = trace(model, batches[0])
    seen = {}

    def fit(name, correlations, intercept):
        seen[name] = correlations
        layer = model.get_submodule(name)
        weight = layer.weight.detach().double().numpy()
        return weight[
            :, : len(correlations.xx)
        ], None if layer.bias is None else layer.bias.detach().double().numpy()

    cuts = {name: Kept(np.arange(3), np.arange(7)) for name in ("a", "b")}
    sampling = Sampling(rows_per_input=rows, seed=seed)
    weights = row_weights.row_weights(graph, model, batches, seed=seed, ranks=ALONE)
    how = {"sampling": sampling, "row_weights": weights, "progress": False}
    lockstep.refit(graph, model, batches, cuts, fit, values={}, **how)
    for name in ("a", "b"):
        layer, found = model.get_submodule(name), seen[name]
        x = torch.cat([model.words(ids).detach() for ids in batches])
        y, w = layer(x).detach(), torch.cat(weights[name])
        X, Y, W = (one.flatten(0, -2).double().numpy() for one in (x, y, w))
        X = X[:, :3]
        if rows == 3:
            random = torch.Generator().manual_seed(seed)
            share = rows * 3 / len(X)
            per = len(X) // len(batches)
            some = [
                torch.randperm(per, generator=random)[: max(1, round(share * per))].sort().values
                for _ in batches
            ]
            chosen = np.concatenate([i * per + one.numpy() for i, one in enumerate(some)])
            X, Y, W = X[chosen], Y[chosen], W[chosen]
        W = W / W.mean()
        assert found.count == len(X)
        np.testing.assert_allclose(found.xx, (W * X).T @ X, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.yx, (W * Y).T @ X, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found.yy if found.yy.ndim == 1 else np.diag(found.yy), (W * Y * Y).sum(0), rtol=1e-4
        )
        np.testing.assert_allclose(found.x_sum, (W * X).sum(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.y_sum, (W * Y).sum(0), rtol=1e-4, atol=1e-5)
