"""Whole heads or dimensions of heads: whichever costs less divergence, layer by layer."""

from functools import cache

import numpy as np
import pytest
import torch
from families import GROUPED, IDS, SMALL, TEXT, batches, made
from heads import Attention, inputs, network, of_rank

import pysolve as ps
from pysolve.methods.compress import compress
from pysolve.methods.sweep import sweep
from pysolve.nn.cost.per_sample import sample_macs
from pysolve.nn.evaluate import parameters
from pysolve.nn.files.checkpoint import load, save
from pysolve.nn.graph.sites import find_sites

QUIET = {"progress": False, "latency": False}


def data():
    return inputs(96).split(16)


def flat(rank=2):
    """A network all of whose heads matter, and whose dimensions beyond the first do not."""
    return of_rank(network(blocks=1, d=6, heads=3), rank)


def dims_of(model):
    return [site for site in find_sites(model, inputs(4), head_dims=True) if site.attention]


def in_each(result):
    return {site.name: site.kept for site in result.report.sites if site.name.endswith("in each head")}


@cache
def with_and_without(share):
    return [compress(flat(), data(), target={"macs": share}, head_dims=h, **QUIET) for h in (True, False)]


def test_dimensions_go_where_they_cost_less():
    dims, heads = with_and_without(0.8)
    assert 2 <= min(in_each(dims).values()) < 6
    assert not in_each(heads)
    assert dims.report.divergence < 0.5 * heads.report.divergence
    x = inputs(16, seed=7)
    for result in (dims, heads):
        before, after = (sum(sample_macs(one, x).values()) for one in (flat(), result.model))
        assert after <= 0.8 * before
        assert result.report.after["macs"] == pytest.approx(after)
        assert result.report.after["params"] == parameters(result.model)


def test_what_every_size_costs_is_what_torch_counts():
    result = with_and_without(0.8)[0]
    before, after = result.report.before["macs"], result.report.after["macs"]
    assert 0.7 * before < after <= 0.8 * before


def test_none_go_where_heads_cost_less():
    """Silent heads go first; then the call is as if dimensions had never been asked for."""
    model = network(blocks=1, heads=4)
    for one in (module for module in model.modules() if isinstance(module, Attention)):
        one.o.weight.data[:, :8] = 0.0
    plain, asked = (
        compress(model, data(), target={"macs": 0.85}, head_dims=h, **QUIET) for h in (False, True)
    )
    assert not in_each(asked)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(asked.model.state_dict()[name], value, rtol=0, atol=0)


def test_as_many_as_told_of_low_rank_are_exact():
    model, keep = flat(), 2
    small = compress(model, data(), keep=dict.fromkeys(dims_of(model), keep), **QUIET)
    assert small.model[1].attend.q.weight.shape == (3 * keep, 8)
    x = inputs(16, seed=7)
    torch.testing.assert_close(small.model(x), model(x), rtol=1e-3, atol=2e-3)


def test_files_hold_them(tmp_path):
    model = network(blocks=1, heads=4, groups=2, scale="held")
    small = compress(model, data(), keep=dict.fromkeys(dims_of(model), 3), **QUIET)
    save(small, tmp_path / "small.safetensors")
    again, x = load(tmp_path / "small.safetensors", model), inputs(4)
    assert torch.equal(again(x), small.model(x))
    assert again[1].attend.scaling == 3**-0.5


def test_heads_and_their_dimensions_do_not_go_together():
    model = network(blocks=1)
    (first,) = dims_of(model)
    with pytest.raises(ValueError, match="removes whole heads, too"):
        compress(model, data(), keep={first: 2, "1.attend.q": 2}, **QUIET)


@pytest.mark.parametrize("how", [{"refit": "none"}, {"select": "forward"}])
def test_what_dimensions_of_heads_need_is_said(how):
    model = network(blocks=1)
    (first,) = dims_of(model)
    with pytest.raises(ValueError, match="another refit than 'none'"):
        compress(model, data(), keep={first: 2}, **how, **QUIET)
    with pytest.raises(ValueError, match="give keep or a target"):
        compress(model, data(), sites=[first], lam=0.1, **QUIET)


