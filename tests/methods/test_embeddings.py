"""``low_rank`` of embeddings and of heads that share them, from end to end."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.nn.cost.counting import macs
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.layers.factored_embedding import FactoredEmbedding, FactoredHead

WORDS, WIDTH = 120, 16
QUIET = {"progress": False, "latency": False, "layout": "factored"}


class Speaker(nn.Module):
    def __init__(self, tied=False, bias=False, head_first=False):
        super().__init__()
        head = nn.Linear(WIDTH, WORDS, bias=bias)
        if head_first:
            self.head = head
        self.words, self.up, self.down = (
            nn.Embedding(WORDS, WIDTH),
            nn.Linear(WIDTH, 32),
            nn.Linear(32, WIDTH),
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), head
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        return self.head(self.norm(x + self.down(F.relu(self.up(x)))))


def speaker(**how):
    torch.manual_seed(0)
    model = Speaker(**how).eval()
    with torch.no_grad():
        model.words.weight *= torch.linspace(1.5, 0.05, WIDTH)
    return model


@cache
def data(known=WORDS, seed=0):
    """Few words often, many seldom, and none from ``known`` on."""
    random = torch.Generator().manual_seed(seed)
    return [(torch.rand((16, 12), generator=random) ** 3 * known).long() for _ in range(8)]


def unseen(batches):
    """Rows that no batch looks up."""
    return np.setdiff1d(np.arange(WORDS), torch.cat(batches).flatten().numpy())


def low(model, batches, **how):
    return ps.low_rank(model, batches, **{**QUIET, **how})


def line(result, name="words"):
    return next(one for one in result.report.layers if one.name == name)


def test_rows_that_occur_more_often_are_nearer():
    model, batches = speaker(), data()
    counts = np.bincount(torch.cat(batches).flatten().numpy(), minlength=WORDS)
    result = low(model, batches, rank={"words": 5}, unseen="approximate", refit="none")
    off = (result.model.words.weight - model.words.weight).square().sum(1).detach().numpy()
    plain = low(model, batches, rank={"words": 5}, method="svd")
    off_plain = (plain.model.words.weight - model.words.weight).square().sum(1).detach().numpy()
    assert off.sum() > off_plain.sum()
    assert counts @ off < counts @ off_plain
    assert result.report.divergence < plain.report.divergence
    refitted = low(model, batches, rank={"words": 5}, unseen="approximate")
    assert refitted.report.divergence < result.report.divergence


@settings(max_examples=10)
@given(
    tied=st.booleans(),
    bias=st.booleans(),
    head_first=st.booleans(),
    known=st.sampled_from([WORDS, 90]),
    measure=st.sampled_from(["params", "macs", "bytes"]),
    share=st.sampled_from([0.5, 0.7]),
    prune=st.booleans(),
    approximate=st.booleans(),
)
def test_targets_are_held_as_reported_and_files_give_the_same_network(
    tmp_path_factory, tied, bias, head_first, known, measure, share, prune, approximate
):
    model, batches = speaker(tied=tied, bias=bias, head_first=head_first), data(known)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"unseen": "approximate"} if approximate else {}
    result = low(model, batches, target={measure: share}, prune=prune, **how)
    after = result.report.after
    assert after[measure] <= share * result.report.before[measure] + 1e-6
    assert after[measure] > 0.75 * share * result.report.before[measure]
    found = {
        "params": parameters(result.model),
        "macs": macs(result.model, batches[0][:1]),
        "bytes": nbytes(result.model),
    }
    assert {name: after[name] for name in found} == found
    if measure == "macs" and not tied:
        assert type(result.model.words) is nn.Embedding
        assert "of which it has none" in line(result).why
    if tied:
        same = isinstance(result.model.words, FactoredEmbedding)
        assert isinstance(result.model.head, FactoredHead) == same
        shared = (
            result.model.head.outer.weight is result.model.words.inner.weight
            if same
            else result.model.head.weight is result.model.words.weight
        )
        assert shared
    path = tmp_path_factory.mktemp("files") / "network.safetensors"
    ps.save(result, path)
    again = ps.load(path, model)
    assert torch.equal(again(batches[0]), result.model(batches[0]))
    assert {*again.state_dict()} == {*result.model.state_dict()}
    assert parameters(again) == found["params"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_never_occur_stay_exact_and_cost_what_they_take(tied):
    model, batches = speaker(tied=tied), data(90)
    result = low(model, batches, rank={"words": 4})
    rows = unseen(batches)
    every = torch.arange(WORDS)
    assert len(rows) >= 30
    assert torch.equal(result.model.words(every)[rows], model.words(every)[rows])
    assert not torch.equal(result.model.words(every), model.words(every))
    apart = len(result.model.words.exact.weight)
    assert line(result).density == pytest.approx(
        (4 * (WORDS - apart + WIDTH) + apart * WIDTH) / (WORDS * WIDTH)
    )
    asked = low(model, batches, rank={"words": 4}, unseen="approximate")
    assert asked.model.words.exact is None
    assert asked.report.after["params"] < result.report.after["params"]


def test_where_most_rows_never_occur_nothing_is_gained_and_the_report_says_why():
    model, batches = speaker(), data(6)
    result = low(model, batches, rank=2)
    said = line(result)
    assert (said.layout, type(result.model.words)) == ("dense", nn.Embedding)
    assert "of its 120 rows never occur in the batches" in said.why
    assert 'unseen="approximate"' in said.why
    with pytest.raises(ps.PysolveError, match=r"words cannot be factored: 11\d of its 120 rows never occur"):
        low(model, batches, rank={"words": 2})


def test_without_data_all_rows_count_alike():
    model = speaker(tied=True)
    result = ps.low_rank(model, rank={"words": 5}, progress=False)
    W = model.words.weight.detach().double().numpy()
    left = np.square(np.linalg.svd(W, compute_uv=False)[5:]).sum()
    lost = np.square(W - result.model.words.weight.detach().double().numpy()).sum()
    assert lost == pytest.approx(left, rel=1e-5)
    assert result.model.head.outer.weight is result.model.words.inner.weight


def test_a_pair_is_nearer_in_both_uses_than_by_one_of_them():
    model, batches = speaker(tied=True), data()
    result = low(model, batches, rank={"words": 6}, refit="none", unseen="approximate")
    plain = low(model, batches, rank={"words": 6}, method="svd")
    assert result.report.divergence < plain.report.divergence


def test_layers_that_are_ignored_keep_what_they_share():
    model, batches = speaker(tied=True), data()
    for name in ("words", "head"):
        result = low(model, batches, rank=4, ignore=[name])
        assert result.model.head.weight is result.model.words.weight


@pytest.mark.parametrize("known", [WORDS, 90])
@pytest.mark.parametrize("tied", [False, True])
def test_other_verbs_go_on_from_there(tied, known, tmp_path):
    model, batches = speaker(tied=tied), data(known)
    first = low(model, batches, target={"params": 0.6})
    assert isinstance(first.model.words, FactoredEmbedding)
    quiet = {"progress": False, "latency": False}
    for number, result in enumerate(
        (
            ps.compress(first, batches, target={"params": 0.9}, **quiet),
            ps.prune(first, batches, amount=0.3, **quiet),
            ps.quantize(first, batches, scheme="int8-dynamic", **quiet),
            ps.quantize(first, batches, scheme="codebook", **quiet),
            low(first, batches, target={"params": 0.9}),
        )
    ):
        ps.save(result, tmp_path / f"{number}.safetensors")
        again = ps.load(tmp_path / f"{number}.safetensors", model)
        assert torch.equal(again(batches[0]), result.model(batches[0]))
        if tied:
            # What is factored once more shares both of its factors.
            parts = result.model.head.outer, result.model.words.inner
            own, shared = ({id(one) for one in part.parameters()} for part in parts)
            assert own == shared


def test_a_table_that_rescales_its_rows_is_left_alone():
    model = speaker()
    model.words.max_norm = 5.0
    result = low(model, data(), rank=4)
    assert "max_norm=5.0" in line(result).why


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Shifted(nn.Embedding):
    """Positions, from what they are of."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[1]) + 2)


@pytest.mark.parametrize(("kind", "able"), [(Scaled, True), (Shifted, False)])
def test_code_around_a_lookup_is_kept_or_found_to_need_the_whole_table(kind, able):
    model = speaker()
    model.words = kind(WORDS, WIDTH)
    result = low(model, data(90), rank=4)
    assert isinstance(result.model.words, FactoredEmbedding) == able
    if able:
        rows = unseen(data(90))
        assert torch.equal(
            result.model.words(torch.arange(WORDS))[rows], model.words(torch.arange(WORDS))[rows]
        )
    else:
        assert "never occur" in line(result).why or "asks for more" in line(result).why


def test_an_embedding_that_two_call_serves_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(2 * WIDTH, 5)

        def forward(self, ids):
            return self.head(torch.cat([self.words(ids), self.words(ids.flip(1))], -1))

    torch.manual_seed(0)
    model = Twice().eval()
    result = low(model, data(), rank={"words": 4})
    tokens = data()[0][:1].numel()
    more = macs(result.model, data()[0][:1]) - macs(model, data()[0][:1])
    assert more == 2 * tokens * 4 * WIDTH


def test_words_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="unseen"):
        low(speaker(), data(), rank=4, unseen="never")
