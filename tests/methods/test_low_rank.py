"""``low_rank`` from end to end: what it promises of costs, ranks, outputs, reports, and of the original."""

import copy
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from mixtures import batches, convolutional, images
from small import Net, attention, network
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.methods import candidates
from pysolve.methods import low_rank as verb
from pysolve.methods.result import costs
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.masking import mask_weights


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def low(model=None, data=None, **options):
    if model is None and data is None and not any(isinstance(one, dict | list) for one in options.values()):
        return _usual(**options)
    return ps.low_rank(
        mlp() if model is None else model,
        batches() if data is None else data,
        **{"progress": False, "layout": "factored", **options},
    )


@cache
def _usual(**options):
    return low(mlp(), batches(), **options)


def missed(model, smaller, data):
    """E‖f(x) − g(x)‖² / E‖f(x) − E f(x)‖²."""
    with torch.no_grad():
        y, z = (torch.cat([net(x) for x in data]) for net in (model, smaller))
    return float((y - z).square().mean() / (y - y.mean(0)).square().mean())


def ranks(result):
    return {n: m.rank for n, m in result.model.named_modules() if isinstance(m, Factored)}


def lines(result):
    return {line.name: line for line in result.report.layers}


# --- how far


@pytest.mark.parametrize("method", ["svd", "activation"])
def test_one_rank_is_every_layer_s_for_which_it_pays(method):
    result = low(rank=4, method=method)
    assert ranks(result) == {"0": 4, "2": 4}
    assert lines(result)["4"].why == "only ranks up to 3 would be smaller"
    assert lines(result)["4"].layout == "dense"
    assert lines(result)["0"].layout == "rank 4"
    assert lines(result)["0"].density == pytest.approx(4 * 34 / 240)
    assert type(result.model[4]) is nn.Linear


def test_named_ranks_are_theirs_and_others_are_left_alone():
    result = low(rank={"2": 3, "4": 1})
    assert ranks(result) == {"2": 3, "4": 1}
    assert lines(result)["0"].why == "not asked for"
    assert torch.equal(result.model[0].weight, mlp()[0].weight)


