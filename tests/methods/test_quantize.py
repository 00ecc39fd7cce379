"""Whole networks in few bits: how many values, which outputs, how many bytes, and what a file gives back."""

import copy
import os
import re
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial, reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import batches, convolutional, images
from refusals import assert_refused_unread
from small import chains, network
from torch import nn

import pysolve as ps
from pysolve.layer.quantize_layer import quantize_layer
from pysolve.methods.goal import Options
from pysolve.methods.layout import plan_of
from pysolve.methods.menu import Chosen
from pysolve.methods.rebuild import rebuild
from pysolve.methods.result import distance
from pysolve.methods.studied import studied
from pysolve.nn import QuantConv2d, QuantLinear, SparseLinear, to_dense
from pysolve.nn.cut.apply import apply
from pysolve.nn.cut.slicing import WEIGHTED
from pysolve.nn.divergence import kl_divergence
from pysolve.nn.evaluate import nbytes
from pysolve.nn.files.checkpoint import file_bytes
from pysolve.nn.files.storage import bits as raw
from pysolve.nn.layers.sharing import Shared, shared_of

SCHEMES = {"int8": 8, "int8-dynamic": 8, "codebook": 4, "ternary": 4}


def mlp(seed=0):
    torch.manual_seed(seed)
    layers = (nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(12, 4)).eval()


def quantize(model=None, data=None, **options):
    return ps.quantize(mlp() if model is None else model, data, **{"progress": False, **options})


@cache
def usual(**options):
    return quantize(mlp(), batches(), **options)


def weights_of(model):
    """Weights of Linear layers and convolutions as they are used."""
    plain = to_dense(model)
    return {
        name: layer.weight.detach() for name, layer in plain.named_modules() if isinstance(layer, WEIGHTED)
    }


def most(scheme, name, names):
    """How many values a layer's weights, or an output's, may have."""
    edge = len(names) > 2 and name in (names[0], names[-1])
    return 3 if scheme == "ternary" and not edge else 1 << SCHEMES[scheme]


def same(a, b, data):
    with torch.no_grad():
        return all(torch.equal(raw(a(x)), raw(b(x))) for x in data)


# --- how many values


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["residual", "transposed", "grouped", "conv1d"])
@pytest.mark.parametrize("blind", [True, False])
def test_layers_of_any_network_have_few_values(scheme, name, blind):
    model, batch = network(name)
    before = copy.deepcopy(model.state_dict())
    if scheme == "int8-dynamic" and not any(type(layer) is nn.Linear for layer in model.modules()):
        with pytest.raises(ps.PysolveError, match="nothing to quantise"):
            quantize(model, scheme=scheme)
        return
    result = quantize(model, None if blind else [batch, batch], scheme=scheme)
    new, old = weights_of(result.model), weights_of(model)
    names = [line.name for line in result.report.layers]
    assert names
    for layer in new:
        if scheme == "int8-dynamic" and type(model.get_submodule(layer)) is not nn.Linear:
            assert torch.equal(new[layer], old[layer])
            assert layer not in names
        elif layer in names:
            rows = new[layer].flatten(1) if scheme.startswith("int8") else [new[layer]]
            if scheme.startswith("int8") and isinstance(model.get_submodule(layer), nn.ConvTranspose2d):
                rows = [new[layer][:, i] for i in range(new[layer].shape[1])]
            assert all(len(row.unique()) <= most(scheme, layer, names) for row in rows)
            assert not torch.equal(new[layer], old[layer])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not result.model.training


