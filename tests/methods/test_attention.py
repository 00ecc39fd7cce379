"""Verbs on torch's attention: its projections are layers, and what is not cut is torch's again."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pysolve as ps
from pysolve.nn.cut.apply import masked
from pysolve.nn.layers.attention import Attention
from pysolve.nn.layers.quantized import QuantLinear
from pysolve.nn.running import evaluating


@cache
def batches():
    torch.manual_seed(0)
    lengths = torch.randint(2, 8, (6, 16))
    tokens = torch.randint(1, 30, (6, 16, 7))
    return [*(tokens * (torch.arange(7) < lengths[..., None]))]


@cache
def network(norm_first=False):
    torch.manual_seed(1)
    return Tagger(norm_first).eval()


class Tagger(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=norm_first)
        self.table = nn.Embedding(30, 12, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(12, 5)

    def forward(self, ids):
        pad = ids == 0
        x = self.encoder(self.table(ids), src_key_padding_mask=pad).masked_fill(pad[..., None], 0)
        return self.head(x.sum(1) / (~pad).sum(1, keepdim=True))


def outputs(model, batch):
    with evaluating(model, as_used=True):
        return model(batch)


def check(result, model, tmp_path, before=None):
    """Plan and file make the network that was returned."""
    x = batches()[0]
    expected = outputs(result.model, x)
    made = ps.apply(before or model, result.plan, probe=x)
    torch.testing.assert_close(outputs(made, x), expected)
    ps.save(result, tmp_path / "small.safetensors")
    torch.testing.assert_close(outputs(ps.load(tmp_path / "small.safetensors", model), x), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_heads_and_stream_of_torchs_encoder_go(norm_first, tmp_path):
    model = network(norm_first)
    result = ps.compress(model, batches(), target={"macs": 0.25}, latency=False)
    report = result.report
    assert report.after["macs"] <= 0.25 * report.before["macs"]
    with evaluating(result.model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result.model(batches()[0])
    assert report.after["macs"] == pytest.approx(counter.get_total_flops() / 2 / 16, rel=0.01)
    own = [one for one in result.model.modules() if isinstance(one, Attention)]
    assert own
    assert all(one.q_proj.out_features < 12 or one.q_proj.in_features < 12 for one in own)
    check(result, model, tmp_path)


class Translator(nn.Module):
    """An encoder and a decoder with words of their own, of which either has a stream."""

    def __init__(self, norm_first):
        super().__init__()
        self.read, self.said = nn.Embedding(30, 12, padding_idx=0), nn.Embedding(20, 12)
        self.both = nn.Transformer(12, 2, 1, 1, 16, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(12, 20)

    def forward(self, ids, words):
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        x, y = self.read(ids), self.said(words)
        return self.head(self.both(x, y, tgt_mask=mask, tgt_is_causal=True, src_key_padding_mask=ids == 0))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_streams_of_torchs_encoder_and_decoder_have_widths_of_their_own(norm_first, tmp_path):
    torch.manual_seed(2)
    model = Translator(norm_first).eval()
    given = [{"ids": ids, "words": torch.randint(20, (16, 5))} for ids in batches()]
    keep = {"read": 7, "said": 9}
    result = ps.compress(model, given, keep=keep, latency=False)
    sites = {step.site.writers[0]: len(step.keep) for step in result.plan.steps}
    assert sites == keep
    small = result.model
    assert [small.read.embedding_dim, small.said.embedding_dim] == [7, 9]
    with evaluating(model, small):
        assert (small(**given[0]) - masked(model, result.plan)(**given[0])).abs().max() <= 1e-4
        ps.save(result, tmp_path / "small.safetensors")
        again = ps.load(tmp_path / "small.safetensors", model)
        torch.testing.assert_close(again(**given[0]), small(**given[0]))
    assert type(model.both) is nn.Transformer
    # Where nothing is cut, it is torch's again.
    pruned = ps.prune(model, given, amount=0.3, layout="dense", latency=False)
    assert type(pruned.model.both) is nn.Transformer


def test_sites_by_hand_are_those_of_the_given_network():
    model, x = network(), batches()[0]
    closed = ps.find_sites(model, x)
    assert not any("q_proj" in name for site in closed for name in (*site.writers, *site.readers))
    sites = [
        site
        for site in ps.find_sites(model, x, attention=True)
        if site.readers == ("encoder.layers.0.self_attn.out_proj",)
    ]
    assert [site.channels for site in sites] == [4]
    smaller = ps.apply(model, ps.Plan((ps.Collapse(sites[0], np.array([0, 2])),)), probe=x)
    assert smaller.encoder.layers[0].self_attn.num_heads == 2
    assert type(smaller.encoder.layers[1].self_attn) is nn.MultiheadAttention
    # The encoder as a whole must not drop padding for a layer that takes none.
    assert outputs(smaller, x).isfinite().all()
    found = ps.gather(model, batches(), sites=sites)
    assert set(found) == {"encoder.layers.0.self_attn.out_proj"}


@pytest.mark.parametrize("bias", [True, False])
def test_what_gets_values_alone_is_torchs_again(bias, tmp_path):
    torch.manual_seed(2)
    model = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, bias=bias).eval()
    data = [torch.randn(20, 5, 8) for _ in range(6)]
    sites = [site for site in ps.find_sites(model, data[0]) if site.writers == ("linear1",)]
    result = ps.compress(model, data, sites=sites, target={"params": 0.8}, latency=False)
    pruned = ps.prune(model, data, amount=0.5, layout="dense", latency=False)
    for one in (result, pruned):
        assert type(one.model.self_attn) is nn.MultiheadAttention
        assert not any("q_proj" in name for name in one.plan.values)
        torch.testing.assert_close(outputs(ps.apply(model, one.plan), data[0]), outputs(one.model, data[0]))
    zeros = pruned.model.self_attn.in_proj_weight.eq(0).sum()
    assert zeros > 0
    assert "self_attn.in_proj_weight" in pruned.plan.values
    assert model.state_dict().keys() == pruned.model.state_dict().keys()


def test_integers_run_and_factors_come_back(tmp_path):
    model = network()
    integers = ps.quantize(model, batches(), scheme="int8-dynamic", latency=False)
    assert isinstance(integers.model.encoder.layers[1].self_attn.v_proj, QuantLinear)
    assert not any("Multihead" in note for note in integers.report.notes)
    check(integers, model, tmp_path)
    factored = ps.low_rank(model, batches(), rank=3, layout="factored", latency=False)
    check(factored, model, tmp_path)
    coded = ps.deep_compress(model, batches(), target={"bytes": 0.2}, latency=False)
    check(coded, model, tmp_path)
    again = ps.compress(coded, batches(), target={"macs": 0.5}, latency=False)
    check(again, model, tmp_path, coded.model)


def test_a_study_serves_all_verbs_and_comes_back_from_its_file(tmp_path):
    model = network()
    found = ps.study(model, batches())
    assert "encoder.layers.0.self_attn.q_proj" in found.correlations
    found.save(tmp_path / "study.safetensors")
    loaded = ps.Study.load(tmp_path / "study.safetensors", model)
    values = []
    for one in (found, loaded, batches()):
        result = ps.compress(model, one, target={"macs": 0.5}, latency=False)
        values.append([len(step.keep) for step in result.plan.steps])
        assert ps.prune(model, one, amount=0.5, latency=False).report.divergence > 0
    assert values[0] == values[1] == values[2]


def test_attention_may_be_left_out_by_type_and_by_name():
    model = network()
    for ignore in ([nn.MultiheadAttention], ["re:.*self_attn"], [model.encoder.layers[0].self_attn]):
        sites = ps.find_sites(model, batches()[0], ignore=ignore, attention=True)
        first = next(s for s in sites if "encoder.layers.0.self_attn.q_proj" in s.writers)
        assert first.pinned is not None
        assert "ignored" in first.pinned
    result = ps.compress(
        model, batches(), target={"macs": 0.9}, ignore=[nn.MultiheadAttention], latency=False
    )
    assert not any(isinstance(one, Attention) for one in result.model.modules())


def test_weights_of_attention_that_are_an_output_keep_the_heads():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)

    class Unread(Weights):
        def forward(self, x):
            return self.attention(x, x, x)[0]

    x = torch.randn(4, 5, 6)
    heads = {kind: ps.find_sites(kind().eval(), x, attention=True)[0] for kind in (Weights, Unread)}
    assert heads[Weights].pinned is not None
    assert heads[Unread].pinned is None
    assert heads[Unread].channels == 2


# Torch's own, where the encoder is timed as it is used.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_training_with_masks_reaches_the_projections():
    model, data = network(), [(x, torch.zeros(16, dtype=torch.long)) for x in batches()]
    result = ps.prune_gradually(model, data, amount=0.5, epochs=1, layout="dense", progress=False)
    attention = result.model.encoder.layers[0].self_attn
    assert type(attention) is nn.MultiheadAttention
    assert all(50 < int(one.eq(0).sum()) < 94 for one in attention.in_proj_weight.chunk(3))
    assert "encoder.layers.0.self_attn.v_proj" in [line.name for line in result.report.layers]


def test_shares_of_all_sites_leave_attention_whole_but_for_sites_that_are_named():
    model = network()
    half = ps.compress(model, batches(), keep=0.5, latency=False)
    names = {*half.plan.values, *(name for step in half.plan.steps for name in step.site.readers)}
    assert not any("q_proj" in name for name in names)
    sites = ps.find_sites(model, batches()[0], attention=True)
    heads = next(site for site in sites if site.channels == 4)
    for key in (heads, heads.writers[0]):
        result = ps.compress(model, batches(), keep={key: 0.5}, latency=False)
        assert [len(step.keep) for step in result.plan.steps] == [2]
    assert ps.inspect(model, batches()[0]).rows[1].channels == 4


class Reader(nn.Module):
    """Attention over inputs, whose outputs one layer reads."""

    def __init__(self, **how):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **how)
        self.inner, self.back, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.attention(x, x, x, need_weights=False)[0])
        return self.head(x + self.back(torch.relu(self.inner(x))))


def test_projections_with_and_without_biases_run_in_torchs_encoder(tmp_path):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, bias=False)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model, data = nn.Sequential(nn.Linear(5, 8), encoder, nn.Linear(8, 3)).eval(), batches_of(5)
    some = []
    for share in (0.7, 0.6, 0.5):
        result = ps.compress(model, data, target={"params": share}, latency=False)
        own = [layer.self_attn for layer in result.model[1].layers]
        some += [(one.q_proj.bias is None) != (one.v_proj.bias is None) for one in own]
        with torch.no_grad():
            assert result.model(data[0]).shape == (20, 4, 3)
        restored(result, model, data[0], tmp_path)
    assert any(some)


class Cross(nn.Module):
    """A decoder that makes its mask, and is not told that it is causal."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = self.first(x)
        return self.head(self.decoder(x, torch.cos(x).flip(1), tgt_mask=mask))


