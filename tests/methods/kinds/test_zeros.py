"""Single weights pruned: what stays, how layers run, what the report says."""

import copy
from functools import reduce

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.methods import layout as layouts
from pysolve.nn import to_dense
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear
from pysolve.report.rows import Latency


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 40), nn.ReLU(), nn.Linear(40, 5)
    ).eval()


def batches():
    return [torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def kinds(model):
    return [type(model[i]).__name__ for i in (0, 3, 5)]


def same_values(a, b):
    a, b = to_dense(a).state_dict(), to_dense(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timing(monkeypatch, dense, sparse):
    """Every layer takes as long as we say."""

    def latency(model, x, repeats):
        seconds = sparse if isinstance(model, SparseLinear | SparseConv2d) else dense
        return Latency(seconds, seconds, seconds, len(x), 1)

    monkeypatch.setattr(layouts, "latency", latency)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_smallest_weights_are_zero_however_the_layers_run(layout, scope):
    model = network()
    before = copy.deepcopy(model.state_dict())
    result = ps.prune(model, batches(), amount=0.8, scope=scope, layout=layout)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weights = [
        (getattr(result.model[i], "to_dense", lambda i=i: result.model[i])().weight, model[i].weight)
        for i in (0, 3, 5)
    ]
    for group in [weights] if scope == "global" else [[pair] for pair in weights]:
        new, old = (torch.cat([w.flatten() for w in side]) for side in zip(*group, strict=True))
        gone = new == 0
        assert int(gone.sum()) == int(0.8 * len(new) + 1e-9)
        assert torch.equal(new[~gone], old[~gone])
        assert old[gone].abs().max() <= old[~gone].abs().min()
    sparse = ["SparseConv2d", "SparseLinear", "SparseLinear"]
    assert kinds(result.model) == (sparse if layout == "sparse" else ["Conv2d", "Linear", "Linear"])


def test_sparse_and_dense_layouts_compute_the_same():
    x = batches()[0]
    dense, sparse = (ps.prune(network(), amount=0.7, layout=layout).model for layout in ("dense", "sparse"))
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x))


def test_layers_run_sparse_where_that_is_faster(monkeypatch):
    timing(monkeypatch, dense=3e-3, sparse=1e-3)
    result = ps.prune(network(), batches(), amount={"3": 0.9, "5": 0.9})
    assert kinds(result.model) == ["Conv2d", "SparseLinear", "SparseLinear"]
    assert [line.layout for line in result.report.layers] == ["dense", "sparse", "sparse"]
    assert [line.why for line in result.report.layers] == [
        "nothing was pruned",
        "3.0 times as fast on 20 samples",
        "3.0 times as fast on 20 samples",
    ]
    assert result.report.layers[1].dense_seconds == 3e-3


def test_layers_stay_dense_where_sparse_is_slower_or_larger(monkeypatch):
    timing(monkeypatch, dense=1e-3, sparse=1.5e-3)
    result = ps.prune(network(), batches(), amount={"3": 0.9, "5": 0.3})
    assert kinds(result.model) == ["Conv2d", "Linear", "Linear"]
    slower, larger = result.report.layers[1:]
    assert slower.why == "sparse would take 1.50 times as long"
    assert "times the bytes" in larger.why
    assert "sparse would take 1.50 times as long" in str(result.report)


def test_a_layer_that_is_hardly_faster_stays_dense(monkeypatch):
    timing(monkeypatch, dense=1e-3, sparse=0.95e-3)
    result = ps.prune(network(), batches(), amount=0.9)
    assert {line.why for line in result.report.layers} == {"sparse would take 0.95 times as long"}


def test_without_batches_nothing_is_timed_and_that_is_said():
    result = ps.prune(network(), amount=0.9)
    assert kinds(result.model) == ["Conv2d", "Linear", "Linear"]
    assert {line.why for line in result.report.layers} == {"not timed: no batch reached it"}
    assert result.report.held == 0
    assert "macs" not in result.report.before
    assert "divergence" not in str(result.report)


def test_layers_without_a_sparse_form_are_pruned_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 3, 2))
    result = ps.prune(model, amount=0.5, layout="sparse")
    assert [line.why for line in result.report.layers] == [
        "a Conv1d has no sparse form",
        "a ConvTranspose1d has no sparse form",
    ]
    assert int((result.model[0].weight == 0).sum()) == 12


def test_sparse_layers_are_pruned_further_and_keep_their_zeros(tmp_path):
    first = ps.prune(network(), batches(), amount=0.5, layout="sparse")
    again = ps.prune(first, batches(), amount=0.8, layout="sparse")
    assert kinds(first.model) == kinds(again.model) == ["SparseConv2d", "SparseLinear", "SparseLinear"]
    old, new = (to_dense(one.model).state_dict() for one in (first, again))
    for name in ("0.weight", "3.weight", "5.weight"):
        assert not new[name][old[name] == 0].any()
    gone, count = (new["3.weight"] == 0).sum(), new["3.weight"].numel()
    assert 0.7 < gone / count < 0.9
    plans = (*again.earlier, again.plan)
    assert same_values(reduce(ps.apply, plans, network()), again.model)
    ps.save(again, tmp_path / "a")
    with torch.no_grad():
        x = batches()[0]
        assert torch.equal(ps.load(tmp_path / "a", network())(x), again.model(x))
    assert kinds(ps.prune(first.model, amount=0.8, layout="dense").model) == ["Conv2d", "Linear", "Linear"]


