"""What a report says of two networks is what the networks are."""

import copy
import platform
import time

import numpy as np
import pytest
import torch
from small import embedding_stream
from torch import nn

import pysolve as ps
from pysolve.methods import result
from pysolve.methods.goal import Options
from pysolve.methods.result import account, costs, distance, matched
from pysolve.methods.study import Study
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.gathering.calibration import Calibration
from pysolve.nn.zoo import LeNet5


def networks():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    after = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        after[0].weight[0, 0] = 0
    return before, after


def known(model, held=(), apart=None, **options):
    """A study of a network by samples that are held out."""
    seen = Calibration(0, [*held], [*held] if apart is None else apart, [*held]) if held else None
    return Study(model, Options(**options), calibration=seen)


def test_costs_are_those_of_the_networks():
    before, after = networks()
    x = torch.randn(70, 6)
    report = account(before, after, known(before, [x], [x[:50]]))
    assert report.after == {
        "params": parameters(after),
        "nonzeros": parameters(after) - 1,
        "bytes": nbytes(after),
        "macs": macs(after, x[:1]),
    }
    assert report.before == costs(before, x)
    assert [one.batch_size for one, _ in report.latencies] == [1, 64]
    assert report.held == 50


def test_without_latency_nothing_is_timed_but_all_is_counted():
    before, after = networks()
    x = torch.randn(70, 6)
    timed = account(before, after, known(before, [x]))
    report = account(before, after, known(before, [x], latency=False))
    assert report.latencies == ()
    assert [(one.name, one.params, one.macs) for one in report.mass] == [
        (one.name, one.params, one.macs) for one in timed.mass
    ]
    assert all(one.seconds is None and one.seconds_left is None for one in report.mass)
    assert report.after == timed.after


class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.01 * len(x))
        return super().forward(x)


def test_networks_that_take_long_are_timed_on_fewer_samples():
    model = nn.Sequential(Slow(4, 2))
    report = account(model, model, known(model, [torch.randn(70, 4)]), spent=50.0)
    assert [one.batch_size for one, _ in report.latencies] == [1, 4]


def test_divergence_is_the_mean_over_all_samples():
    before, after = networks()
    parts = [torch.randn(n, 6) for n in (3, 20)]
    together = distance(before, after, [torch.cat(parts)])
    assert distance(before, after, parts) == pytest.approx(together)
    assert distance(before, before, parts) == 0.0
    with torch.no_grad():
        p, q = (model(torch.cat(parts)).log_softmax(1).numpy() for model in (before, after))
    assert together == pytest.approx(float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))), rel=1e-4)


def test_without_a_batch_nothing_is_timed():
    before, after = networks()
    report = account(before, after, known(before))
    assert (report.latencies, report.mass, report.held) == ((), (), 0)
    assert np.isnan(report.divergence)
    assert "macs" not in report.before


def test_a_network_for_one_batch_size_is_timed_on_what_it_takes():
    class Fixed(LeNet5):
        def forward(self, x):
            return super().forward(x.view(2, 1, 28, 28))

    model = Fixed()
    report = account(model, Fixed(), known(model, [torch.zeros(2, 1, 28, 28)]))
    assert [one.batch_size for one, _ in report.latencies] == [2]