@given(chains(), st.sampled_from(["int8", "codebook", "ternary"]), st.booleans())
@settings(max_examples=6)
def test_random_networks_are_quantised_too(chain, scheme, blind):
    model, batch = chain
    result = quantize(model, None if blind else [batch, batch], scheme=scheme)
    assert result.report.layers
    assert all(line.bits <= 8 for line in result.report.layers)
    with torch.no_grad():
        assert result.model(batch).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_networks_of_other_precisions_keep_theirs(dtype, scheme, tmp_path):
    model, data = mlp().to(dtype), [x.to(dtype) for x in batches()]
    result = quantize(model, data, scheme=scheme)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    ps.save(result, tmp_path / "a")
    assert same(ps.load(tmp_path / "a", model), result.model, data)
    assert distance(model, result.model, data) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_layer_may_be_the_whole_network(scheme, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(10, 6)
    for data in (None, batches()):
        result = quantize(model, data, scheme=scheme)
        assert type(result.model) is nn.Linear
        assert len(result.model.weight[0].unique()) <= most(scheme, "", [""])
        ps.save(result, tmp_path / "a")
        assert same(ps.load(tmp_path / "a", model), result.model, batches())


@given(st.integers(1, 8))
@settings(max_examples=8)
def test_codebooks_have_as_many_values_as_their_bits_can_tell(bits):
    result = quantize(scheme="codebook", bits=bits)
    for name, weight in weights_of(result.model).items():
        assert len(weight.unique()) <= 1 << bits
        line = next(line for line in result.report.layers if line.name == name)
        assert 0 < line.bits <= bits


def test_groups_of_inputs_have_scales_of_their_own():
    whole, grouped = (quantize(scheme="int8", bits=2, group=group) for group in (None, 5))
    assert grouped.model[0].scales.shape == (24, 2)
    old = weights_of(mlp())["0"]
    errors = [float((weights_of(one.model)["0"] - old).square().sum()) for one in (whole, grouped)]
    assert errors[1] < errors[0]


def test_dynamic_layers_are_linear_layers_alone():
    result = quantize(convolutional(), images(), scheme="int8-dynamic")
    assert type(result.model[0]) is type(result.model[3]) is nn.Conv2d
    assert isinstance(result.model[6], QuantLinear)
    assert result.model[6].dynamic
    plain = quantize(convolutional(), images(), scheme="int8")
    assert isinstance(plain.model[0], QuantConv2d)
    assert not plain.model[6].dynamic


@pytest.mark.parametrize("scheme", ["int8", "codebook"])
def test_layers_that_are_ignored_stay_as_they_are(scheme):
    result = quantize(data=batches(), scheme=scheme, ignore=["2"])
    assert torch.equal(result.model[2].weight, mlp()[2].weight)
    assert [line.name for line in result.report.layers] == ["0", "4", "6"]


# --- how well


@pytest.mark.parametrize("scheme", ["int8", "codebook", "ternary"])
def test_errors_that_make_up_for_each_other_do_less_harm(scheme):
    bits = {"int8": 3, "codebook": 2, "ternary": None}[scheme]
    lost = []
    for method in ("feedback", "nearest"):
        found = [quantize(mlp(seed), batches(), scheme=scheme, bits=bits, method=method) for seed in range(3)]
        lost.append(np.mean([distance(mlp(s), one.model, batches()) for s, one in enumerate(found)]))
    assert lost[0] < 0.8 * lost[1]


def test_data_help():
    blind, seeing = (quantize(data=data, scheme="codebook", bits=2).model for data in (None, batches()))
    assert distance(mlp(), seeing, batches()) < 0.8 * distance(mlp(), blind, batches())


@pytest.mark.parametrize("how", [{"epochs": 8}, {"epochs": 8, "trained": "both"}])
def test_training_brings_outputs_closer_with_no_more_values(how):
    plain = usual(scheme="codebook", bits=2)
    taught = quantize(data=batches(), scheme="codebook", bits=2, distill=how)
    lost = [distance(mlp(), one.model, batches()) for one in (plain, taught)]
    assert lost[1] < lost[0]
    for name, weight in weights_of(taught.model).items():
        assert len(weight.unique()) <= len(weights_of(plain.model)[name].unique())
    assert not torch.equal(taught.model[0].bias, plain.model[0].bias)


def test_ternary_training_leaves_two_values_and_zero():
    result = quantize(data=batches(), scheme="ternary", distill={"epochs": 3})
    for name in ("2", "4"):
        values = weights_of(result.model)[name].unique()
        assert len(values) == 3
        assert values[1] == 0
    assert same(ps.apply(mlp(), result.plan), result.model, batches())


# --- what is zero


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "int8"},
        {"scheme": "int8-dynamic"},
        {"scheme": "codebook"},
        {"scheme": "ternary"},
        {"scheme": "codebook", "target": {"bytes": 0.2}},
        {"scheme": "codebook", "distill": {"epochs": 3}},
        {"scheme": "codebook", "distill": {"epochs": 3, "trained": "both", "lr": 0.1}},
        {"scheme": "ternary", "distill": {"epochs": 3, "lr": 0.1}},
    ],
    ids=str,
)
def test_what_is_pruned_stays_zero(options, tmp_path):
    pruned = ps.prune(mlp(), batches(), amount=0.6, layout="dense", progress=False)
    result = quantize(pruned, batches(), **options)
    for name, weight in weights_of(result.model).items():
        zeros = weights_of(pruned.model)[name] == 0
        assert zeros.float().mean() > 0.4
        assert not weight[zeros].any()
    assert result.report.after["nonzeros"] <= pruned.report.after["nonzeros"] + 8
    ps.save(result, tmp_path / "a")
    assert same(ps.load(tmp_path / "a", mlp()), result.model, batches())


