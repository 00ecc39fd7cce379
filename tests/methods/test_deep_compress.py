"""Deep compression keeps to its bytes, leaves out what nobody asked for, and tells what each stage left."""

import copy
import os
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused_unread
from small import Net, divided, network
from torch import nn

import pysolve as ps
from pysolve.methods import result as ending
from pysolve.methods.result import distance
from pysolve.nn.cut.slicing import WEIGHTED
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.files.storage import bits as raw
from pysolve.nn.layers.sharing import shared_of


def convolutional():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    layers += (nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    model = nn.Sequential(*layers).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 1.5)
    return model


def images(n=3):
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(3, 3, generator=random)
    return [torch.einsum("nchw,cd->ndhw", torch.randn(24, 3, 8, 8, generator=random), mix) for _ in range(n)]


def deep(model=None, data=None, *, target_bytes=None, target_params=None, **options):
    model = convolutional() if model is None else model
    target = {"bytes": target_bytes, "params": target_params}
    options["target"] = {what: value for what, value in target.items() if value is not None} or None
    return ps.deep_compress(model, images() if data is None else data, **{"progress": False, **options})


@cache
def usual(**options):
    return deep(**options)


def stages(result):
    return [stage.name for stage in result.report.stages]


def values_of(model):
    return {
        name: len(layer.weight.unique())
        for name, layer in model.named_modules()
        if isinstance(layer, WEIGHTED)
    }


def same(a, b, data):
    with torch.no_grad():
        return all(torch.equal(raw(a(x)), raw(b(x))) for x in data)


# --- bytes


@pytest.mark.parametrize(
    "options",
    [
        {"target_bytes": 2200},
        {"target_bytes": 0.2, "target_params": 0.8},
        {"target_bytes": 1900, "target_params": 0.5},
        {"target_bytes": 2200, "zeros": 0.5, "target_params": 1},
        {"target_bytes": 2200, "target_params": 0.7, "distill": {"epochs": 3}},
        {"target_bytes": 2200, "target_params": 1, "layout": "shared"},
        {"target_bytes": 2600, "target_params": 1, "layout": "sparse"},
    ],
    ids=str,
)
def test_the_file_has_no_more_bytes_than_asked(options, tmp_path):
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    result = deep(model, evaluate=lambda net: 12.345 + parameters(net) / 1e6, **options)
    ps.save(result, tmp_path / "a")
    size, target = os.path.getsize(tmp_path / "a"), options["target_bytes"]
    wanted = target if target > 1 else target * nbytes(model)
    assert 0.8 * wanted < size <= wanted
    assert result.report.after["file"] == size == result.report.stages[-1].bytes
    assert result.report.before["file"] == nbytes(model) == result.report.stages[0].bytes
    assert result.report.target["bytes"] == target
    assert same(ps.load(tmp_path / "a", model), result.model, images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if "target_params" in options:
        assert parameters(result.model) <= options["target_params"] * parameters(model) or (
            options.get("layout") == "sparse"
        )
        assert result.report.target["params"] == options["target_params"]


@given(st.integers(1500, 4000))
@settings(max_examples=3)
def test_any_number_of_bytes_is_held(target):
    assert deep(target_bytes=target, target_params=1).report.after["file"] <= target


def test_warnings_that_come_late_find_room(monkeypatch, tmp_path):
    calls = []

    def slower(latencies, layers):
        calls.append(latencies)
        return ["some layers take longer, said in so many words that they fill a line"] * (len(calls) > 0)

    monkeypatch.setattr(ending, "slower", slower)
    result = deep(target_bytes=2200, target_params=0.7)
    assert result.report.warnings
    ps.save(result, tmp_path / "a")
    assert os.path.getsize(tmp_path / "a") <= 2200


def test_more_bytes_are_worth_something():
    lost = [usual(target_bytes=size, target_params=1).report.divergence for size in (1700, 2800)]
    assert lost[1] < 0.6 * lost[0]


def test_layers_that_lost_channels_are_timed_as_they_are():
    result = deep(target_params=0.5, zeros=0.6, layout="auto")
    assert any("sparse would take" in line.why or line.layout == "sparse" for line in result.report.layers)


def test_bytes_out_of_reach_are_refused():
    with pytest.raises(ps.PysolveError, match="Give a larger target"):
        deep(target_bytes=300, target_params=1)
    for share in (1e-3, 1e-9):
        with pytest.raises(
            ps.PysolveError, match=f"where {max(1, int(share * nbytes(convolutional())))} are"
        ):
            deep(target_bytes=share)


# --- stages


def test_stages_come_in_order_and_each_tells_what_it_left():
    result = deep(
        target_params=0.6,
        zeros=0.5,
        bits=4,
        distill={"epochs": 2},
        evaluate=lambda net: float(parameters(net)),
    )
    assert stages(result) == [
        "original",
        "collapsed",
        "matched",
        "sparse",
        "shared, matched",
        "coded",
    ]
    first, collapsed, taught, sparse, shared, coded = result.report.stages
    assert first.divergence == 0
    assert first.bytes > collapsed.bytes == taught.bytes > sparse.bytes > shared.bytes
    assert first.score == parameters(convolutional())
    assert collapsed.score == coded.score == parameters(result.model)
    assert coded.divergence == result.report.divergence == pytest.approx(shared.divergence)
    assert all(stage.weights == parameters(convolutional()) for stage in result.report.stages)
    assert all(stage.seconds > 0 for stage in result.report.stages[1:-1])
    assert result.report.sites
    for text in (str(result.report), result.report.as_markdown()):
        assert "shared, matched" in text
    assert "## Stages" in result.report.as_markdown()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 3}, ["shared"]),
        ({"zeros": 0.6}, ["sparse", "shared"]),
        ({"target_params": 0.5}, ["collapsed", "shared"]),
        ({"target_params": 1, "bits": 4}, ["shared"]),
        ({"target_bytes": 2500, "target_params": 1}, ["shared"]),
        ({"bits": 4, "distill": {"epochs": 1}}, ["shared, matched"]),
    ],
    ids=str,
)
def test_stages_that_nobody_asks_for_are_left_out(options, expected):
    result = deep(**options)
    assert stages(result) == ["original", *expected, "coded"]
    assert result.report.divergence < 0.1
    whole = parameters(convolutional())
    assert parameters(result.model) <= options.get("target_params", 1) * whole
    assert all(count <= 1 << options.get("bits", 4) for count in values_of(result.model).values()) or (
        "target_bytes" in options
    )