@pytest.mark.parametrize("method", ["svd", "activation"])
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_a_share_of_the_energy_is_kept_by_the_smallest_rank_that_does(method, energy):
    torch.manual_seed(0)
    layer = nn.Linear(12, 60)
    with torch.no_grad():
        layer.weight *= torch.linspace(2, 0.2, 12)
    model = nn.Sequential(layer).eval()
    x = batches(4, (12,), 200)
    result = low(model, x, energy=energy, method=method)
    seen = torch.cat([one[len(one) // 8 :] for one in x])
    W = layer.weight.detach().double()
    if method == "activation":
        centred = (seen - seen.mean(0)).double()
        W = W @ torch.linalg.cholesky(centred.T @ centred)
    kept = W.new_tensor(np.linalg.svd(W.numpy(), compute_uv=False)).square().cumsum(0)
    wanted = 1 + int((kept / kept[-1] < energy).sum())
    if method == "svd":
        assert ranks(result) == {"0": wanted}
        assert 1 - lines(result)["0"].error >= energy - 1e-6
    else:
        # Energy counts in what the network's outputs lose, half of it plainly.
        assert abs(ranks(result)["0"] - wanted) <= 1
        assert 1 - lines(result)["0"].error >= energy - 0.1


def test_more_energy_takes_no_smaller_rank():
    found = [ranks(low(energy=energy)) for energy in (0.4, 0.8)]
    for less, more in pairwise(found):
        assert all(less[name] <= more[name] for name in less.keys() & more.keys())


@pytest.mark.parametrize(
    ("measure", "build", "method"),
    [
        ("params", "mlp", "svd"),
        ("macs", "mlp", "activation"),
        ("bytes", "convolutional", "svd"),
        ("params", "convolutional", "activation"),
    ],
)
def test_a_target_is_held_nearly_used_up_and_reported_as_it_is(measure, build, method):
    model, data = (mlp(), batches()) if build == "mlp" else (convolutional(), images())
    result = low(model, data, target={measure: 0.6}, method=method)
    before, after = (costs(net, data[0]) for net in (model, result.model))
    assert result.report.before == before
    assert result.report.after == after
    assert 0.5 * before[measure] < after[measure] <= 0.6 * before[measure]
    assert result.report.target == {measure: 0.6}
    assert sum(not isinstance(m, nn.Linear) for m in result.model) >= 2


def test_several_targets_hold_together():
    model, data = convolutional(), images()
    result = low(model, data, target={"params": 0.7, "macs": 0.5})
    before, after = (costs(net, data[0]) for net in (model, result.model))
    assert after["params"] <= 0.7 * before["params"]
    assert after["macs"] <= 0.5 * before["macs"]


def test_a_target_that_holds_already_leaves_all_as_it_is():
    model = mlp()
    result = low(model, target={"params": 1.0})
    assert ranks(result) == {}
    for a, b in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert result.report.divergence == 0


def test_a_target_out_of_reach_names_the_smallest_cost():
    smallest = 34 + 40 + 20 + 44
    with pytest.raises(ps.PysolveError, match=rf"params.*{smallest}"):
        low(target={"params": 0.1})


def test_harmless_layers_are_factored_before_others():
    model = mlp()
    with torch.no_grad():
        model[2].weight[:] = torch.outer(torch.randn(16), torch.randn(24))
    result = low(model, target={"params": 0.7})
    assert "2" in ranks(result)
    assert missed(model, result.model, batches()) < 1e-3


# --- how well


@pytest.mark.parametrize("build", ["mlp", "convolutional"])
def test_outputs_are_nearer_with_data_than_without(build):
    model, data = (mlp(), batches()) if build == "mlp" else (convolutional(), images())
    blind, seeing = (low(model, data, rank=3, method=method).model for method in ("svd", "activation"))
    assert missed(model, seeing, data) < 0.7 * missed(model, blind, data)


def test_errors_fall_with_the_rank():
    model = mlp()
    errors = [missed(model, low(rank=rank).model, batches()) for rank in (1, 3)]
    assert errors[0] > 2 * errors[1]


@pytest.mark.parametrize("method", ["svd", "activation"])
@pytest.mark.parametrize("structure", ["channel", "spatial"])
def test_layers_whose_weights_have_the_rank_come_out_as_they_were(method, structure):
    """Random inputs of full rank."""
    model = convolutional()
    with torch.no_grad():
        for layer, r in ((model[0], 2), (model[3], 3)):
            h, c = layer.weight.shape[:2]
            if structure == "channel":
                layer.weight[:] = torch.einsum("hk,kcij->hcij", torch.randn(h, r), torch.randn(r, c, 3, 3))
            else:
                layer.weight[:] = torch.einsum("hkj,kci->hcij", torch.randn(h, r, 3), torch.randn(r, c, 3))
        model[6].weight[:] = torch.randn(5, 2) @ torch.randn(2, 90)
    data = [torch.randn(60, 3, 8, 8) for _ in range(3)]
    wanted = {"0": 2, "3": 3, "6": 2}
    result = low(model, data, rank=wanted, structure=structure, method=method)
    assert ranks(result) == wanted
    assert missed(model, result.model, data) < 1e-5
    assert result.report.divergence < 1e-5
    if method == "activation":
        assert all(line.error < 1e-4 for line in result.report.layers)


def test_without_data_weights_are_the_nearest_ones():
    model = mlp()
    result = ps.low_rank(model, rank=3, progress=False)
    for name in ("0", "2", "4"):
        U, s, V = torch.linalg.svd(model.get_submodule(name).weight.detach().double(), full_matrices=False)
        nearest = ((U[:, :3] * s[:3]) @ V[:3]).float()
        two = result.model.get_submodule(name)
        torch.testing.assert_close(two.weight.detach(), nearest, atol=1e-5, rtol=1e-4)
        assert torch.equal(two.bias, model.get_submodule(name).bias)
        assert lines(result)[name].error == pytest.approx(float(s[3:].square().sum() / s.square().sum()))
    assert np.isnan(result.report.divergence)
    assert "macs" not in result.report.after


@pytest.mark.parametrize("structure", ["channel", "spatial", "auto"])
def test_convolutions_are_factored_in_the_structure_that_is_asked_for(structure):
    result = low(convolutional(), images(), rank=3, structure=structure)
    for name in ("0", "3"):
        two = result.model.get_submodule(name)
        along = two.outer.kernel_size == (1, 3)
        assert two.inner.kernel_size == ((3, 1) if along else (3, 3))
        assert structure == "auto" or along == (structure == "spatial")
        assert lines(result)[name].layout == f"rank 3{', spatial' * along}"


def test_a_batch_norm_takes_the_bias_that_a_convolution_does_not_have():
    model, data = convolutional(), images()
    result = low(model, data, rank={"0": 2})
    assert result.model[0].bias is None
    assert not torch.equal(result.model[1].running_mean, model[1].running_mean)
    assert torch.equal(result.model[1].running_var, model[1].running_var)
    assert result.report.after["params"] < result.report.before["params"]


def test_layers_behind_a_factored_one_are_fitted_anew_and_those_before_stay():
    model = mlp()
    result = low(model, rank={"2": 3})
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert not torch.equal(result.model[4].weight, model[4].weight)
    alone = copy.deepcopy(result.model)
    alone[4] = model[4]
    assert missed(model, result.model, batches()) < missed(model, alone, batches())


def test_what_the_report_says_of_errors_is_what_layers_miss():
    result = low(rank=4)
    assert result.report.samples == 105
    assert result.report.held == 15
    assert all(0 < line.error < 0.7 for line in result.report.layers)
    more = low(rank=5)
    assert all(lines(more)[name].error < lines(result)[name].error for name in ("0", "2"))


# --- what is left alone, and refused


def test_layers_that_would_be_slower_are_left_alone(monkeypatch):
    model = mlp()

    def seconds(layer, one, rank, x):
        assert len(x) <= 64
        return (1.0, 2.0) if one.unit == "0" else (1.0, 0.5)

    monkeypatch.setattr(candidates, "seconds_of_both", seconds)
    result = low(model, rank=3, layout="auto")
    assert ranks(result) == {"2": 3, "4": 3}
    assert lines(result)["0"].why == "rank 3 would take 2.00 times as long"
    assert lines(result)["2"].new_seconds == 0.5
    assert "2.0 times as fast" in lines(result)["2"].why
    result = low(model, target={"params": 0.7}, layout="auto")
    assert "0" not in ranks(result)
    assert result.report.share("params") <= 0.7
    assert low(model, rank=3, layout="factored").model[0].rank == 3
    with pytest.raises(ps.PysolveError, match="params"):
        low(model, target={"params": 0.3}, layout="auto")


def test_where_all_would_be_slower_nothing_is_done(monkeypatch):
    monkeypatch.setattr(candidates, "seconds_of_both", lambda *_: (1.0, 1.0))
    model = mlp()
    for goal in ({"rank": 2}, {"energy": 0.5}):
        result = low(model, layout="auto", **goal)
        assert ranks(result) == {}
        assert all("1.00 times as long" in line.why for line in result.report.layers)
        assert all(
            torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True)
        )


def test_a_structure_that_is_slower_gives_way_to_the_other(monkeypatch):
    monkeypatch.setattr(
        candidates, "seconds_of_both", lambda layer, one, *_: (1.0, 2.0 if one.spatial else 0.5)
    )
    result = low(convolutional(), images(), rank=2, layout="auto")
    assert ranks(result) == {"0": 2, "3": 2, "6": 2}
    assert all(result.model.get_submodule(name).inner.kernel_size == (3, 3) for name in ("0", "3"))


def test_without_data_nothing_can_be_timed():
    result = ps.low_rank(mlp(), rank=2, progress=False)
    assert ranks(result) == {"0": 2, "2": 2, "4": 2}
    assert all(line.dense_seconds is None for line in result.report.layers)


def test_ignored_layers_are_left_alone():
    assert ranks(low(rank=2, ignore=["0", "re:[4]"])) == {"2": 2}
    with pytest.raises(ps.LayerNotFoundError, match="no layer '9'"):
        low(rank=2, ignore=["9"])


LEFT = {
    "transposed": {"2": "a ConvTranspose2d cannot be factored"},
    "grouped": {"2": "it has groups"},
    "unused_layer": {"c": "what it reads is not seen"},
}


def test_attention_of_its_own_kind_keeps_its_projections_and_the_reason_is_told():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Own(8, 2, batch_first=True), nn.Linear(8, 6)).eval()
    result = low(model, [torch.randn(32, 5, 8)], rank=1)
    assert ranks(result).keys() == {"0", "2"}
    assert lines(result)["1.out_proj"].why == "attention calls its function, not the layer"


def test_a_layer_that_runs_twice_is_factored_for_both_of_its_calls():
    model, batch = network("shared_layer")
    result = low(model, [torch.randn(32, *batch.shape[1:]) for _ in range(4)], rank=2)
    assert ranks(result)["twice"] == 2
    assert result.report.divergence < 0.5


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Rectified(nn.Linear):
    def forward(self, x):
        return super().forward(x.relu())


def test_a_layer_that_extends_torchs_own_is_factored_where_its_code_stays_true():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), Rectified(24, 16), Doubled(16, 12), nn.ReLU(), nn.Linear(12, 4))
    result = low(model.eval(), batches(), rank=3)
    assert ranks(result) == {"0": 3, "1": 3}
    assert isinstance(result.model[1].inner, Rectified)
    assert lines(result)["2"].why.startswith("its own code changes what it makes (test_low_rank.py:")


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_cannot_be_factored_are_left_alone_and_the_reason_is_told(name):
    model, batch = network(name)
    data = [torch.randn(32, *batch.shape[1:])]
    result = low(model, data, rank=1)
    assert ranks(result)
    for layer, why in LEFT[name].items():
        assert lines(result)[layer].why == why
        assert lines(result)[layer].layout == "dense"