# --- how they run


@pytest.mark.parametrize("target", [None, {"bytes": 0.3}])
def test_layers_compute_the_same_however_they_run(target):
    options = {"scheme": "codebook", "target": target, "seed": 0}
    found = {
        layout: quantize(data=batches(), layout=layout, **options)
        for layout in ("dense", "auto", "sparse", "shared")
    }
    weights = {layout: weights_of(one.model) for layout, one in found.items() if layout != "shared"}
    if target is None:
        assert same(found["dense"].model, found["shared"].model, batches())
        for x in batches():
            torch.testing.assert_close(found["sparse"].model(x), found["dense"].model(x))
        assert all(torch.equal(weights["sparse"][name], weight) for name, weight in weights["dense"].items())
    assert {type(one) for one in found["sparse"].model[::2]} == {ps.nn.SparseLinear}
    assert len(shared_of(found["shared"].model)) == 4
    assert all(isinstance(one, Shared) for one in shared_of(found["shared"].model).values())
    for layout, one in found.items():
        assert one.report.after["params"] == one.report.before["params"] or layout in ("auto", "sparse")
        assert one.report.after["nonzeros"] <= one.report.before["nonzeros"]
        if layout != "auto":
            assert {line.layout for line in one.report.layers} == {layout}


# --- how many bytes


@pytest.mark.parametrize(
    ("target", "layout", "distill"),
    [
        (1100, "dense", 0),
        (0.4, "dense", {"epochs": 2}),
        (1100, "dense", {"epochs": 2, "trained": "both"}),
        (1300, "sparse", 0),
        (0.4, "sparse", {"epochs": 2}),
        (1100, "shared", 0),
    ],
    ids=str,
)
def test_the_file_has_no_more_bytes_than_asked_and_few_less(layout, distill, target, tmp_path):
    options = {"scheme": "codebook", "layout": layout, "distill": distill, "evaluate": lambda _: 12.345}
    result = quantize(data=batches(), target={"bytes": target}, **options)
    ps.save(result, tmp_path / "a")
    size = os.path.getsize(tmp_path / "a")
    wanted = target if target > 1 else target * nbytes(mlp())
    assert 0.85 * wanted < size <= wanted
    assert size == result.report.after["file"]
    assert result.report.before["file"] == nbytes(mlp())
    assert same(ps.load(tmp_path / "a", mlp()), result.model, batches())


@given(st.integers(0, 50), st.floats(800, 2400), st.booleans(), st.integers(1, 8))
@settings(max_examples=6)
def test_any_target_is_held_or_refused(seed, target, blind, bits):
    options = {"scheme": "codebook", "target": {"bytes": int(target)}, "bits": bits}
    data = None if blind else batches()
    if target < 1000:
        # Some 700 bytes are no weights.
        with suppress(ps.PysolveError):
            assert quantize(mlp(seed), data, **options).report.after["file"] <= target
        return
    result = quantize(mlp(seed), data, **options)
    assert result.report.after["file"] <= target
    assert all(len(weight.unique()) <= 1 << bits for weight in weights_of(result.model).values())


def test_larger_files_are_closer_to_the_original():
    lost = [
        distance(mlp(), quantize(data=batches(), scheme="codebook", target={"bytes": size}).model, batches())
        for size in (900, 1100, 1500)
    ]
    assert lost[0] > 1.5 * lost[1] > 2 * lost[2]


