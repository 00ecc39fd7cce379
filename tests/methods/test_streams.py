"""Streams in their principal axes: an equal network, its correlations, and plans for the original."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pysolve.errors import CollapseError
from pysolve.methods.candidates import candidates_of
from pysolve.methods.compress import compress
from pysolve.methods.goal import Options
from pysolve.methods.kinds.channels import _leading
from pysolve.methods.kinds.ranks import ranks_of
from pysolve.methods.low_rank import _Plan
from pysolve.methods.price import divergence_of, probe
from pysolve.methods.streams import in_principal_axes
from pysolve.methods.studied import studied
from pysolve.methods.weights import weights_of
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.files.checkpoint import load, save
from pysolve.nn.gathering.gather import gather
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layer_kinds import WEIGHTED
from pysolve.plan import Collapse, Plan

WIDTH, WORDS = 12, 40


class Block(nn.Module):
    def __init__(self, width, bias, norm):
        super().__init__()
        self.norm = norm(width, eps=0.01)
        self.up, self.down = nn.Linear(width, 16, bias=bias), nn.Linear(16, width, bias=bias)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


class Decoder(nn.Module):
    def __init__(self, *, tied=False, bias=False, norm=nn.RMSNorm, blocks=2):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(1, 6, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, bias, norm) for _ in range(blocks)))
        self.norm, self.head = norm(WIDTH, eps=0.01), nn.Linear(WIDTH, WORDS, bias=bias and not tied)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.words(ids) + self.places)))


def decoder(seed=0, **options):
    torch.manual_seed(seed)
    model = Decoder(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            module.weight.data *= torch.randint(0, 2, (WIDTH,)) * 2 - 1
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.bias)
    return model


def ids(n=48, seed=1):
    return torch.randint(WORDS, (n, 6), generator=torch.Generator().manual_seed(seed))


def study_of(model):
    return studied(model, ids().split(8), Options(), sites=True)


def norms():
    return st.sampled_from([nn.RMSNorm, nn.LayerNorm])


@pytest.fixture(params=[nn.RMSNorm, nn.LayerNorm])
def norm(request):
    return request.param


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 50), bias=st.booleans(), norm=norms(), blocks=st.integers(1, 3))
def test_a_turned_network_gives_the_same(seed, bias, norm, blocks):
    model = decoder(seed, bias=bias, norm=norm, blocks=blocks)
    turned = in_principal_axes(study_of(model))
    assert turned.turn is not None
    assert not turned.notes
    torch.testing.assert_close(turned.model(ids(seed=2)), model(ids(seed=2)), rtol=1e-4, atol=1e-5)


def test_correlations_are_those_of_the_turned_network(norm):
    before = study_of(decoder(bias=True, norm=norm))
    turned = in_principal_axes(before)
    found = gather(turned.model, [*before], layers=[*turned.correlations])
    for name, one in turned.correlations.items():
        scale = np.abs(found[name].xx).max()
        np.testing.assert_allclose(one.xx, found[name].xx, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(one.yx, found[name].yx, atol=1e-4 * scale, err_msg=name)
        np.testing.assert_allclose(one.x_sum, found[name].x_sum, atol=1e-4 * scale, err_msg=name)


def test_what_stays_of_a_stream_of_low_rank_is_all_of_it(norm):
    """Of a stream in three directions, whatever they are, three axes are enough: exact."""
    model = decoder(bias=True, norm=norm)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:, :3]
    if norm is nn.LayerNorm:
        mix = torch.linalg.qr(mix - mix.mean(0))[0]
    mix = mix @ mix.T
    with torch.no_grad():
        model.words.weight.copy_(model.words.weight @ mix)
        model.places.copy_(model.places @ mix)
        for block in model.blocks:
            block.down.weight.copy_(mix @ block.down.weight)
            block.down.bias.copy_(mix @ block.down.bias)
    # Three directions without a mean take four channels.
    keep = {"words": 3 + (norm is nn.LayerNorm)}
    small = compress(model, ids().split(8), keep=keep, progress=False, latency=False)
    assert small.model.words.weight.shape == (WORDS, keep["words"])
    torch.testing.assert_close(small.model(ids(seed=2)), model(ids(seed=2)), rtol=1e-3, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 50), norm=norms(), keep=st.integers(1, WIDTH - 1))
def test_one_cut_network_is_its_masked_original(seed, norm, keep):
    model = decoder(seed, norm=norm)
    (stream,) = (site for site in known_sites(norm) if site.norms)
    plan = Plan((Collapse(stream, np.sort(np.random.default_rng(seed).permutation(WIDTH)[:keep])),))
    small, wide = apply(model, plan), masked(model, plan)
    torch.testing.assert_close(small(ids(seed=2)), wide(ids(seed=2)), rtol=1e-4, atol=1e-4)


@cache
def known_sites(norm):
    return [site for site in find_sites(decoder(norm=norm), ids(2)) if site.pinned is None]


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_makes_the_network_of_the_original(tied, norm, tmp_path, monkeypatch):
    monkeypatch.setattr("pysolve.methods.streams._UNTIED", 2.0)
    model = decoder(tied=tied, norm=norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = compress(model, ids().split(8), keep={"words": 8}, progress=False, latency=False)
    wanted = small.model(ids(seed=2))
    assert small.model.norm.normalized_shape == (8,)
    assert small.plan.untied == (("head.weight",) if tied else ())
    torch.testing.assert_close(apply(model, small.plan)(ids(seed=2)), wanted)
    save(small, tmp_path / "small")
    torch.testing.assert_close(load(tmp_path / "small", model)(ids(seed=2)), wanted, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_shares_refer_to_what_was_given(monkeypatch):
    monkeypatch.setattr("pysolve.methods.streams._UNTIED", 2.0)
    model = decoder(tied=True)
    small = compress(model, ids().split(8), target={"params": 0.7}, progress=False, latency=False)
    params = sum(p.numel() for p in model.parameters())
    assert small.report.before["params"] == params
    assert sum(p.numel() for p in small.model.parameters()) <= 0.7 * params


def test_a_large_tied_head_stays_tied_and_the_report_says_so():
    model = decoder(tied=True)
    small = compress(model, ids().split(8), keep={"words": 8}, progress=False, latency=False)
    assert small.model.head.weight is small.model.words.weight
    assert any("head would need a weight of its own" in note for note in small.report.notes)


def test_a_layer_that_scales_channels_on_the_way_is_not_turned():
    class Scaled(Decoder):
        def __init__(self):
            super().__init__(bias=True)
            self.scale = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))

        def forward(self, ids):
            return self.head(self.norm(self.blocks(self.words(ids) * self.scale)))

    torch.manual_seed(0)
    model = Scaled().eval()
    assert any(site.norms for site in find_sites(model, ids(2)) if site.pinned is None)
    small = compress(model, ids().split(8), keep={"words": 8}, progress=False, latency=False)
    assert any("were selected, not turned" in note for note in small.report.notes)


@pytest.mark.parametrize("bias", [False, True])
def test_errors_of_leading_channels_are_those_of_least_squares(bias, norm):
    turned = in_principal_axes(study_of(decoder(bias=bias, norm=norm)))
    (site,) = turned.turn.sites
    order, error = _leading(turned, site)
    np.testing.assert_array_equal(order, np.arange(WIDTH)[::-1])
    for k in (1, 5, WIDTH - 1):
        lost = []
        for name in site.readers:
            known = turned.correlations[name]
            R, C = known.covariance()
            B = np.linalg.lstsq(R[:k, :k], C[:, :k].T, rcond=None)[0]
            energy = np.einsum("ij,ij", turned.matrix(name) @ R, turned.matrix(name))
            lost.append(1 - np.vdot(B.T, C[:, :k]) / energy)
        np.testing.assert_allclose(error[k], np.mean(lost), rtol=1e-3, atol=1e-6)


def test_a_stream_that_stays_whole_is_not_turned():
    model = decoder()
    small = compress(model, ids().split(8), keep={"blocks.0.up": 8}, progress=False, latency=False)
    torch.testing.assert_close(small.model.norm.weight, model.norm.weight, rtol=0, atol=0)
    assert "words.weight" not in small.plan.values


def test_a_site_that_passes_a_norm_names_it(norm):
    model = decoder(norm=norm)
    (stream,) = (site for site in known_sites(norm) if site.norms)
    plan = Plan((Collapse(replace(stream, norms=stream.norms[1:]), np.arange(4)),))
    with pytest.raises(CollapseError, match="name it in the norms"):
        apply(model, plan)


def test_a_penalty_finds_channels_not_axes():
    model = decoder()
    small = compress(model, ids().split(8), lam={"words": 1e-4}, progress=False, latency=False)
    assert small.plan.untied == ()
    assert "norm.weight" not in small.plan.values


def test_code_for_batches_of_one_size_is_turned_as_well():
    class Fixed(Decoder):
        def forward(self, ids):
            x = torch.stack([self.words(row) for row in ids]) + self.places
            return self.head(self.norm(self.blocks(x)))

    torch.manual_seed(0)
    model = Fixed().eval()
    small = compress(model, ids(96).split(8), keep={"words": 8}, progress=False, latency=False)
    assert small.model.words.weight.shape == (WORDS, 8)
    assert "norm.weight" in small.plan.values


def test_bounded_memory_gives_the_same_axes():
    model = decoder(bias=True)
    found = [
        compress(model, ids().split(8), keep={"words": 8}, memory=bound, progress=False, latency=False)
        for bound in (None, "2GiB")
    ]
    torch.testing.assert_close(found[0].model(ids(seed=2)), found[1].model(ids(seed=2)), rtol=1e-4, atol=1e-4)


def test_what_errors_mean_follows_outputs_back_from_their_axes(norm):
    model = decoder(norm=norm)
    weights, left = weights_of(model, (), (*WEIGHTED, nn.Embedding), tied=True)
    before = studied(model, ids().split(8), Options(), weights=weights, sites=True, gather=True, left=left)
    found = in_principal_axes(before)
    assert found.turn is not None
    wanted, turned = (ranks_of(one, "channel", False)[0] for one in (before, found))
    back = turned.unturned(found.turn.outputs)
    for name, metric in wanted.metrics.items():
        np.testing.assert_allclose(back.metrics[name], metric, atol=1e-4 * np.abs(metric).max())
    S = wanted.tables["words"].uses.metric
    np.testing.assert_allclose(back.tables["words"].uses.metric, S, atol=1e-4 * np.abs(S).max())
    assert np.abs(turned.metrics["blocks.0.down"] - wanted.metrics["blocks.0.down"]).max() > 0.01

    # Layers of a plan are fitted alike in either network.
    table = candidates_of(found, turned, {}, timed=False)
    plan = _Plan(found, None, dict.fromkeys(["words", "blocks.0.down", "blocks.1.up"], 3), table)
    where = probe(found, [])
    of_both = [divergence_of(one, plan.chosen(one), where) for one in (before, found)]
    assert of_both[0] == pytest.approx(of_both[1], rel=1e-3)
    stale = divergence_of(before, replace(plan, study=before).chosen(before), where)
    assert stale > 1.02 * of_both[0]