def test_layers_that_cannot_be_factored_are_refused_when_they_are_named():
    model, batch = network("unused_layer")
    for method, why in (("activation", "what it reads is not seen"), ("svd", None)):
        asked = {"rank": {"c": 1}, "method": method}
        if why is None:
            assert ranks(low(model, inputs(batch), **asked)) == {"c": 1}
        else:
            with pytest.raises(ps.PysolveError, match=f"c cannot be factored: {why}"):
                low(model, inputs(batch), **asked)


def test_sparse_layers_are_left_alone_and_named():
    model, x = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12)).eval(), torch.randn(32, 12)
    sparse = ps.prune(model, [x, x], amount={"0": 0.9}, ignore=["2"], layout="sparse", progress=False)
    result = low(sparse, [x, x], rank=2)
    assert ranks(result) == {"2": 2}
    assert any("it is sparse" in note and note.endswith(": 0") for note in result.report.notes)


@pytest.mark.parametrize("name", ["tied_weights", "computed_weight"])
def test_weights_that_are_not_a_layer_s_own_are_left_alone(name):
    model, batch = network(name)
    result = low(model, [torch.randn(32, *batch.shape[1:])], rank=1)
    assert ranks(result) == ({"b": 1} if name == "tied_weights" else {"b": 1, "c": 1})
    named = ": a, c" if name == "tied_weights" else ": a"
    assert any("left alone" in note and note.endswith(named) for note in result.report.notes)
    with pytest.raises(ps.PysolveError, match="a cannot be factored"):
        low(model, [torch.randn(32, 4)], rank={"a": 1})