def test_one_price_for_all_bits_does_less_harm_than_as_many_values_everywhere():
    # Of one network so small a ratio may be anything from 0.6 to 1.
    ratios = {"rounded": [], "whole": []}
    for seed in range(4):
        torch.manual_seed(seed)
        layers = (nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
        model, data = nn.Sequential(*layers).eval(), batches(6)
        plain = quantize(model, data, scheme="codebook", bits=2)
        # Codebooks alone, with biases rounded as they are here, and in single precision.
        whole = copy.deepcopy(plain.model)
        whole.load_state_dict({n: v for n, v in model.state_dict().items() if "bias" in n}, strict=False)
        sizes = {"rounded": plain.report.after["file"], "whole": file_bytes(replace(plain, model=whole))}
        for what, size in sizes.items():
            priced = quantize(model, data, scheme="codebook", target={"bytes": size})
            assert priced.report.after["file"] <= size
            ratios[what].append(distance(model, priced.model, data) / distance(model, plain.model, data))
    means = {what: np.exp(np.mean(np.log(some))) for what, some in ratios.items()}
    assert means["whole"] < 0.7
    assert means["rounded"] < 0.9


def smallest(run, **options):
    """The one number of bytes that is named whenever too few are asked for, which can be had."""
    named = set()
    for target in (2, 200):
        with pytest.raises(
            ps.PysolveError, match=rf"has [\d,]+ bytes where {target} are wanted, [\d.]+ %"
        ) as e:
            run(target={"bytes": target}, **options)
        named.add(int(re.search(r"has ([\d,]+) bytes", str(e.value))[1].replace(",", "")))
    assert len(named) == 1
    least = named.pop()
    with pytest.raises(ps.PysolveError, match=rf"has {least:,} bytes where {least - 1:,} are wanted"):
        run(target={"bytes": least - 1}, **options)
    assert run(target={"bytes": least}, **options).report.after["file"] <= least
    return least


@pytest.mark.parametrize("options", [{}, {"distill": {"epochs": 1}}, {"layout": "shared"}], ids=str)
def test_a_target_out_of_reach_names_the_smallest_file(options):
    smallest(partial(quantize, data=batches(), scheme="codebook"), **options)


@pytest.mark.parametrize("options", [{}, {"distill": {"epochs": 1}}, {"zeros": 0.5}], ids=str)
def test_so_it_is_where_channels_may_go_too(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).eval()
    data = [torch.randn(50, 8) for _ in range(6)]
    smallest(partial(ps.deep_compress, model, data, progress=False), **options)


def test_too_few_bytes_are_refused_before_any_price_is_tried(monkeypatch):
    monkeypatch.setattr("pysolve.methods.rate.price_for", lambda *args, **options: pytest.fail("searched"))
    with pytest.raises(ps.PysolveError, match="where 100 are wanted"):
        quantize(data=batches(), scheme="codebook", target={"bytes": 100})


# --- what a result is worth afterwards


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "int8"},
        {"scheme": "int8", "group": 4, "bits": 4},
        {"scheme": "int8-dynamic"},
        {"scheme": "codebook"},
        {"scheme": "codebook", "layout": "sparse"},
        {"scheme": "codebook", "target": {"bytes": 0.3}},
        {"scheme": "ternary"},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [mlp, convolutional])
def test_the_plan_makes_the_network_again_and_so_does_the_file(options, build, tmp_path):
    model, data = build(), batches() if build is mlp else images()
    result = quantize(model, data, **options)
    assert same(ps.apply(model, result.plan), result.model, data)
    ps.save(result, tmp_path / "a")
    loaded = ps.load(tmp_path / "a", model)
    assert same(loaded, result.model, data)
    assert {*loaded.state_dict()} == {*result.model.state_dict()}
    assert os.path.getsize(tmp_path / "a") == result.report.after["file"]


def test_a_network_with_fewer_channels_is_quantised_and_comes_back(tmp_path):
    smaller = ps.compress(mlp(), batches(), target={"params": 0.6}, progress=False)
    result = quantize(smaller, batches(), scheme="codebook")
    assert len(result.earlier) == 1
    ps.save(result, tmp_path / "a")
    assert same(ps.load(tmp_path / "a", mlp()), result.model, batches())
    assert result.report.before["params"] == smaller.report.after["params"]


def test_the_report_tells_bits_errors_scores_and_what_was_asked():
    score = {"0.weight": 0}
    result = quantize(
        data=batches(),
        scheme="codebook",
        target={"bytes": 0.4},
        evaluate=lambda net: score.update(n=1) or float(len(net[0].weight.unique())),
    )
    report = result.report
    assert report.target == {"bytes": int(0.4 * nbytes(mlp()))}
    assert report.score_before == 240
    assert report.score_after == len(result.model[0].weight.unique())
    assert report.samples > 0
    for line in report.layers:
        weight = weights_of(result.model)[line.name]
        assert line.density == pytest.approx(float((weight != 0).float().mean()))
        assert line.error > 0
        assert line.why == f"{len(weight.unique())} values"
    assert "bytes on disk" in str(report)


