"""Experts that stay are refitted so that their sum is nearest to the original mixture's."""

import functools

import families
import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.methods import compress as compressing
from pysolve.nn.cut.routers import choosing, chosen_by_routers
from pysolve.nn.cut.silenced import silenced
from pysolve.nn.graph.export import trace
from pysolve.nn.graph.mixtures import mixtures_in
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.outputs import tensors_of
from pysolve.nn.refit import expert_refit
from pysolve.nn.refit.lockstep import refit
from pysolve.nn.running import find_layer, forward
from pysolve.solve.least_squares import prior_ridge, pull

EXPERTS, WIDTH, INNER = 6, 5, 7


class Biased(nn.Module):
    """Experts whose tensors have inputs first, with biases behind both products; the weights are weighed."""

    def __init__(self):
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 2)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER) / 2)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 2)
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def __getitem__(self, e):
        return lambda x: (x @ self.up[e] + self.up_bias[e]).relu() @ self.down[e] + self.down_bias[e]


def biased():
    model, batch = small.mixture()
    torch.manual_seed(2)
    model.mixture.experts = Biased()
    return model, batch


def data(count=4, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(64, WIDTH, generator=random) for _ in range(count)]


@functools.cache
def known(make):
    """A network, its graph and its sites of whole experts."""
    model, batch = make()
    return model, trace(model, data()[0]), experts_of(model, batch)


def experts_of(model, batch):
    return [site for site in find_sites(model, batch) if site.router is not None]


def refitted(model, graph, sites, batches, kept):
    """What a walk makes of the experts when some of each mixture stay, and who the routers choose among."""
    keep = {site: np.asarray(kept) for site in sites}
    mixtures, base = mixtures_in(graph, model, keep), silenced(model, keep)
    routers = chosen_by_routers(model, keep)
    new = refit(graph, model, batches, {}, None, values=base, norms=routers, mixtures=mixtures, only=())
    return {name: one for name, one in new.items() if one is not base.get(name)}, routers


def gates(model, x, kept):
    """Weights of the experts that stay, zero for the others."""
    with torch.no_grad():
        logits = torch.full((len(x), EXPERTS), -torch.inf)
        logits[:, kept] = model.mixture.gate(x)[:, kept]
        best, chosen = logits.softmax(-1).topk(model.mixture.top_k, -1)
        best = best / best.sum(-1, keepdim=True)
        return torch.zeros(len(x), EXPERTS).scatter(-1, chosen, best)


def ridge_solution(z, t, prior):
    """The least squares of the refit, as it is written down."""
    z, t, prior = (np.asarray(one.detach(), np.float64) for one in (z, t, prior))
    R, C = z.T @ z / len(z), t.T @ z / len(z)
    penalty = prior_ridge(z.shape[1], len(z)) * np.diag(pull(np.diag(R)))
    change = np.linalg.lstsq(R + penalty, (C - prior @ R).T, rcond=None)[0].T
    return prior + np.where(np.diag(R) > 0, change, 0.0)


@given(st.sets(st.integers(0, EXPERTS - 1), min_size=2, max_size=EXPERTS - 1), st.booleans())
@settings(max_examples=8, deadline=None)
def test_it_is_the_joint_least_squares_on_what_experts_multiply(kept, biases):
    model, graph, sites = known(biased if biases else small.mixture)
    kept, batches = sorted(kept), data()
    new, _ = refitted(model, graph, sites, batches, kept)
    x, experts = torch.cat(batches), model.mixture.experts
    with torch.no_grad():
        p, target = gates(model, x, kept), model.mixture(x)
        parts, prior = [], []
        for e in kept:
            up = experts.up[e] if biases else experts.up[e].T
            hidden = (x @ up + experts.up_bias[e]).relu()
            parts += [p[:, e, None] * hidden, *([p[:, e, None]] if biases else [])]
            down = experts.down[e].T if biases else experts.down[e]
            prior += [down, *([experts.down_bias[e][:, None]] if biases else [])]
    wanted = ridge_solution(torch.cat(parts, 1), target, torch.cat(prior, 1))
    for e, own in zip(kept, np.split(wanted, len(kept), 1), strict=True):
        down = new["mixture.experts.down"][e]
        torch.testing.assert_close(
            down.T if biases else down, torch.as_tensor(own[:, :INNER]).float(), atol=2e-3, rtol=2e-3
        )
        if biases:
            bias = torch.as_tensor(own[:, INNER]).float()
            torch.testing.assert_close(new["mixture.experts.down_bias"][e], bias, atol=2e-3, rtol=2e-3)
    assert new.keys() == {"mixture.experts.down", *(["mixture.experts.down_bias"] if biases else [])}


LISTS = {
    by_rows: functools.partial(small.mixture, listed=True, by_rows=by_rows)
    for by_rows in (False, True, "masks")
}


@given(st.sets(st.integers(0, EXPERTS - 1), min_size=2, max_size=EXPERTS - 1), st.sampled_from([*LISTS]))
@settings(max_examples=8, deadline=None)
def test_experts_in_a_list_are_fitted_together(kept, by_rows):
    model, graph, sites = known(LISTS[by_rows])
    kept, batches = sorted(kept), data()
    new, _ = refitted(model, graph, sites, batches, kept)
    x, experts = torch.cat(batches), model.mixture.experts
    with torch.no_grad():
        p, target = gates(model, x, kept), model.mixture(x)
        parts = [p[:, e, None] * torch.cat([experts[e][:2](x), torch.ones(len(x), 1)], 1) for e in kept]
        prior = [torch.cat([experts[e][2].weight, experts[e][2].bias[:, None]], 1) for e in kept]
    wanted = ridge_solution(torch.cat(parts, 1), target, torch.cat(prior, 1))
    for e, own in zip(kept, np.split(wanted, len(kept), 1), strict=True):
        found = [new[f"mixture.experts.{e}.2.{leaf}"] for leaf in ("weight", "bias")]
        found = torch.cat([found[0], found[1][:, None]], 1)
        torch.testing.assert_close(found, torch.as_tensor(own).float(), atol=2e-3, rtol=2e-3)