def test_a_network_that_is_one_layer_cannot_be_factored():
    with pytest.raises(ps.PysolveError, match=r"whole network.* nn\.Sequential"):
        low(nn.Linear(10, 24), rank=2)


def test_masked_weights_are_refused():
    model = mlp()
    mask_weights(model, {"0": torch.ones(24, 10, dtype=torch.bool)})
    with pytest.raises(ps.PysolveError, match="remove_masks"):
        low(model, rank=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of rank, energy and target; got none"),
        ({"rank": 2, "energy": 0.5}, ValueError, "got rank and energy"),
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.5}, ValueError, "rank must be an integer"),
        ({"rank": True}, ValueError, "rank must be an integer"),
        ({"rank": {"0": 0}}, ValueError, "the rank of 0 must be an integer of at least 1, got 0"),
        ({"rank": {"9": 2}}, ps.LayerNotFoundError, "no layer '9'"),
        ({"rank": {"1": 2}}, ps.PysolveError, "1 cannot be factored: it has no weight"),
        ({"rank": {"0": 8}}, ps.PysolveError, "rank 8 of 0 would be no smaller than the layer is: at most 7"),
        ({"energy": 0.0}, ValueError, r"a share in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, ValueError, r"a share in \(0, 1\], got 1.5"),
        ({"target": {"params": -1}}, ValueError, "a share in"),
        ({"target": {"size": 0.5}}, ValueError, "unknown measure 'size'"),
        ({"rank": 2, "method": "qr"}, ValueError, "unknown method 'qr'; choose one of activation, svd"),
        ({"rank": 2, "structure": "x"}, ValueError, "unknown structure 'x'"),
        ({"rank": 2, "layout": "sparse"}, ValueError, "layout=.sparse. is not for"),
        ({"rank": 2, "prune": True}, ValueError, "prune=True needs a target"),
        ({"energy": "0.9"}, ValueError, r"a share in \(0, 1\], got '0.9'"),
        ({"target": {"params": 0.7}, "prune": "yes"}, TypeError, "prune must be True or False, got 'yes'"),
        ({"rank": 2, "ignore": [nn.Linear]}, ps.PysolveError, "has its own weight that is not to be ignored"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        low(mlp(), **options)


def test_what_needs_data_says_so():
    for options in ({"rank": 2, "method": "activation"}, {"target": {"params": 0.5}}):
        with pytest.raises(ValueError, match="needs batches: unlabelled inputs"):
            ps.low_rank(mlp(), progress=False, **options)
    for empty in ([], iter([])):
        with pytest.raises(ps.DataError, match="there are no batches"):
            ps.low_rank(mlp(), empty, rank=2, progress=False)
    with pytest.raises(TypeError, match="wrap it in a list"):
        ps.low_rank(mlp(), batches()[0], rank=2, progress=False)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        ps.low_rank("model", rank=2)


# --- any network, any data


def inputs(batch):
    """Two batches for a network, of random numbers where it takes such."""
    if not isinstance(batch, torch.Tensor) or not batch.dtype.is_floating_point:
        return [batch] * 2
    random = torch.Generator().manual_seed(2)
    return [torch.randn(24, *batch.shape[1:], generator=random) for _ in range(2)]


HAZARDS = (
    *("residual", "chunked_swiglu", "flattened_by_view", "transformer_layer", "conv1d", "conv3d"),
    *("keywords", "borrowed_weight", "autocast", "in_place", "dead_end"),
)


@pytest.mark.parametrize("name", HAZARDS)
def test_every_network_can_be_given_and_none_is_changed(name):
    model, batch = network(name)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    for result in (low(model, inputs(batch), rank=1), ps.low_rank(model, rank=1, progress=False)):
        assert ranks(result)
        assert result.report.after["params"] < result.report.before["params"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_networks_that_are_random_are_checked_on_the_same_draws():
    model, batch = network("noisy")
    result = low(model, inputs(batch), rank=1)
    assert result.report.after["params"] < result.report.before["params"]
    assert low(model, inputs(batch), rank=1).report.divergence == result.report.divergence


def test_networks_that_do_something_else_for_another_layer_keep_theirs():
    def run(net, x):
        return net.b(F.relu(net.a(x))) * (1.0 if isinstance(net.a, nn.Linear) else 2.0)

    torch.manual_seed(0)
    model = Net(run, a=nn.Linear(10, 12), b=nn.Linear(12, 6)).eval()
    result = low(model, rank=2)
    assert ranks(result) == {"b": 2}
    assert "code asks for more" in lines(result)["a"].why


@pytest.mark.parametrize(
    ("name", "method", "measure"),
    [
        ("shared_layer", "svd", "params"),
        ("shared_layer", "svd", "macs"),
        ("shared_layer", "activation", "macs"),
        ("unused_layer", "svd", "params"),
        ("unused_layer", "svd", "macs"),
        ("autocast", "activation", "params"),
        ("keywords", "svd", "macs"),
    ],
)
def test_targets_are_held_whatever_the_network_does_with_its_layers(name, method, measure):
    model, batch = network(name)
    result = low(model, inputs(batch), target={measure: 0.95}, method=method)
    assert 0 < result.report.share(measure) <= 0.95


@pytest.mark.parametrize(
    ("build", "rank", "method"),
    [("mlp", 1, "svd"), ("mlp", 5, "activation"), ("convolutional", 2, "activation")],
)
def test_what_is_reported_is_counted_again(build, rank, method):
    model, data = (mlp(), batches()) if build == "mlp" else (convolutional(), images())
    result = low(model, data, rank=rank, method=method)
    assert result.report.before == costs(model, data[0])
    assert result.report.after == costs(result.model, data[0])
    for line in result.report.layers:
        layer, new = (net.get_submodule(line.name) for net in (model, result.model))
        weights = sum(p.numel() for n, p in new.named_parameters() if n.endswith("weight"))
        assert line.density == pytest.approx(weights / layer.weight.numel())
        assert (line.layout == "dense") == (not isinstance(new, Factored))
    assert {m.name for m in result.report.mass} >= {"0", "2" if build == "mlp" else "3"}


def test_the_original_its_modes_and_the_random_state_are_untouched(monkeypatch):
    model = convolutional()
    model[1].train()
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    data, timed = images(), candidates.seconds_of_both
    monkeypatch.setattr(candidates, "seconds_of_both", lambda *given: (timed(*given), (2.0, 1.0))[1])
    copies = [x.clone() for x in data]
    state = torch.get_rng_state()
    result = low(model, data, target={"params": 0.6}, layout="auto")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [False, True, *[False] * 5]
    assert [m.training for m in result.model] == [False, True, *[False] * 5]
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))
    frozen = [n for n, p in result.model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(n.startswith("3.") and n.endswith("weight") for n in frozen)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert not shared


def test_the_same_seed_gives_the_same_network():
    a, b = (low(convolutional(), images(), rank=3, seed=seed).model.state_dict() for seed in (1, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_generators_of_batches_are_enough():
    first = low(rank=3)
    second = low(data=iter(batches()), rank=3)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    labelled = [(x, torch.zeros(len(x))) for x in batches()]
    third = low(data=labelled, rank=3)
    assert torch.equal(third.model[0].inner.weight, first.model[0].inner.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_of_any_floating_type_keep_it(dtype):
    model = mlp().to(dtype)
    data = [x.to(dtype) for x in batches()]
    for method in ("svd", "activation"):
        result = low(model, data, rank=6, method=method)
        assert {p.dtype for p in result.model.parameters()} == {dtype}
        assert missed(model, result.model, data) < 0.4
        assert np.isfinite(result.report.divergence)
    assert low(model, data, target={"params": 0.8}).report.share("params") <= 0.8


class Branching(nn.Module):
    """What it does depends on the numbers, so that no graph can be made of it."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x) if float(x.sum()) > -1e9 else x[:, :4]


def test_networks_that_cannot_be_exported_are_fitted_on_the_original_s_inputs():
    model = Branching().eval()
    for goal in ({"rank": 4}, {"target": {"params": 0.7}}):
        result = low(model, **goal)
        assert ranks(result)
        assert any("cannot be exported" in note for note in result.report.notes)
        assert missed(model, result.model, batches()) < 0.5
    blind = low(model, rank=4, method="svd")
    assert missed(model, low(model, rank=4).model, batches()) < missed(model, blind.model, batches())


def test_layers_between_keep_their_weights_where_nothing_can_be_exported():
    model = Branching().eval()
    result = low(model, rank={"net.0": 3})
    assert torch.equal(result.model.net[2].weight, model.net[2].weight)


def test_in_place_activations_and_a_single_batch_do_not_matter():
    def build(inplace):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 24), nn.ReLU(inplace), nn.Linear(24, 8)).eval()

    a, b = (low(build(one), batches(1), rank=3).model for one in (True, False))
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_few_samples_pull_the_weights_to_the_old_ones():
    model = mlp()
    x = [torch.randn(6, 10, generator=torch.Generator().manual_seed(0))]
    result = low(model, x, rank=6)
    assert missed(model, result.model, batches()) < 1.0


def test_dead_and_repeated_inputs_do_no_harm():
    data = batches()
    for x in data:
        x[:, 3] = 0
        x[:, 4] = x[:, 5]
        x[:, 6] = 1.0
    model = mlp()
    result = low(model, data, rank=6)
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert missed(model, result.model, data) < 0.1


# --- chains, scores


def test_scores_of_both_networks_are_in_the_report():
    seen = []

    def evaluate(net):
        seen.append(net)
        return float(len(seen))

    model = mlp()
    report = low(model, rank=3, evaluate=evaluate).report
    assert (report.score_before, report.score_after) == (1.0, 2.0)
    assert seen[0] is model
    assert isinstance(seen[1][0], Factored)


def test_what_was_compressed_can_be_factored_and_the_other_way_round():
    model = mlp()
    smaller = ps.compress(model, batches(), keep=0.8, progress=False)
    result = low(smaller, rank=3)
    assert result.earlier == (smaller.plan,)
    assert result.fingerprint == smaller.fingerprint
    assert result.report.before == costs(smaller.model, batches()[0])
    again = ps.compress(low(rank=5), batches(), keep=0.8, progress=False)
    assert isinstance(again.model[0], Factored)
    assert missed(model, again.model, batches()) < 0.6
    third = low(again, rank={"0.outer": 2})
    assert isinstance(third.model[0].outer, Factored)
    assert len(third.earlier) == 2


def test_the_plan_makes_the_network_again():
    for model, data in ((mlp(), batches()), (convolutional(), images())):
        result = low(model, data, rank=3)
        again = ps.apply(model, result.plan)
        for a, b in zip(result.model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("build", ["mlp", "convolutional"])
def test_channels_may_go_as_well(build):
    model, data = (mlp(), batches()) if build == "mlp" else (convolutional(), images())
    wanted = {"params": 0.4} if build == "mlp" else {"macs": 0.3}
    result = low(model, data, target=wanted, prune=True)
    before, after = (costs(net, data[0]) for net in (model, result.model))
    assert all(after[measure] <= limit * before[measure] for measure, limit in wanted.items())
    assert result.report.before == before
    assert result.report.after == after
    assert result.report.target == wanted
    assert result.report.sites
    with torch.no_grad():
        assert result.model(data[0]).shape == model(data[0]).shape


@pytest.mark.parametrize("nearer", ["with ranks", "without"])
def test_of_channels_with_ranks_and_alone_the_nearer_network_is_kept(nearer, monkeypatch):
    found = []

    def distance(original, other, *rest):
        found.append(any(isinstance(layer, Factored) for layer in other.modules()))
        return float(found[-1] == (nearer == "without"))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).eval()
    model[2].weight.data = torch.randn(24, 2) @ torch.randn(2, 24) / 5
    monkeypatch.setattr(verb, "distance", distance)
    monkeypatch.setattr(verb, "_near", lambda plans, where: plans)
    result = low(model, batches(), target={"params": 0.6}, prune=True)
    assert found == [True, False]
    assert result.report.share("params") <= 0.6
    factored = any(isinstance(layer, Factored) for layer in result.model.modules())
    assert factored == (nearer == "with ranks")
    assert any("no layer is factored" in note for note in result.report.notes) == (not factored)


def test_a_plan_that_is_far_behind_is_not_carried_out(monkeypatch):
    carried_out = []
    rebuild = verb.rebuild
    monkeypatch.setattr(verb, "rebuild", lambda *a, **k: carried_out.append(a[1]) or rebuild(*a, **k))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)).eval()
    model[2].weight.data = torch.randn(24, 2) @ torch.randn(2, 24) / 5
    result = low(model, batches(), target={"params": 0.6}, prune=True)
    (chosen,) = carried_out
    assert chosen.fits
    assert result.report.share("params") <= 0.6
    assert not any("no layer is factored" in note for note in result.report.notes)


@pytest.mark.parametrize("prune", [False, True])
def test_macs_of_attention_count_in_the_target(prune):
    torch.manual_seed(0)
    heads, wide = attention(32, 4)[0], [nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 30), nn.Linear(30, 4)]
    model, data = nn.Sequential(heads, *wide).eval(), [torch.randn(20, 6, 5) for _ in range(4)]
    result = low(model, data, target={"macs": 0.6}, prune=prune)
    before, after = (costs(net, data[0]) for net in (model, result.model))
    products = 2 * 32 * 6 * 6
    assert before["macs"] == products + 6 * (3 * 160 + 32 * 4 + 160 + 1200 + 120)
    assert 0.5 * before["macs"] <= after["macs"] <= 0.6 * before["macs"]
    assert (result.report.before, result.report.after) == (before, after)


def test_a_network_with_two_inputs_is_run_by_its_keywords():
    def run(net, a, b):
        return net.out(F.relu(net.a(a) + net.b(b)))

    class Two(Net):
        def forward(self, a, b):
            return self.run(self, a, b)

    torch.manual_seed(0)
    model = Two(run, a=nn.Linear(10, 20), b=nn.Linear(12, 20), out=nn.Linear(20, 6)).eval()
    data = [{"a": torch.randn(40, 10), "b": torch.randn(40, 12)} for _ in range(2)]
    result = low(model, data, rank=3)
    assert ranks(result) == {"a": 3, "b": 3, "out": 3}


class Curious(nn.Module):
    """Code that wants its layer to be one of torch's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(24, 16)

    def forward(self, x):
        if not isinstance(self.layer, nn.Linear):
            raise TypeError
        return self.layer(x)


def test_a_layer_that_code_looks_into_is_left_alone_and_the_others_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), Curious(), nn.ReLU(), nn.Linear(16, 16)).eval()
    result = low(model, batches(), target={"params": 0.8})
    assert ranks(result).keys() == {"0", "4"}
    assert "code asks for more" in lines(result)["2.layer"].why
    sparse = ps.prune(model, batches(), amount=0.8, layout="sparse", progress=False)
    assert {line.name: line.layout for line in sparse.report.layers} == {
        "0": "sparse",
        "2.layer": "dense",
        "4": "sparse",
    }
    assert "code asks for more" in {line.name: line for line in sparse.report.layers}["2.layer"].why


def test_code_that_asks_a_layer_for_its_stride_is_answered():
    class Same(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.conv = nn.Conv2d(i, o, 3, stride=2)

        def forward(self, x):
            k, s = self.conv.kernel_size[0], self.conv.stride[0]
            return self.conv(F.pad(x, ((k - s) // 2, (k - s + 1) // 2) * 2)).relu()

    torch.manual_seed(0)
    model = nn.Sequential(Same(3, 12), Same(12, 12), nn.Flatten(), nn.Linear(12 * 4, 5)).eval()
    result = low(model, [torch.randn(16, 3, 8, 8) for _ in range(3)], rank=4)
    assert ranks(result).keys() == {"0.conv", "1.conv", "3"}