def test_a_divergence_of_one_s_own_is_what_is_reported():
    result = quantize(data=batches(), scheme="codebook", divergence=lambda a, b: (a - b).sum() * 0 + 7)
    assert result.report.divergence == 7


def test_batches_may_come_once():
    result = quantize(data=iter(batches()), scheme="codebook", target={"bytes": 0.4}, distill={"epochs": 1})
    assert result.report.after["file"] <= 0.4 * nbytes(mlp())


def test_a_network_that_cannot_be_exported_is_quantised_all_the_same():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(10, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.fc1(x)
            return self.fc2(x if float(x.detach().sum()) > 0 else -x)

    for options in ({}, {"target": {"bytes": 1300}}):
        result = quantize(Odd().eval(), batches(), scheme="codebook", **options)
        assert any("cannot be traced" in note for note in result.report.notes)
        assert len(result.report.layers) == 2


# --- what cannot be meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "float"}, "unknown scheme 'float'"),
        ({"scheme": "codebook", "method": "up"}, "unknown method 'up'"),
        ({"scheme": "codebook", "layout": "masked"}, "layout=.masked. is not for"),
        ({"bits": 4}, "bits are for int8 and codebook"),
        ({"scheme": "ternary", "bits": 2}, "bits are for int8 and codebook"),
        ({"scheme": "codebook", "bits": 9}, "bits must be an integer of 1 … 8"),
        ({"scheme": "codebook", "bits": 2.5}, "bits must be an integer of 1 … 8"),
        ({"scheme": "int8", "bits": 1}, "bits must be an integer of 2 … 8"),
        ({"target": {"bytes": 0.1}}, "a target needs"),
        ({"scheme": "codebook", "target": {"params": 0.1}}, "may name bytes, got params"),
        ({"scheme": "codebook", "target": {"bytes": -1}}, "bytes"),
        ({"scheme": "codebook", "target": {"bytes": 0.1}, "method": "nearest"}, "got codebook, nearest"),
        ({"scheme": "codebook", "group": 8}, "groups of inputs are for int8"),
        ({"scheme": "int8", "group": 0}, "group must be an integer of at least 1"),
        ({"scheme": "int8", "layout": "sparse"}, "layout=.sparse. is not for"),
        ({"scheme": "int8", "distill": 1.0}, "distill is for codebook and ternary"),
        ({"scheme": "codebook", "distill": {"lr": 0.1}}, "distill must name seconds or epochs"),
        ({"scheme": "codebook", "distill": {"epochs": 1, "trained": "all"}}, "unknown trained 'all'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_any_work(options, message):
    assert_refused_unread(quantize, message, **options)


def test_training_needs_data_and_networks_something_to_quantise():
    with pytest.raises(ValueError, match="distill needs batches"):
        quantize(scheme="codebook", distill=1.0)
    with pytest.raises(ps.PysolveError, match="nothing to quantise"):
        quantize(nn.Sequential(nn.ReLU()))
    with pytest.raises(ps.PysolveError, match="nothing to quantise"):
        quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), scheme="int8-dynamic")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        quantize({"weight": 1})


@pytest.mark.parametrize(
    "again",
    [
        lambda one: ps.quantize(one, progress=False),
        lambda one: ps.compress(one, batches(), progress=False),
        lambda one: ps.sweep(one, batches(), targets=[{"params": 0.5}], progress=False),
        lambda one: ps.prune(one, batches(), amount=0.5, progress=False),
        lambda one: ps.low_rank(one, batches(), rank=2, progress=False),
        lambda one: ps.deep_compress(one, batches(), bits=4, progress=False),
    ],
    ids=["quantize", "compress", "sweep", "prune", "low_rank", "deep_compress"],
)
def test_layers_of_whole_numbers_are_not_passed_over_in_silence(again):
    result = usual(scheme="int8")
    for one in (result, result.model):
        with pytest.raises(ps.PysolveError, match=r"0 is a layer of integers.*nn\.to_dense"):
            again(one)
    assert quantize(to_dense(result.model), scheme="codebook").report.layers