BATCHES = [torch.randn(32, 6) for _ in range(3)]
VERBS = {
    "compress": lambda model, **options: ps.compress(model, BATCHES, keep=0.5, **options),
    "prune": lambda model, **options: ps.prune(model, amount=0.5, **options),
    "prune channels": lambda model, **options: ps.prune(model, BATCHES, method="ln", amount=0.5, **options),
    "low_rank": lambda model, **options: ps.low_rank(model, rank=1, **options),
    "quantize": lambda model, **options: ps.quantize(model, scheme="codebook", **options),
    "deep_compress": lambda model, **options: ps.deep_compress(model, BATCHES, bits=4, **options),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_evaluator_is_tried_before_any_work_and_a_later_failure_costs_a_note(verb):
    model, seen = networks()[0], []

    def fails_later(network):
        seen.append(network)
        if network is not model:
            raise RuntimeError("no test data left")
        return np.float32(87.5)

    report = VERBS[verb](model, evaluate=fails_later, progress=False).report
    assert seen[0] is model
    assert (report.score_before, report.score_after) == (87.5, None)
    assert any("no test data left" in note for note in report.notes)
    with pytest.raises(ZeroDivisionError):
        VERBS[verb](model, evaluate=lambda network: 1 / 0, progress=False)
    with pytest.raises(TypeError, match=r"number.*dict"):
        VERBS[verb](model, evaluate=lambda network: {"accuracy": 1.0}, progress=False)


def test_warnings_are_python_s_too_and_notes_are_logged(caplog):
    model, _ = networks()
    with caplog.at_level("INFO", "pysolve"), pytest.warns(ps.PysolveWarning, match="few samples") as caught:
        report = ps.compress(model, BATCHES[:1], keep=0.5, progress=False).report
    assert [str(one.message) for one in caught] == list(report.warnings)
    assert {one.filename for one in caught} == {__file__}
    assert [record.getMessage() for record in caplog.records] == list(report.notes)


class Mixed(nn.Module):
    """A layer that verbs handle, and weights that they do not."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.rnn = nn.GRU(8, 4, batch_first=True)
        self.scale = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return self.rnn(self.a(x)[:, None])[0][:, 0] @ self.scale


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_weights_that_are_left_alone_are_named_with_their_share(method):
    torch.manual_seed(0)
    model = Mixed()
    report = ps.prune(model, BATCHES, method=method, amount=0.5, scope="global", progress=False).report
    gru, scale = (count / parameters(model) for count in (3 * 4 * 8 + 3 * 4 * 4, 4 * 5))
    assert f"left alone, {scale:.1%} of the parameters (a weight of Mixed): scale" in report.notes
    # No mask holds zeros of recurrent layers while they are trained.
    trained = ps.prune(
        model, BATCHES, method=method, amount=0.5, scope="global", progress=False, distill={"epochs": 1}
    ).report
    names = "rnn.weight_ih_l0, rnn.weight_hh_l0"
    assert f"left alone, {gru:.1%} of the parameters (a weight of GRU): {names}" in trained.notes
    with pytest.raises(ps.PysolveError, match="scale"):
        ps.prune(Mixed(), BATCHES, method=method, amount=0.5, ignore=["a", "rnn"], progress=False)


def test_versions_and_the_seed_are_told():
    before, after = networks()
    made = account(before, after, known(before, seed=7)).made_with
    assert made["seed"] == "7"
    assert made["torch"] == torch.__version__
    assert made["pysolve"] == ps.__version__
    assert made["python"] == platform.python_version()


class WithoutOutputs(nn.Module):
    """A layer that writes nothing, as heads for no classes do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.none = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 1)
        self.none.weight, self.none.bias = nn.Parameter(torch.zeros(0, 12)), nn.Parameter(torch.zeros(0))
        self.none.out_features = 0

    def forward(self, x):
        h = self.a(x).relu()
        return torch.cat([self.b(h), self.none(h)], 1)


@pytest.mark.parametrize("verb", VERBS)
def test_layers_without_outputs_are_no_obstacle(verb):
    torch.manual_seed(0)
    result = VERBS[verb](WithoutOutputs(), progress=False)
    assert np.isfinite(result.report.divergence) or verb in ("prune", "low_rank", "quantize")
    assert result.model(BATCHES[0]).shape == (32, 4)


class Hidden(nn.Module):
    """A network whose answer is no logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return {"hidden": self.inner(ids)}


def disturbed(model):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for one in other.parameters():
            one += 0.1 * torch.randn_like(one)
    return other


@pytest.mark.parametrize(("kind", "loss"), [("vectors", "mse"), ("tokens", "kl"), ("hidden", "mse")])
def test_matching_suits_the_samples_and_brings_outputs_nearer(kind, loss, monkeypatch):
    used = {}

    def teach(*networks, **options):
        used.update(options)
        return distill(*networks, **options)

    distill = result.teach
    monkeypatch.setattr(result, "teach", teach)
    model, ids = embedding_stream()
    batches = [torch.randint(11, ids.shape, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    if kind == "vectors":
        model, batches = networks()[0], [torch.randn(16, 6)]
    if kind == "hidden":
        model = Hidden(model)
    model = model.eval()
    study, other = known(model, batches, progress=False), disturbed(model)
    student, notes = matched(study, model, other, {"epochs": 5})
    assert not notes
    assert distance(model, student, batches) < distance(model, other, batches)
    assert used["loss"] == loss
    assert ("mix" in used) == (kind == "vectors")


def test_of_tokens_the_epoch_nearest_to_the_original_stays():
    model, ids = embedding_stream()
    model, batches = model.eval(), [ids, (ids + 3) % 11]
    study, other = known(model, batches, progress=False), disturbed(model)
    one, many = (matched(study, model, other, {"epochs": n, "lr": 3.0})[0] for n in (1, 6))
    assert distance(model, many, batches) <= max(distance(model, n, batches) for n in (one, other))


@pytest.mark.parametrize("training", [True, False])
def test_modes_that_evaluate_sets_come_back(training):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)).train(training)
    model[1].eval()
    before = [one.training for one in model.modules()]

    def evaluate(network):
        return network.eval()(torch.ones(1, 4)).sum().item()

    smaller = ps.compress(model, [torch.randn(20, 4)], keep=0.5, evaluate=evaluate, progress=False)
    assert [one.training for one in model.modules()] == before
    assert [one.training for one in smaller.model.modules()] == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": {"params": 10**400}},
        {"keep": 10**400},
        {"lam": 10**400},
        {"keep": 0.5, "distill": 10**400},
        {"keep": 0.5, "memory": 10**400},
        {"keep": 0.5, "memory": "9" * 400 + "GiB"},
    ],
    ids=str,
)
def test_numbers_without_end_are_refused_like_others(wrong):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"positive and finite|target for params must be|memory must be"):
        ps.compress(model, [torch.randn(20, 4)], progress=False, **wrong)