def test_a_share_close_to_all_parameters_is_held_as_well():
    result = deep(target_params=0.95, bits=4)
    assert parameters(result.model) <= 0.95 * parameters(convolutional())


def test_a_number_of_parameters_is_one():
    assert parameters(deep(target_params=1200, bits=4).model) <= 1200


def test_zeros_are_as_many_as_asked_and_stay():
    result = usual(zeros=0.6, bits=4)
    weights = [m.weight for m in result.model.modules() if isinstance(m, WEIGHTED)]
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert share >= 0.6


def test_the_plans_make_the_network_again():
    result = deep(target_params=0.6, zeros=0.3, bits=4)
    model = convolutional()
    for plan in (*result.earlier, result.plan):
        model = ps.apply(model, plan)
    assert same(model, result.model, images())


def test_training_between_the_stages_brings_outputs_closer():
    data, lost = images(8), []
    for how in (0, {"epochs": 15}):
        result = deep(data=data, target_params=0.4, bits=2, distill=how)
        lost.append(distance(convolutional(), result.model, data))
    assert lost[1] < 0.95 * lost[0]


def test_layers_may_go_on_sharing_their_values():
    result = deep(bits=3, layout="shared")
    assert len(shared_of(result.model)) == 4
    assert result.report.after["params"] == parameters(convolutional())
    assert {line.layout for line in result.report.layers} == {"shared"}


# --- what is given


def test_batches_may_come_once():
    assert deep(data=iter(images()), target_bytes=2500, target_params=0.8).report.after["file"] <= 2500


def test_a_compressed_network_goes_on(tmp_path):
    smaller = ps.compress(convolutional(), images(), target={"params": 0.7}, progress=False)
    result = deep(smaller, target_params=0.6, bits=4)
    assert len(result.earlier) == 1
    ps.save(result, tmp_path / "a")
    assert same(ps.load(tmp_path / "a", convolutional()), result.model, images())


def test_layers_that_are_ignored_stay_as_they_are():
    result = deep(bits=2, ignore=["0", "re:9"])
    for name in (0, 9):
        assert torch.equal(result.model[name].weight, convolutional()[name].weight)
    assert [line.name for line in result.report.layers] == ["4", "7"]