def test_a_share_of_all_sites_is_of_heads():
    model = network(blocks=1)
    plain, asked = (compress(model, data(), keep=0.5, head_dims=h, **QUIET) for h in (False, True))
    assert not in_each(asked)
    assert asked.model[1].attend.q.weight.shape == plain.model[1].attend.q.weight.shape


def test_a_sweep_makes_the_same():
    (result,) = sweep(flat(), data(), targets=[{"macs": 0.8}], head_dims=True, **QUIET)
    assert in_each(result) == in_each(with_and_without(0.8)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "size"), [("vit", "head_dim", 3), ("t5", "d_kv", 3)])
def test_a_folder_says_the_size_of_heads(tmp_path, family, name, size):
    model, batch = made(pytest.importorskip("transformers"), family)
    dims = [site for site in find_sites(model, batch, head_dims=True) if site.attention]
    keep = dict.fromkeys(dims, size)
    small = compress(model, batches(batch), keep=keep, widths="uniform", **QUIET)
    assert ps.save_pretrained(small, tmp_path / "small").difference == 0.0
    again = type(model).from_pretrained(tmp_path / "small")
    assert getattr(again.config, name) == size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "why"),
    [("bert", "no field of BertConfig counts"), ("llama", "no configuration says which frequencies")],
)
def test_sizes_that_no_configuration_has_stay(family, why):
    model, batch = made(pytest.importorskip("transformers"), family)
    dims = [site for site in find_sites(model, batch, head_dims=True) if site.attention]
    small = compress(model, batches(batch), keep=dict.fromkeys(dims, 0.5), widths="uniform", **QUIET)
    lines = [site for site in small.report.sites if site.name.endswith("in each head")]
    assert lines
    assert all(line.pinned is not None and why in line.pinned for line in lines)
    np.testing.assert_array_equal([line.kept for line in lines], [line.channels for line in lines])


@pytest.mark.slow
def test_frequencies_that_stay_are_in_no_folder_of_the_class(tmp_path):
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **GROUPED, **SMALL, head_dim=8)).eval()
    (site,) = (one for one in find_sites(model, {"input_ids": IDS}, head_dims=True) if one.attention)
    small = compress(model, batches({"input_ids": IDS}), keep={site: 3}, **QUIET)
    with pytest.raises(ps.PysolveError, match=r"rotary_emb\.inv_freq holds other numbers"):
        ps.save_pretrained(small, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
    assert ps.save_pretrained(small, tmp_path / "own", stock=False).difference == 0.0


def test_low_rank_with_channels_knows_dimensions_too(tmp_path):
    result = ps.low_rank(flat(), data(), target={"macs": 0.8}, prune=True, **QUIET)
    dims, heads = with_and_without(0.8)
    assert result.report.divergence <= 1.01 * dims.report.divergence
    assert result.report.divergence < 0.5 * heads.report.divergence
    save(result, tmp_path / "small.safetensors")
    x = inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "small.safetensors", flat())(x), result.model(x))


def test_heads_whose_keys_never_vary_have_axes_too():
    model = flat()
    for one in (module for module in model.modules() if isinstance(module, Attention)):
        torch.nn.init.zeros_(one.k.weight)
    result = compress(model, data(), target={"macs": 0.8}, **QUIET)
    assert result.report.after["macs"] <= 0.8 * result.report.before["macs"]
    x = inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(ps.apply(model, result.plan, probe=x)(x), result.model(x))


class OneQuery(torch.nn.Module):
    """Attention with one query, whose values are wider than queries and keys."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (
            torch.nn.Linear(*size) for size in ((8, 6), (8, 6), (8, 10), (10, 3))
        )

    def forward(self, x):
        query, keys = self.q(x[:, -1]), self.k(x)
        weights = torch.einsum("bd,btd->bt", query, keys).softmax(-1)
        return self.o(torch.einsum("bt,btd->bd", weights, self.v(x)))


def test_values_that_are_wider_than_queries_lose_channels():
    torch.manual_seed(0)
    model, x = OneQuery().eval(), torch.randn(48, 5, 8).split(16)
    small = compress(model, x, keep=0.5, **QUIET)
    assert small.model.o.in_features == small.model.v.out_features == 5
    assert small.report.after["params"] == parameters(small.model)
    sites = find_sites(model, x[0], head_dims=True)
    assert ps.gather(model, x, sites=sites, progress=False)["o"].r_xx.shape == (10, 10)
