"""Every pruning method by one function: what stays, what is refitted, what is physically gone."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NETWORKS, Net, network
from torch import nn

import pysolve as ps
from pysolve.layer.scores import propagated_importance
from pysolve.methods.channel_scores import activations, importances, norms
from pysolve.methods.goal import Options
from pysolve.methods.studied import studied
from pysolve.nn.evaluate import parameters

WEIGHTS = ("magnitude", "random", "std", "wanda", "obs")
CHANNELS = ("ln", "activation", "nisp", "elimination", "lasso")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def batches(n=4, shape=(10,)):
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(*shape, *shape, generator=random) if len(shape) == 1 else None
    found = [torch.randn(40, *shape, generator=random) for _ in range(n)]
    return [x @ mix for x in found] if mix is not None else found


def pruned(model=None, data=None, **options):
    return ps.prune(
        mlp() if model is None else model,
        batches() if data is None else data,
        **{"progress": False, "layout": "dense", **options},
    )


def missed(model, smaller, x):
    """E‖f(x) − g(x)‖² / E‖f(x)‖²."""
    with torch.no_grad():
        return float((model(x) - smaller(x)).square().mean() / model(x).square().mean())


def zeros(model):
    return [int((layer.weight == 0).sum()) for layer in model.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_exactly_the_share_of_the_weights_goes(method, scope):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    smaller = pruned(model, method=method, amount=0.6, scope=scope).model
    gone, sizes = zeros(smaller), [240, 384, 64]
    if scope == "local":
        assert gone == [int(0.6 * size + 1e-9) for size in sizes]
    else:
        assert sum(gone) == int(0.6 * sum(sizes) + 1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(st.sampled_from(WEIGHTS), st.sampled_from([0.3, 0.5, 0.8]))
@settings(max_examples=15)
def test_refitted_weights_miss_less_than_those_that_are_left_alone(method, amount):
    x = torch.cat(batches())
    if method == "obs":
        left, right = "magnitude", "obs"
        alone, refitted = (pruned(method=one, amount=amount).model for one in (left, right))
    else:
        alone, refitted = (
            pruned(method=method, amount=amount, refit=refit).model for refit in ("none", "sequential")
        )
        assert zeros(alone) == zeros(refitted)
    assert missed(mlp(), refitted, x) < missed(mlp(), alone, x)


def test_a_bias_refit_changes_biases_alone_and_restores_the_mean():
    alone, biased = (pruned(amount=0.7, refit=refit).model for refit in ("none", "bias"))
    for one, other in zip(alone.parameters(), biased.parameters(), strict=True):
        assert (one.ndim == 2) == torch.equal(one, other)
    x = torch.cat([batch[5:] for batch in batches()])
    with torch.no_grad():
        torch.testing.assert_close(biased(x).mean(0), mlp()(x).mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("refit", ["none", "sequential"])
def test_a_pattern_holds_after_the_refit(refit):
    smaller = pruned(method="wanda", pattern="2:4", refit=refit).model
    for layer in (smaller[0], smaller[2], smaller[4]):
        whole = layer.weight.shape[1] // 4 * 4
        assert ((layer.weight[:, :whole] != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()


@pytest.mark.parametrize(("method", "limit"), [("magnitude", "threshold"), ("std", "sensitivity")])
def test_a_limit_cuts_what_is_below_it(method, limit):
    model = mlp()
    smaller = pruned(model, method=method, **{limit: 0.1}).model
    for old, new in zip(model.parameters(), smaller.parameters(), strict=True):
        if old.ndim == 2:
            least = 0.1 if limit == "threshold" else 0.1 * old.std(correction=0)
            torch.testing.assert_close(new, torch.where(old.abs() >= least, old, 0.0))


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_a_target_counts_every_parameter_that_is_not_zero(method):
    result = pruned(method=method, target={"params": 0.3}, scope="global")
    assert 0.29 < result.report.share("nonzeros") <= 0.3
    assert result.report.target == {"params": 0.3}
    with pytest.raises(ps.PysolveError, match="cannot be reached"):
        pruned(method=method, target={"params": 20})


def test_what_obs_reports_is_what_the_layers_miss():
    report = pruned(method="obs", amount=0.7).report
    assert report.samples == 140
    assert report.held == 20
    assert all(0 < line.error < 0.5 for line in report.layers)
    worse = pruned(method="obs", amount=0.85).report
    assert all(a.error < b.error for a, b in zip(report.layers, worse.layers, strict=True))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Linear(6, 5), (6,)), (lambda: nn.Conv2d(3, 5, 3, bias=False), (3, 5, 5))],
)
def test_a_network_of_one_layer_is_pruned_as_that_layer_is_in_another(make, shape):
    torch.manual_seed(0)
    layer, data = make().eval(), [torch.randn(40, *shape) for _ in range(3)]
    alone, inside = (
        ps.prune(net, data, method="obs", amount=0.5, layout="dense", progress=False, latency=False)
        for net in (layer, nn.Sequential(layer))
    )
    torch.testing.assert_close(alone.model.weight, inside.model[0].weight)
    assert alone.report.layers[0].error == pytest.approx(inside.report.layers[0].error)
    assert alone.report.notes == inside.report.notes == ()


def test_global_obs_gives_the_weights_to_layers_that_need_them():
    model = mlp()
    with torch.no_grad():
        # Half of the inputs of the second layer are useless.
        model[2].weight[:, :12] = 0
    local, everywhere = (pruned(model, method="obs", amount=0.7, scope=s).model for s in ("local", "global"))
    assert zeros(everywhere)[1] > zeros(local)[1]
    x = torch.cat(batches())
    assert missed(model, everywhere, x) < missed(model, local, x)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_obs_and_wanda_take_every_network(name):
    model, batch = network(name)
    if not isinstance(batch, torch.Tensor):
        data = [batch]
    else:
        random = torch.Generator().manual_seed(2)
        data = [
            batch if batch.dtype.is_floating_point is False else torch.randn(batch.shape, generator=random)
        ]
    for method in ("obs", "wanda"):
        result = ps.prune(
            model, data, method=method, amount=0.5, layout="dense", progress=False, latency=False
        )
        if result.report.layers:
            assert result.report.after["nonzeros"] < result.report.before["nonzeros"]
        assert ps.apply(model, result.plan) is not None


def test_masked_layers_stay_masked_in_training():
    result = pruned(amount=0.8, layout="masked")
    before = zeros(result.model)
    labelled = [(x, x.sum(1).gt(0).long()) for x in batches()]
    ps.finetune(result.model, labelled, epochs=2, progress=False)
    assert zeros(result.model) == before
    assert [line.layout for line in result.report.layers] == ["masked"] * 3


def test_a_network_that_cannot_be_exported_is_fitted_on_the_originals_inputs():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 20), nn.Linear(20, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(y.relu() if float(y.sum()) > 0 else y.tanh())

    torch.manual_seed(0)
    result = pruned(Branching().eval(), method="obs", amount=0.5)
    assert "cannot be exported" in result.report.notes[0]
    assert zeros(result.model) == [100, 40]


def test_attention_in_a_network_that_cannot_be_exported_is_left_to_magnitude():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = (
                nn.MultiheadAttention(10, 2, add_bias_kv=True, batch_first=True),
                nn.Linear(10, 4),
            )

        def forward(self, x):
            y = self.mix(x[:, None], x[:, None], x[:, None])[0][:, 0]
            return self.out(y if float(y.sum()) > 0 else -y)

    torch.manual_seed(0)
    result = pruned(Branching().eval(), method="obs", amount=0.5)
    assert result.report.notes[-1] == "mix.out_proj: not refitted"
    pruned_ones = [line for line in result.report.layers if not line.why.startswith("left alone")]
    assert [line.name for line in pruned_ones] == ["mix.out_proj", "out"]
    assert all(abs(line.density - 0.5) < 0.01 for line in pruned_ones)


def test_more_batches_are_asked_for_where_none_of_the_size_in_the_code_is_left_whole():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 20), nn.Linear(20, 4)

        def forward(self, x):
            return self.b(self.a(x).view(40, 20).relu())

    with pytest.raises(ps.PysolveError, match=r"batches of one size alone, .* give more batches"):
        pruned(Fixed().eval(), batches(1), method="obs", amount=0.5)


@pytest.mark.parametrize("method", CHANNELS)
def test_channels_are_physically_gone(method):
    model = mlp()
    result = pruned(model, method=method, amount=0.5)
    assert [layer.out_features for layer in result.model if isinstance(layer, nn.Linear)] == [12, 8, 4]
    assert parameters(result.model) == result.report.after["params"]
    torch.testing.assert_close(ps.apply(model, result.plan)(batches()[0]), result.model(batches()[0]))


@pytest.mark.parametrize("method", ["ln", "activation", "nisp"])
def test_without_a_refit_the_weights_that_are_left_stay_as_they_are(method):
    model = mlp()
    result = pruned(model, method=method, amount=0.5)
    (first, second) = result.plan.steps
    assert torch.equal(result.model[0].weight, model[0].weight[first.keep])
    assert torch.equal(result.model[2].weight, model[2].weight[second.keep][:, first.keep])
    x = torch.cat(batches())
    refitted = pruned(model, method=method, amount=0.5, refit="sequential")
    assert missed(model, refitted.model, x) < missed(model, result.model, x)


def test_the_channels_that_stay_are_those_of_the_largest_scores():
    model = mlp()
    result = pruned(model, method="ln", amount=0.5, norm=1)
    size = model[0].weight.abs().sum(1).detach().numpy()
    assert sorted(result.plan.steps[0].keep) == sorted(np.argsort(-size)[:12])


def test_mean_activations_are_those_of_the_network():
    model = mlp()
    x = torch.cat(batches())
    sites = [site for site in ps.find_sites(model, x) if site.pinned is None]
    known = studied(model, batches(), Options(progress=False), sites=sites)
    seen = torch.cat(known.calibration.kept)
    with torch.no_grad():
        wanted = model[:2](seen).mean(0).numpy()
    np.testing.assert_allclose(activations(known)[sites[0]], wanted, atol=1e-5)
    limit = float(np.median(wanted))
    (step, *_) = pruned(model, method="activation", threshold={"0": limit}).plan.steps
    assert step.keep.tolist() == np.flatnonzero(wanted >= limit).tolist()


def test_importance_in_a_chain_is_what_was_published():
    model = mlp()
    sites = ps.find_sites(model, batches()[0])
    found = importances(model, sites)
    wanted = propagated_importance([model[i].weight.detach().numpy() for i in (0, 2, 4)])
    for site, scores in zip(sites, wanted, strict=True):
        np.testing.assert_allclose(found[site], scores, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["residual", "concat", "swiglu", "depthwise", "flattened_by_view", "attention"]
)
def test_scores_exist_for_every_channel_of_every_site(name):
    model, batch = network(name)
    every = ps.find_sites(model, batch)
    sites = [site for site in every if site.pinned is None]
    for found in (norms(model, sites), importances(model, every)):
        for site in sites:
            assert found[site].shape == (site.channels,)
            assert (found[site] >= 0).all()
    assert all(found[site].any() for site in sites)


def test_one_amount_for_all_sites_takes_the_least_of_all():
    counts = [site.kept for site in pruned(method="ln", amount=0.5, scope="global").report.sites[:2]]
    assert sum(counts) == pytest.approx(20, abs=1)


@pytest.mark.parametrize("method", CHANNELS)
def test_channels_go_to_a_target(method):
    result = pruned(method=method, target={"params": 0.4}, refit=None)
    assert 0.3 < result.report.share("params") <= 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of amount, threshold, sensitivity, pattern and target; got none"),
        ({"amount": 0.5, "target": {"params": 0.5}}, "got amount and target"),
        ({"amount": 0.5, "refit": "all"}, "unknown refit 'all'"),
        ({"amount": 0.5, "method": "obs", "refit": "none"}, "refits by itself"),
        ({"amount": 1.0, "method": "ln"}, "amount must be in"),
        ({"amount": 0.5, "method": "ln", "layout": "sparse"}, "layout=.sparse. is not for"),
        ({"pattern": "2:4", "method": "lasso"}, "takes amount or target, got pattern"),
        ({"target": {"macs": 0.5}}, "may name params, got macs"),
        ({"threshold": 0.1, "method": "std"}, "got threshold"),
        ({"threshold": 0.1, "method": "obs"}, "takes amount or pattern or target, got threshold"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pruned(**options)


@pytest.mark.parametrize("method", ["elimination", "lasso"])
def test_a_share_of_all_channels_together_needs_scores(method):
    with pytest.raises(ValueError, match="scope"):
        pruned(method=method, amount=0.5, scope="global")


@pytest.mark.parametrize("method", ["magnitude", "obs", "ln", "elimination"])
def test_an_unknown_scope_is_refused_by_name(method):
    with pytest.raises(ValueError, match="unknown scope 'Global'"):
        pruned(method=method, amount=0.5, scope="Global")


@pytest.mark.parametrize("options", [{"method": "obs"}, {"method": "ln"}, {"refit": "bias"}])
def test_data_are_asked_for_where_they_are_needed(options):
    with pytest.raises(ValueError, match="needs batches"):
        ps.prune(mlp(), amount=0.5, **options)


def test_inputs_that_hardly_vary_around_a_far_mean_keep_their_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.full((400, 60), -5.0)
    x[:, :30] += torch.rand(400, 30)
    # Each of the other inputs differs in one sample, and hardly.
    x[torch.arange(30, 60) // 4, torch.arange(30, 60)] += 0.003
    batches = x.split(100)
    same = ps.prune(model, batches, amount=0.0, refit="sequential", layout="dense", progress=False).model
    for before, after in zip(model[::2], same[::2], strict=True):
        torch.testing.assert_close(after.weight, before.weight, atol=1e-2, rtol=0)


def test_a_layer_that_runs_several_times_is_fitted_on_what_all_of_its_calls_read():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head((self.both(x) - self.both(x.flip(1))).relu())

    torch.manual_seed(0)
    model = Siamese().eval()
    fitted, scored = (pruned(model, method=method, amount=0.6) for method in ("obs", "magnitude"))
    x = torch.cat(batches())
    assert not any("not refitted" in note for note in fitted.report.notes)
    assert missed(model.both, fitted.model.both, x) < 0.7 * missed(model.both, scored.model.both, x)


def test_of_all_weights_together_a_layer_may_keep_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[2].weight.zero_()
    batches = [*torch.randn(4, 50, 8)]
    result = ps.prune(
        model, batches, method="obs", amount=0.6, scope="global", layout="dense", progress=False
    )
    weights = [result.model[i].weight for i in (0, 2)]
    assert not weights[1].any()
    assert sum(int(weight.count_nonzero()) for weight in weights) <= 0.4 * (128 + 64) + 1
    assert torch.allclose(result.model(batches[0]), model(batches[0]), atol=1e-6)


def test_outputs_that_are_numbers_no_more_are_a_warning():
    torch.manual_seed(0)
    model = Net(
        lambda net, x: nn.functional.normalize(net.fc(x.relu()), eps=0.0), fc=nn.Linear(8, 4, bias=False)
    ).eval()
    batches = [torch.randn(60, 8) for _ in range(4)]
    with pytest.warns(ps.PysolveWarning, match="divergence on held-out samples is nan"):
        result = ps.prune(model, batches, method="magnitude", amount={"fc": 0.999}, layout="dense")
    assert not np.isfinite(result.report.divergence)