def test_experts_in_a_list_that_bend_their_results_are_fitted_one_by_one():
    model, batch = LISTS[False]()
    for expert in model.mixture.experts:
        expert.append(nn.Tanh())
    (site,) = experts_of(model, batch)
    assert site.pinned is None
    assert not refitted(model, trace(model, data()[0]), [site], data(), [0, 2, 5])[0]


def lost(model, block, batches, values, routers):
    """E‖y − ŷ‖² of a mixture's result."""
    seen = []
    hook = find_layer(model, block).register_forward_hook(lambda m, args, y: seen.append(tensors_of(y)[0]))
    with hook, torch.no_grad():
        for batch in batches:
            forward(model, batch)
        own = [*seen]
        seen.clear()
        named = {**dict(model.named_parameters()), **values}
        with choosing(model, routers, values):
            for batch in batches:
                args, kwargs = ((batch,), {}) if isinstance(batch, torch.Tensor) else ((), batch)
                torch.func.functional_call(model, named, args, kwargs)
    return float(sum((a - b).square().sum() for a, b in zip(own, seen, strict=True)))


@given(st.sets(st.integers(0, EXPERTS - 1), min_size=2, max_size=EXPERTS - 1), st.sampled_from([1, 14, 21]))
@settings(max_examples=10, deadline=None)
def test_groups_in_turn_lose_less_than_nothing_and_more_than_all_together(kept, together):
    model, graph, sites = known(small.mixture)
    batches, losses = data(), []
    for size in (together, expert_refit.TOGETHER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(expert_refit, "TOGETHER", size)
            new, routers = refitted(model, graph, sites, batches, sorted(kept))
        losses.append(lost(model, "mixture", batches, new, routers))
    before = lost(model, "mixture", batches, {}, routers)
    assert losses[1] <= losses[0] * 1.001
    assert losses[0] <= before * 1.001


def test_biases_of_experts_take_the_mean_of_what_went():
    model, _ = biased()
    experts, constant = model.mixture.experts, torch.arange(WIDTH) - 2.0
    with torch.no_grad():
        # Those that go are constants, and those that stay nothing.
        experts.down.zero_()
        experts.down_bias[:] = torch.zeros(WIDTH)
        experts.down_bias[:3] = constant
    batches = data()
    new, routers = refitted(
        model, trace(model, batches[0]), experts_of(model, batches[0]), batches, [3, 4, 5]
    )
    with torch.no_grad():
        mean = torch.cat([model.mixture(x) for x in batches]).mean(0)
    before, after = (lost(model, "mixture", batches, one, routers) for one in ({}, new))
    spread = sum((model.mixture(x) - mean).square().sum().item() for x in batches)
    assert after <= min(before, spread * 1.01)


def test_parameters_that_act_otherwise_are_left_alone():
    model, batch = small.mixture()

    class Squared(type(model.mixture.experts)):
        def __getitem__(self, e):
            return lambda x: F.linear(F.linear(x, self.up[e], self.up_bias[e]).relu(), self.down[e] ** 2)

    model.mixture.experts.__class__ = Squared
    (site,) = experts_of(model, batch)
    assert site.pinned is None
    assert not refitted(model, trace(model, data()[0]), [site], data(), [0, 2, 5])[0]


def test_experts_keep_their_weights_where_that_is_nearer(monkeypatch):
    model, _ = small.mixture()
    # The selection set is nearer to whatever is measured first.
    distances = iter([0.1, 0.2])
    monkeypatch.setattr(compressing, "distance", lambda *args: next(distances))
    result = ps.compress(model, data(), keep={"mixture.gate": 3}, progress=False, latency=False)
    (step,) = (step for step in result.plan.steps if step.site.router)
    assert torch.equal(result.model.mixture.experts.down, model.mixture.experts.down[step.keep])
    assert any("keep the weights that they have" in note for note in result.report.notes)


def test_experts_that_lose_inputs_are_refitted_and_their_cut_is_the_masked_network():
    model, _ = small.mixture(top_k=1)
    batches = data(16)
    keep = {"mixture.experts.up:oi": 4, "mixture.gate": 4}
    fitted = ps.compress(model, batches, keep=keep, progress=False, latency=False)
    plain = ps.compress(model, batches, keep=keep, progress=False, latency=False, refit="independent")
    assert fitted.report.divergence < plain.report.divergence
    assert fitted.model.mixture.experts.down.shape == (4, WIDTH, 4)
    assert any("not refitted: mixture.experts.down:oi" in note for note in plain.report.notes)
    assert not any("not refitted" in note for note in fitted.report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.MIXTURES)
def test_mixtures_of_transformers_lose_less(name):
    transformers = pytest.importorskip("transformers")
    model, batch = families.made(transformers, name)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.2 * torch.randn_like(one))
    batches = families.batches(batch, 4)
    kept = [0, 1] if name == "deepseek" else [0, 2]
    new, routers = refitted(model, trace(model, batches[0]), experts_of(model, batches[0]), batches, kept)
    assert new
    blocks = sorted({one.rpartition(".experts.")[0] for one in new})
    before = lost(model, blocks[0], batches, {}, routers)
    assert lost(model, blocks[0], batches, new, routers) < 0.95 * before
    assert any("bias" in one for one in new) == (name == "gpt_oss")