class Odd(nn.Module):
    """Its code depends on values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(10, 40), nn.Linear(40, 3)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x if float(x.detach().sum()) > 0 else -x)


def vectors():
    return [torch.randn(30, 10, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("name", ["odd", "alone"])
def test_where_no_channel_can_go_a_note_says_so(name):
    torch.manual_seed(0)
    model = Odd().eval() if name == "odd" else nn.Sequential(nn.Linear(10, 60)).eval()
    result = deep(model, vectors(), target_bytes=1700)
    assert result.report.after["file"] <= 1700
    assert stages(result) == ["original", "shared", "coded"]
    assert any(note.startswith("all channels stay") for note in result.report.notes)
    with pytest.raises(ps.PysolveError):
        deep(model, vectors(), target_params=0.5, bits=4)


@pytest.mark.parametrize("name", ["residual", "transposed", "attention"])
def test_networks_of_other_kinds_are_compressed(name):
    model, batch = network(name)
    result = deep(model, [torch.cat([batch] * 4)] * 2, target_params=0.8, bits=4)
    assert stages(result) == ["original", "collapsed", "shared", "coded"]


# --- what cannot be meant


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give target, zeros or bits"),
        ({"target_bytes": 0}, "target for bytes must be"),
        ({"target_bytes": float("inf")}, "target for bytes must be"),
        ({"target_params": float("nan")}, "target for params must be"),
        ({"target_params": -0.5}, "target for params must be"),
        ({"zeros": -0.1}, "zeros must be"),
        ({"zeros": 1.0}, r"zeros must be in \[0, 1\)"),
        ({"bits": 0}, "bits must be an integer of 1 … 8"),
        ({"bits": 4.5}, "bits must be an integer of 1 … 8"),
        ({"bits": 4, "layout": "masked"}, "layout=.masked. is not for"),
        ({"bits": 4, "distill": {"lr": 0.1}}, "distill must name seconds or epochs"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_any_work(options, message):
    assert_refused_unread(deep, message, **options)


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        deep({"weight": 1}, bits=4)


@pytest.mark.parametrize("kind", ["weights of zero", "inputs that never change"])
def test_layers_whose_outputs_never_change_are_coded_within_the_bytes(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    if kind == "weights of zero":
        model[2].weight.data.zero_()
    x = torch.randn(32, 6) if kind == "weights of zero" else torch.ones(32, 6)
    result = ps.deep_compress(model, [x] * 3, target={"bytes": 0.6}, progress=False)
    assert result.report.after["file"] <= 0.6 * result.report.before["bytes"]
    assert result.report.divergence < 1e-4


def words():
    """An embedding, and positions of the network's own that are many enough for values of their own."""

    def run(net, ids):
        return net.head(net.fc(net.words(ids) + net.places).relu().mean(1))

    layers = {"words": nn.Embedding(90, 24), "fc": nn.Linear(24, 16), "head": nn.Linear(16, 3)}
    model = Net(run, **layers, places=nn.Parameter(0.1 * torch.randn(1, 200, 24)))
    return model, [torch.randint(0, 90, (16, 200)) for _ in range(2)]


def depthwise():
    """Each channel by itself, twice as many of each, and groups of four."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU())
    model.extend([nn.Conv2d(16, 32, 3, groups=16), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.ReLU()])
    model.extend([nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)])
    return model, images()


@pytest.mark.parametrize("build", [words, depthwise])
@pytest.mark.parametrize("options", [{}, {"zeros": 0.3}, {"target_bytes": 0.5}])
def test_embeddings_grouped_convolutions_and_parameters_lose_channels_before_they_share_values(
    build, options, tmp_path
):
    torch.manual_seed(0)
    model, data = build()
    result = deep(model.eval(), data, target_params=0.6, **options)
    assert result.plan.steps
    assert result.report.after["params"] <= 0.6 * result.report.before["params"]
    whole = model.state_dict()
    cut = {name for name, form in result.plan.forms.items() if form.codes.shape != whole[name].shape}
    assert cut >= ({"words.weight", "places"} if build is words else {"2.weight", "4.weight", "8.weight"})
    # Each entry is near one that was there before.
    first = "words.weight" if build is words else "2.weight"
    left = result.model.state_dict()[first]
    assert distance_of(left, whole[first]) < 0.1 + options.get("zeros", 0)
    ps.save(result, tmp_path / "net.safetensors")
    again = ps.load(tmp_path / "net.safetensors", model)
    assert torch.equal(again.eval()(data[0]), result.model(data[0]))


def distance_of(some, all_):
    """Share of the squares that kept columns, or rows, differ by from the nearest of the original's."""
    some, all_ = (w.T if len(w) == 90 else w.flatten(1) for w in (some, all_))
    return float((torch.cdist(some, all_).amin(1) ** 2).sum() / some.square().sum())


def test_a_network_that_divides_by_what_becomes_zero_is_not_blamed_on_the_data():
    model, batches = divided()
    result = deep(model, batches, target_bytes=0.3)
    assert result.report.divergence < 1e-3
    with pytest.warns(ps.PysolveWarning, match="none any more"):
        other = deep(model, batches, target_bytes=0.4, zeros=0.5)
    (note,) = (one for one in other.report.notes if "NaN" in one)
    assert "makes NaN or infinity of numbers (small.py" in note
    assert "the original does not: no layer is fitted on these (mid, out)" in note


def test_sizes_that_make_no_numbers_are_not_chosen():
    model, batches = divided()
    result = ps.compress(model, batches, target={"params": 0.5}, progress=False, latency=False)
    assert result.report.divergence < 1e-3
    with pytest.raises(ps.PysolveError, match="what the smallest allowed sizes cost"):
        ps.compress(model, batches, target={"params": 0.3}, progress=False, latency=False)