def test_sparse_layers_are_quantised_too_and_keep_their_zeros(tmp_path):
    pruned = ps.prune(mlp(), batches(), amount=0.8, layout="sparse", progress=False)
    for layout in ("dense", "sparse"):
        result = quantize(pruned, batches(), scheme="codebook", layout=layout)
        assert [line.name for line in result.report.layers] == ["0", "2", "4", "6"]
        old, new = weights_of(pruned.model), weights_of(result.model)
        for name, weight in new.items():
            assert not weight[old[name] == 0].any()
            assert len(weight.unique()) <= 16
        assert type(pruned.model[0]) is SparseLinear
        assert type(result.model[0]) is (SparseLinear if layout == "sparse" else nn.Linear)
        assert same(reduce(ps.apply, (*result.earlier, result.plan), mlp()), result.model, batches())
        ps.save(result, tmp_path / "a")
        assert same(ps.load(tmp_path / "a", mlp()), result.model, batches())
        assert os.path.getsize(tmp_path / "a") == result.report.after["file"]
    assert quantize(pruned.model, batches()).report.layers
    result = ps.deep_compress(pruned, batches(), bits=4, progress=False)
    assert len(result.report.layers) == 4


# --- embeddings


def words(kind=nn.Embedding, padding=None):
    torch.manual_seed(0)
    table = kind(60, 16, padding_idx=padding)
    layers = (nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    return nn.Sequential(table, *layers).eval()


def sentences(n=3):
    random = torch.Generator().manual_seed(2)
    return [torch.randint(0, 60, (40, 5), generator=random) for _ in range(n)]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "codebook"},
        {"scheme": "codebook", "layout": "shared"},
        {"scheme": "codebook", "layout": "auto", "distill": {"epochs": 2}},
        {"scheme": "ternary", "distill": {"epochs": 2}},
    ],
    ids=str,
)
def test_embeddings_share_values_as_well(kind, options, tmp_path):
    model, data = words(kind, padding=3), sentences()
    result = quantize(model, data, **options)
    weight = to_dense(result.model)[0].weight
    assert result.report.layers[0].name == "0"
    assert len(weight.unique()) <= 16
    assert weight[3].abs().max() == 0
    ps.save(result, tmp_path / "a")
    assert same(ps.load(tmp_path / "a", words(kind, padding=3)), result.model, data)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_whole_numbers_leave_embeddings_alone(scheme):
    model = words()
    result = quantize(model, sentences(), scheme=scheme)
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert [line.name for line in result.report.layers] == ["1", "3"]


def test_bytes_are_shared_out_to_embeddings(tmp_path):
    model = words()
    for data in (sentences(), None):
        result = quantize(model, data, scheme="codebook", target={"bytes": 1800})
        ps.save(result, tmp_path / "a")
        assert 0.8 * 1800 < os.path.getsize(tmp_path / "a") <= 1800 < 0.4 * nbytes(model)


def test_what_follows_compensates_what_embeddings_lost():
    model, data = words(), sentences()
    weights = {name: model.get_submodule(name).weight for name in ("0", "1", "3")}
    known = studied(model, data, Options(progress=False), weights=weights, gather=False)

    def fit(task):
        return quantize_layer(task.weight, task.correlations, bits=1 if task.name == "0" else 8)

    done = rebuild(known, Chosen(fits=dict.fromkeys(weights, fit)))
    alone = replace(done, values={"0.weight": done.values["0.weight"]}, fits={"0": done.fits["0"]})
    lost = [distance(model, apply(model, plan_of(known, one)), data, kl_divergence) for one in (done, alone)]
    assert lost[0] < 0.8 * lost[1]


# --- what is no weight of a layer


class Positions(nn.Module):
    """Adds learnt positions, and fixed ones that fill a buffer."""

    def __init__(self):
        super().__init__()
        self.learnt = nn.Parameter(torch.randn(5, 16))
        self.register_buffer("fixed", torch.linspace(0, 1, 16) ** 3)

    def forward(self, x):
        return x + self.learnt + self.fixed


