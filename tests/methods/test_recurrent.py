"""Weights of recurrent layers are fitted, pruned and coded to what they read."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.methods import budget, low_rank, rebuild
from pysolve.methods.goal import Options
from pysolve.methods.kinds.ranks import ranks_of
from pysolve.methods.menu import Chosen
from pysolve.methods.result import costs, distance
from pysolve.methods.studied import studied
from pysolve.methods.weights import weights_of
from pysolve.nn import to_dense
from pysolve.nn.gathering.recurrent import gather_recurrent, recurrent_weights
from pysolve.nn.layers.factored import empty_matrix
from pysolve.nn.layers.factored_recurrent import FactoredRecurrent

# Torch has a slower kernel for these.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

QUIET = {"progress": False, "latency": False}


class Tagger(nn.Module):
    def __init__(self, kind, **how):
        super().__init__()
        self.table = nn.Embedding(15, 6)
        self.layer = kind(6, 10, batch_first=True, **how)
        width = how.get("proj_size", 10) * (2 if how.get("bidirectional") else 1)
        self.head = nn.Linear(width, 15)

    def forward(self, ids):
        return self.head(self.layer(self.table(ids))[0])


@cache
def network(kind=nn.LSTM, **how):
    torch.manual_seed(0)
    model = Tagger(kind, **how).eval()
    # Fewer directions than units, so that some units follow from others.
    for name, weight in recurrent_weights(model).items():
        if "hh" in name:
            U, S, V = torch.linalg.svd(weight.detach(), full_matrices=False)
            weight.data = 2 * (U * S * (torch.arange(len(S)) < 5)) @ V
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


def test_projections_of_states_are_weights_like_others(tmp_path):
    model = network(nn.LSTM, proj_size=5)
    assert [name[-5:] for name in recurrent_weights(model)] == ["ih_l0", "hh_l0", "hr_l0"]
    pruned = ps.prune(model, batches(), amount=0.5, **QUIET)
    coded = ps.quantize(model, batches(), scheme="codebook", bits=2, **QUIET)
    for name in recurrent_weights(model):
        assert pruned.model.state_dict()[name].eq(0).double().mean().item() == pytest.approx(0.5, abs=0.01)
        assert len(coded.model.state_dict()[name].unique()) <= 4
    for result in (pruned, coded):
        restored(result, model, tmp_path)


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


# --- ranks

RANKED = [
    (nn.LSTM, {}),
    (nn.GRU, {"bias": False}),
    (nn.RNN, {"bidirectional": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"proj_size": 5}),
]


def ranks(result):
    return {name.removesuffix(".weight"): form.rank for name, form in result.plan.forms.items()}


def probe():
    torch.manual_seed(2)
    return [torch.randint(15, (64, 9))]


@pytest.mark.parametrize(("kind", "how"), RANKED)
def test_ranks_are_held_nearer_than_by_the_weights_alone(kind, how, tmp_path):
    model = network(kind, **how)
    result = ps.low_rank(model, batches(), target={"params": 0.75}, **QUIET)
    assert isinstance(result.model.layer, kind)
    assert result.model.layer.factored
    own = sum(one.numel() for one in result.model.parameters())
    assert result.report.after["params"] == own <= 0.75 * result.report.before["params"]
    assert {name: result.report.after[name] for name in ("params", "bytes", "macs")} == {
        name: costs(result.model, batches()[0])[name] for name in ("params", "bytes", "macs")
    }
    plain = ps.low_rank(model, rank=ranks(result), layout="factored", **QUIET)
    assert ranks(plain) == ranks(result)
    assert distance(model, result.model, probe()) < distance(model, plain.model, probe())
    told = {line.name: line for line in result.report.layers}
    for name in result.model.layer.factored:
        assert told[f"layer.{name}"].layout == f"rank {ranks(result)[f'layer.{name}']}"
    ps.save(result, tmp_path / "small.safetensors")
    again, x = ps.load(tmp_path / "small.safetensors", model), batches()[0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
        whole = to_dense(result.model)
        assert type(whole.layer) is kind
        torch.testing.assert_close(whole(x), result.model(x))
        applied = ps.apply(model, result.plan, probe=x)
        torch.testing.assert_close(applied(x), result.model(x))


def test_weights_that_have_the_rank_come_out_as_they_were():
    model = network(nn.GRU)
    found = ps.low_rank(model, batches(), rank={"layer.weight_hh_l0": 5}, **QUIET)
    assert ranks(found) == {"layer.weight_hh_l0": 5}
    assert distance(model, found.model, probe()) < 1e-6


def test_multiplications_are_saved_where_inputs_are_read_and_nowhere_else():
    model = network(nn.LSTM)
    before = costs(model, batches()[0])["macs"]
    for share in (0.95, 0.9):
        result = ps.low_rank(model, batches(), target={"macs": share}, layout="factored", **QUIET)
        assert costs(result.model, batches()[0])["macs"] <= share * before
        assert ranks(result).keys() <= {"layer.weight_ih_l0", "head"}
        (told,) = (line.why for line in result.report.layers if line.name == "layer.weight_hh_l0")
        assert told == "steps multiply with all of it whatever its rank: no macs would be saved"
    assert "layer.weight_ih_l0" in ranks(result)
    with pytest.raises(ps.PysolveError, match="macs cannot go below"):
        ps.low_rank(model, batches(), target={"macs": 0.2}, **QUIET)
    both = ps.low_rank(model, batches(), target={"macs": 1.5 * before, "params": 0.8}, **QUIET)
    after = costs(both.model, batches()[0])
    assert after["macs"] <= 1.5 * before
    assert after["params"] <= 0.8 * costs(model)["params"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_units_and_ranks_go_together(kind, monkeypatch, tmp_path):
    model = network(kind)
    # Not channels alone, which may be nearer.
    monkeypatch.setattr(low_rank, "_nearest", lambda found, made: (made[0], ()))
    result = ps.low_rank(model, batches(), target={"params": 0.45}, prune=True, **QUIET)
    assert result.plan.steps
    assert result.model.layer.factored
    assert result.report.after["params"] <= 0.45 * result.report.before["params"]
    assert not any("not refitted" in note for note in result.report.notes)
    restored(result, model, tmp_path)


def test_ranks_of_gates_that_lose_inputs_are_fitted_to_what_is_left():
    model = network(nn.LSTM)
    (site,) = (s for s in ps.find_sites(model, batches()[0]) if "layer.weight_hh_l0:oi" in s.readers)
    weights, _ = weights_of(model, recurrent=True)
    found = studied(model, batches(), Options(progress=False), weights=weights, sites=True)
    kind, _ = ranks_of(found, "auto", False)
    name, keep = "layer.weight_hh_l0", np.array([0, 1, 3, 4, 6, 8, 9])
    chosen = Chosen({site: keep}) | kind.menus(found, name)[0].at(3)
    made = rebuild.rebuild(found, chosen)
    rows = (np.arange(4)[:, None] * 10 + keep).ravel()
    M, b = (made.values[one].double().numpy()[rows] for one in (name, "layer.bias_hh_l0"))
    known = found.correlations[name]
    part = replace(known.of_outputs(rows), group_size=1).restrict(keep)
    W, metric = model.layer.weight_hh_l0.detach().double().numpy(), kind.metrics[name]
    best = ps.reduced_rank(W[rows][:, keep], part, rank=3, metric=metric[np.ix_(rows, rows)])
    assert np.linalg.matrix_rank(M[:, keep], 1e-5) == 3
    assert part.error(M[:, keep], b) == pytest.approx(part.error(best.weight, best.bias), rel=1e-4)


@pytest.mark.parametrize(("kind", "how"), RANKED)
def test_costs_of_units_and_ranks_are_those_of_the_network(kind, how):
    model, x = network(kind, **how), batches()[0]
    weights, _ = weights_of(model, recurrent=True)
    found = studied(model, batches(), Options(progress=False), weights=weights, sites=True)
    ranked, _ = ranks_of(found, "auto", False)
    menus = [ranked.menus(found, name)[0] for name in recurrent_weights(model)]
    model_costs = budget.costs_of(found, also=[menu.names[0] for menu in menus])
    # Channels and ranks; and ranks alone, whose multiplications count exactly, too.
    for share, measures in ((0.6, ("params", "bytes")), (1.0, ("params", "bytes", "macs"))):
        kept = [max(1, round(share * site.channels)) for site in found.free]
        steps = tuple(
            ps.Collapse(site, np.arange(k))
            for site, k in zip(found.free, kept, strict=True)
            if k < site.channels
        )
        narrow = ps.apply(model, ps.Plan(steps))
        forms = {
            str(menu.unit): empty_matrix(narrow.get_parameter(str(menu.unit)), 1 + i % 2)
            for i, menu in enumerate(menus)
        }
        made = ps.apply(model, ps.Plan(steps, forms=forms))
        expected = budget._with_ranks(model_costs, menus).cost(
            [*kept, *(1 + i % 2 for i in range(len(menus)))]
        )
        after = costs(made, x)
        for measure in measures:
            assert expected[measure] == pytest.approx(after[measure], rel=1e-6), measure


def test_factors_are_trained_towards_the_original():
    model = network(nn.LSTM)
    result = ps.low_rank(model, batches(), target={"params": 0.5}, **QUIET)
    trained = ps.low_rank(model, batches(), target={"params": 0.5}, distill={"epochs": 20}, **QUIET)
    assert trained.report.divergence < result.report.divergence
    for name, old in result.model.named_parameters():
        assert dict(trained.model.named_parameters())[name].shape == old.shape


def test_what_has_ranks_can_be_compressed_on_and_saved(tmp_path):
    model = network(nn.LSTM)
    first = ps.low_rank(model, batches(), rank={"layer.weight_hh_l0": 4}, **QUIET)
    for result in (
        ps.low_rank(first, batches(), rank=2, layout="factored", **QUIET),
        ps.quantize(first, batches(), scheme="codebook", bits=6, **QUIET),
        ps.prune(first, batches(), amount=0.3, layout="dense", **QUIET),
    ):
        assert isinstance(result.model.layer, FactoredRecurrent)
        restored(result, model, tmp_path)


def test_inputs_of_what_has_ranks_can_go(tmp_path):
    model, x = network(nn.LSTM), batches()[0]
    first = ps.low_rank(model, batches(), rank={"layer.weight_ih_l0": 4}, **QUIET)
    result = ps.compress(first, batches(), keep={"table": 4}, **QUIET)
    assert result.model.table.embedding_dim == result.model.layer.input_size == 4
    restored(result, model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(to_dense(result.model)(x), result.model(x))


def test_ranks_that_cannot_be_are_refused():
    model = network(nn.LSTM)
    for rank, message in (
        ({"layer": 3}, "layer cannot be factored: name one of its weights, such as layer.weight_ih_l0"),
        ({"layer.weight_hh_l0": 9}, "rank 9 of layer.weight_hh_l0 would be no smaller"),
    ):
        with pytest.raises(ps.PysolveError, match=message):
            ps.low_rank(model, batches(), rank=rank, **QUIET)
    result = ps.low_rank(model, batches(), rank=2, ignore=["layer"], layout="factored", **QUIET)
    assert not any("layer" in name for name in ranks(result))
