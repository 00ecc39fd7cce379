"""Where verbs compute: on a copy of the network elsewhere, whose result comes back; the given one stays."""

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.correlations import Correlations
from pysolve.nn.batches.samples import moved, on_device
from pysolve.nn.gathering.sums import Sums

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
VERBS = {
    "compress": lambda model, **given: ps.compress(model, batches(), target={"params": 0.6}, **given),
    "sweep": lambda model, **given: ps.sweep(model, batches(), targets=[{"params": 0.6}], **given),
    "prune": lambda model, **given: ps.prune(model, batches(), method="obs", amount=0.5, **given),
    "low_rank": lambda model, **given: ps.low_rank(
        model, batches(), target={"params": 0.6}, layout="factored", prune=True, **given
    ),
    "quantize": lambda model, **given: ps.quantize(
        model, batches(), scheme="codebook", layout="dense", **given
    ),
    "deep_compress": lambda model, **given: ps.deep_compress(
        model, batches(), target={"bytes": 0.3}, **given
    ),
}


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 30), nn.ReLU(), nn.Linear(30, 4))
    return nn.Sequential(*layers).eval()


def batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 6, 6, generator=random) for _ in range(4)]


@pytest.fixture
def elsewhere(monkeypatch):
    """A device that is not where networks are, and computes the same."""
    place = torch.device("cpu", 0)
    monkeypatch.setattr("pysolve.methods.goal.checked_device", lambda device: place if device else None)
    return place


@pytest.mark.parametrize("verb", VERBS)
def test_a_copy_elsewhere_gives_the_same_network_at_home(verb, elsewhere):
    model, scored = network(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def evaluate(one):
        scored.append({p.device for p in one.parameters()})
        return 0.0

    options = {"progress": False, "evaluate": evaluate}
    there = VERBS[verb](model, device="elsewhere", ignore=[model[0]], **options)
    also = VERBS[verb](model, ignore=[model[0]], **options)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert {*map(frozenset, scored)} == {frozenset([torch.device("cpu")])}
    if verb == "sweep":
        assert [one.report.divergence for one in there] == [one.report.divergence for one in also]
        return
    mine, theirs = there.model.state_dict(), also.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(mine["0.weight"], before["0.weight"])


def test_a_study_serves_elsewhere(elsewhere):
    model = network()
    found = ps.study(model, batches(), device="elsewhere", progress=False)
    one, other = (
        VERBS["compress"](model, progress=False).model.state_dict(),
        ps.compress(
            model, found, target={"params": 0.6}, device="elsewhere", progress=False
        ).model.state_dict(),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_device_that_is_not_there_is_named():
    for device in ("cuda:77", "xyz"):
        with pytest.raises(ValueError, match=f"cannot compute on '{device}'"):
            ps.compress(network(), batches(), device=device)


def test_batches_of_any_form_are_moved_as_often_as_they_are_gone_through():
    given = [{"x": torch.ones(2, 3), "flag": True, "more": [torch.zeros(2)]}]
    found = on_device(given, "cpu")
    for _ in range(2):
        (batch,) = found
        assert batch["flag"] is True
        assert torch.equal(batch["x"], torch.ones(2, 3))
    assert next(iter(on_device(iter(given), "cpu")))["more"][0].shape == (2,)
    assert moved(given[0], None) is given[0]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_sums_take_no_shorter_formats_that_users_allow_elsewhere(precision):
    x = torch.randn(2048, 300, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        sums = Sums.zeros(300, 0, x.device)
        sums.add(x)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    exact = x.double().T @ x.double()
    assert np.linalg.norm(sums.correlations().xx - exact.numpy()) <= 1e-6 * exact.norm()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_runs_on_a_device(verb, device):
    model = network()
    result = VERBS[verb](model, device=device, progress=False)
    if verb == "sweep":
        assert result[0].divergence < 0.1
        return
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    assert result.report.divergence < 0.1


@pytest.mark.parametrize("device", [CUDA])
def test_sums_on_a_device_are_those_of_the_host(device):
    here, there = (ps.study(network(), batches(), device=one, progress=False) for one in (None, device))
    for name, one in here.correlations.items():
        other: Correlations = there.correlations[name]
        assert np.linalg.norm(other.xx - one.xx) <= 1e-5 * np.linalg.norm(one.xx)