class Recurrent(nn.Module):
    """A GRU's last output, mixed by a bare matrix."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(16, 64, batch_first=True)
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x):
        return self.gru(x)[0][:, -1] @ self.mix


def recurrent():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(60, 16), Positions(), Recurrent(), nn.Linear(64, 4)).eval()


def short(value):
    return value.bfloat16().to(value.dtype)


@pytest.mark.parametrize("options", [{}, {"target": {"bytes": 26000}}], ids=str)
def test_other_parameters_take_8_bits_or_16_and_buffers_stay(options, tmp_path):
    model, data = recurrent(), sentences()
    result = quantize(model, data, scheme="codebook", **options)
    old, new = model.state_dict(), result.model.state_dict()
    gates = ["2.gru.weight_ih_l0", "2.gru.weight_hh_l0"]
    # Of recurrent layers as of others: 16 values, or as many as pay.
    assert all(len(new[name].unique()) <= (256 if options else 16) for name in gates)
    others = [name for name in old if name.startswith(("1.learnt", "2.")) and name not in gates]
    assert len(others) == 4
    for name in others:
        if name == "2.mix":
            few = 2 if "target" in options else 100
            assert few <= len(new[name].unique()) <= 256
            assert (new[name] - old[name]).norm() < (0.5 if "target" in options else 0.01) * old[name].norm()
        else:
            # Biases of gates make up for what their weights lose.
            wanted = new[name] if "bias" in name else old[name]
            torch.testing.assert_close(new[name], short(wanted), rtol=0, atol=0)
    assert torch.equal(new["1.fixed"], old["1.fixed"])
    notes = [note for note in result.report.notes if note.startswith("shared values")]
    assert notes == ["shared values of their own, for they are no layer's weight: 2.mix"]
    ps.save(result, tmp_path / "a")
    assert same(ps.load(tmp_path / "a", recurrent()), result.model, data)


@pytest.mark.parametrize("distill", [0, {"epochs": 1}])
def test_recurrent_weights_have_few_values_trained_or_not(distill):
    model = recurrent()
    with torch.no_grad():
        model[2].gru.weight_hh_l0[::2] = 0
    result = quantize(model, sentences(), scheme="codebook", distill=distill)
    weight = result.model[2].gru.weight_hh_l0
    assert 8 < len(weight.unique()) <= 16
    assert distill or not weight[::2].any()


def test_what_is_ignored_keeps_every_bit():
    model, data = recurrent(), sentences()
    ignore = ["0", "2.gru", "3"]
    with pytest.raises(ps.PysolveError, match="nothing to quantise"):
        quantize(model, data, scheme="codebook", ignore=ignore)
    model = convolutional()
    # Otherwise the norm behind it would take its bias.
    model[0] = nn.Conv2d(3, 12, 3, padding=1)
    model[1].bias.data.normal_()
    result = quantize(model, images(), scheme="codebook", ignore=["1", "3"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]) == name.startswith(("1.", "3."))


class Tied(nn.Module):
    """A bias that two modules hold, as heads of language models do."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.head.weight, self.bias = self.words.weight, self.head.bias

    def forward(self, x):
        return self.head(self.inner(self.words(x)).relu())


@pytest.mark.parametrize("scheme", ["int8", "codebook"])
def test_biases_that_modules_share_stay_shared(scheme):
    torch.manual_seed(0)
    model, words = Tied().eval(), [torch.randint(9, (32, 4)) for _ in range(4)]
    result = ps.quantize(model, words, scheme=scheme, progress=False)
    assert result.model.bias is result.model.head.bias
    assert torch.equal(result.model.bias, model.bias)


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, x: ps.quantize(model, x, scheme="int8", progress=False),
        lambda model, x: ps.quantize(model, x, scheme="codebook", progress=False),
        lambda model, x: ps.prune(model, x, method="obs", amount=0.5, layout="dense", progress=False),
        lambda model, x: ps.low_rank(model, x, rank=2, layout="factored", progress=False),
        lambda model, x: ps.compress(model, x, keep=0.5, progress=False),
        lambda model, x: ps.compress(model, x, target={"params": 0.7}, latency=False, progress=False),
        lambda model, x: ps.quantize(model, x, scheme="codebook", target={"bytes": 0.6}, progress=False),
        lambda model, x: ps.deep_compress(model, x, target={"bytes": 0.6}, latency=False, progress=False),
    ],
)
def test_layers_that_read_next_to_nothing_are_no_error(verb):
    torch.manual_seed(0)
    layers = nn.Linear(6, 32, bias=False), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    model = nn.Sequential(*layers)
    # The least number of float32, at few samples.
    model[0].weight.data.zero_()[:, 0] = 1.4e-45
    result = verb(model.eval(), [0.5 * torch.randn(32, 6) for _ in range(4)])
    assert result.model(torch.randn(4, 6)).isfinite().all()