def test_a_network_that_is_one_layer_is_pruned_dense():
    model = nn.Linear(6, 4)
    result = ps.prune(model, amount=0.5, layout="sparse")
    assert type(result.model) is nn.Linear
    assert int((result.model.weight == 0).sum()) == 12
    assert "put it into an nn.Sequential" in result.report.layers[0].why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["auto", "sparse"])
def test_half_precision_is_pruned_dense(dtype, layout):
    model = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    result = ps.prune(model, [torch.randn(5, 8, dtype=dtype)], amount=0.5, layout=layout)
    assert result.model[0].weight.dtype == dtype
    kept = result.model[0].weight != 0
    assert int(kept.sum()) == 16
    assert torch.equal(result.model[0].weight[kept], model[0].weight[kept])
    assert result.report.layers[0].why == "sparse layers run on the CPU in float32 or float64"


def test_a_layer_called_by_keywords_is_pruned_but_not_timed():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(input=x)

    result = ps.prune(Keywords(), [torch.randn(5, 8)], amount=0.9)
    assert result.report.layers[0].why == "not timed: no batch reached it"


def test_the_report_counts_what_is_left():
    model = network()
    result = ps.prune(model, batches(), amount=0.75, layout="sparse", evaluate=lambda m: float(len(list(m))))
    entries = sum(w.numel() - int(0.75 * w.numel()) for w in (model[i].weight for i in (0, 3, 5)))
    report = result.report
    assert report.after["nonzeros"] == report.after["params"] == entries + 8 + 40 + 5
    rows = [w.flatten(1) for w in (model[i].weight for i in (0, 3, 5))]
    kept = [int((result.model[i].values).numel()) for i in (0, 3, 5)]
    assert report.after["macs"] == 36 * kept[0] + kept[1] + kept[2]
    assert report.after["bytes"] == 8 * entries + 8 * sum(len(w) + 1 for w in rows) + 4 * (8 + 40 + 5)
    assert report.score_before == report.score_after == 6.0
    assert report.divergence > 0


def test_layers_can_be_left_alone_and_stages_chain(monkeypatch):
    timing(monkeypatch, dense=1.0, sparse=2.0)
    first = ps.compress(network(), batches(), target={"params": 0.5}, progress=False)
    result = ps.prune(first, batches(), amount=0.5, ignore=["0", "re:5"])
    assert [line.name for line in result.report.layers] == ["3"]
    assert torch.equal(result.model[0].weight, first.model[0].weight)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"layout": "coo"},
            ValueError,
            "unknown layout 'coo'; choose one of auto, dense, sparse, factored, shared, masked",
        ),
        ({"method": "norm"}, ValueError, "unknown method"),
        ({"ignore": ["6"]}, ps.LayerNotFoundError, "no layer '6'"),
        ({"ignore": ["re:fc"]}, ps.LayerNotFoundError, "matches 're:fc'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        ps.prune(network(), **{"amount": 0.5} | options)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        ps.prune(np.eye(3), amount=0.5)


def test_forms_in_a_plan_must_fit_the_network():
    form = ps.prune(network(), amount=0.5, layout="sparse").plan.forms["3.weight"]
    with pytest.raises(ps.CollapseError, match=r"5\.weight cannot take this form: .* shape \(5, 40\)"):
        ps.apply(network(), ps.Plan(forms={"5.weight": form}))
    with pytest.raises(ps.CollapseError, match=r"has no tensor '1\.weight'"):
        ps.apply(network(), ps.Plan(forms={"1.weight": form}))
    with pytest.raises(ps.CollapseError, match=r"has no tensor '3': did you mean .*weight"):
        ps.apply(network(), ps.Plan(forms={"3": form}))
    with pytest.raises(ps.CollapseError, match=r"3\.bias cannot take this form: only a layer's weight"):
        ps.apply(network(), ps.Plan(forms={"3.bias": form}))
    norm = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.raises(ps.CollapseError, match=r"1\.weight cannot take this form: only Linear and Conv2d"):
        ps.apply(norm, ps.Plan(forms={"1.weight": form}))
    site = ps.Site(40, ("3",), ("5",))
    with pytest.raises(ps.CollapseError, match=r"3\.weight cannot take this form: .* shape \(10, "):
        ps.apply(network(), ps.Plan((ps.Collapse(site, np.arange(10)),), forms={"3.weight": form}))


def test_a_shared_layer_is_replaced_under_all_its_names():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    result = ps.prune(model, amount=0.5, layout="sparse").model
    assert result[0] is result[2]
    x = torch.randn(3, 6)
    expected = ps.prune(model, amount=0.5, layout="dense").model(x)
    torch.testing.assert_close(result(x), expected)