def test_masks_that_torch_would_look_at_are_followed(tmp_path):
    torch.manual_seed(4)
    model, data = Cross().eval(), batches_of(5)
    result = ps.compress(model, data, target={"macs": 0.6}, latency=False)
    assert any(isinstance(one, Attention) for one in result.model.modules())
    restored(result, model, data[0], tmp_path)


def batches_of(width):
    return [torch.randn(20, 4, width) for _ in range(4)]


def restored(result, model, x, tmp_path):
    """Plan and file make the network that was returned."""
    expected, names = outputs(result.model, x), [*result.model.state_dict()]
    ps.save(result, tmp_path / "small.safetensors")
    for made in (ps.apply(model, result.plan, probe=x), ps.load(tmp_path / "small.safetensors", model)):
        torch.testing.assert_close(outputs(made, x), expected)
        assert [*made.state_dict()] == names


PROJECTIONS = ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
VERBS = {
    "prune": lambda *given, **how: ps.prune(*given, amount=0.5, layout="dense", **how),
    "factors": lambda *given, **how: ps.low_rank(*given, rank=2, layout="factored", **how),
    "integers": lambda *given, **how: ps.quantize(*given, scheme="int8-dynamic", **how),
    "codes": lambda *given, **how: ps.quantize(*given, scheme="codebook", bits=3, **how),
    "channels": lambda *given, **how: ps.compress(*given, target={"params": 0.9}, **how),
    "branch": lambda *given, **how: ps.compress(*given, keep={"inner": 0}, **how),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("left", [PROJECTIONS, ["attention.out_proj"], []])
@pytest.mark.parametrize("bias", [True, False])
def test_some_projections_alone_come_back(verb, left, bias, tmp_path):
    torch.manual_seed(3)
    model, data = Reader(bias=bias).eval(), batches_of(8)
    result = VERBS[verb](model, data, ignore=left, latency=False)
    restored(result, model, data[0], tmp_path)
    if verb in ("prune", "branch") or (verb == "codes" and left == PROJECTIONS):
        assert type(result.model.attention) is nn.MultiheadAttention


def test_outputs_of_attention_go_by_name_and_by_hand(tmp_path):
    torch.manual_seed(3)
    model, data = Reader().eval(), batches_of(8)
    result = ps.compress(model, data, keep={"attention.out_proj": 5}, latency=False)
    assert result.model.head.in_features == 5
    restored(result, model, data[0], tmp_path)
    (site,) = (s for s in ps.find_sites(model, data[0], attention=True) if "attention.out_proj" in s.writers)
    made = ps.apply(model, ps.Plan((ps.Collapse(site, np.arange(5)),)), probe=data[0])
    assert made.attention.out_proj.out_features == 5


def test_names_of_projections_may_be_ignored_where_attention_stays_whole():
    torch.manual_seed(3)
    model, data = Reader().eval(), batches_of(8)
    for result in (
        ps.compress(model, data, keep=0.5, ignore=PROJECTIONS, latency=False),
        ps.compress(model, data, lam=0.1, ignore=PROJECTIONS, latency=False),
        ps.prune(model, data, method="ln", amount=0.5, ignore=PROJECTIONS, latency=False),
    ):
        assert type(result.model.attention) is nn.MultiheadAttention


class Scored(nn.Module):
    """Attention whose weights are an output."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        mixed, weights = self.first(x, x, x, average_attn_weights=False)
        return self.head(mixed), weights


def test_reasons_name_lines_of_the_users_code():
    x = torch.randn(4, 5, 8)
    for model, given in ((Scored(), x), (nn.MultiheadAttention(8, 2), {"query": x, "key": x, "value": x})):
        sites = ps.find_sites(model.eval(), given, attention=True, head_dims=True)
        assert all(
            "attention.py" not in site.pinned.replace("test_attention.py", "")
            for site in sites
            if site.pinned
        )
