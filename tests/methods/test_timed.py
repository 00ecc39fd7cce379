"""A target in milliseconds is met as networks are timed, whatever was predicted; clocks here are made up."""

import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pysolve as ps
from pysolve.methods import timed
from pysolve.nn.cost import width_times
from pysolve.nn.zoo import Mlp


def samples(n=32, d=12, batches=5):
    return [*torch.randn(n * batches, d, generator=torch.Generator().manual_seed(0)).split(n)]


def mlp(seed=0):
    torch.manual_seed(seed)
    return Mlp((12, 64, 48, 40, 5))


@cache
def sites():
    return ps.find_sites(mlp(), samples()[0])


def area(out, into):
    """Seconds of a layer: every weight a microsecond."""
    return 1e-6 * out * into


def in_blocks(out, into):
    """Kernels that work on eight channels at a time."""
    return 1e-6 * 64 * -(-out // 8) * -(-into // 8)


def slow(out, into):
    return 1e-3 * out * into


def layers_of(model):
    return [one for one in model.modules() if isinstance(one, nn.Linear | nn.Conv2d)]


def seconds_of(model, layer=area):
    return sum(layer(*one.weight.shape[:2]) for one in layers_of(model))


def clock(patch, layer=area, network=lambda seconds: seconds):
    """Networks take what their layers take alone, or what is made of that; the network of every call."""
    calls = []

    def of_networks(models, batch, seconds):
        calls.extend(models)
        return [[network(seconds_of(model, layer))] * 3 for model in models]

    patch.setattr(timed, "times_of", of_networks)
    patch.setattr(width_times, "times_of", lambda models, *_: [[seconds_of(one, layer)] for one in models])
    return calls


def compressed(target, **options):
    options = {"sites": sites(), "latency": False, "progress": False, **options}
    return ps.compress(mlp(), samples(), target=target, **options)


def left(result, layer=area, network=lambda seconds: seconds):
    return network(seconds_of(result.model, layer)) / network(seconds_of(mlp(), layer))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.1])
def test_the_target_is_met(monkeypatch, share):
    clock(monkeypatch)
    result = compressed({"ms": share})
    assert left(result) == pytest.approx(share, rel=0.05)
    assert result.report.target == {"ms": share}


# What a network takes of the seconds of its layers: overhead, caches, other work.
NETWORKS = {
    "overhead": lambda seconds: 3e-3 + 2 * seconds,
    "faster when small": lambda seconds: 40 * seconds**1.4,
    "slower when small": lambda seconds: 0.3 * seconds**0.6,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_predictions_that_are_wrong_are_corrected(monkeypatch, name, share):
    clock(monkeypatch, network=NETWORKS[name])
    result = compressed({"ms": share})
    assert left(result, network=NETWORKS[name]) == pytest.approx(share, rel=0.05)


@given(st.floats(1, 100), st.floats(0.3, 1), st.floats(0.1, 0.99), st.floats(0.01, 1))
def test_what_is_asked_for_follows_what_was_timed(whole, off, share, limit):
    """Below all that was timed less is asked for than there, although the smallest network tells nothing."""
    least = share * whole
    known = {0.0: 0.01 * whole, off * least: least, whole: whole}
    asked = timed._share_for(limit * whole, known, whole) * whole
    if limit <= share:
        assert asked == pytest.approx(off * limit * whole)
    else:
        assert off * least <= asked * (1 + 1e-6)
        assert asked <= whole


def test_milliseconds_can_be_absolute(monkeypatch):
    clock(monkeypatch, slow)
    wanted = 0.4 * 1e3 * seconds_of(mlp(), slow) + 0.25
    result = compressed({"ms": wanted})
    assert 1e3 * seconds_of(result.model, slow) == pytest.approx(wanted, rel=0.05)
    assert result.report.target == {"ms": wanted}
    assert f"ms {wanted:,}" in str(result.report)


def test_everything_stays_where_nothing_is_to_be_saved(monkeypatch):
    clock(monkeypatch)
    assert left(compressed({"ms": 1.0})) == 1
    assert left(compressed({"ms": 1e9})) == 1


def test_widths_that_kernels_like_are_found(monkeypatch):
    clock(monkeypatch, in_blocks)
    result = compressed({"ms": 0.4})
    assert left(result, in_blocks) == pytest.approx(0.4, rel=0.05)
    kept = [site.kept for site in result.report.sites if site.pinned is None]
    assert {k % 8 for k in kept} == {0}


class Branch(nn.Module):
    """x + f(x), hardly dependent on x."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.down.weight.data *= 1e-2

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_branches_go_where_layers_take_as_long_whatever_their_widths(monkeypatch):
    clock(monkeypatch, lambda out, into: 1e-3 + 1e-7 * out * into)
    torch.manual_seed(0)
    model = nn.Sequential(*(Branch() for _ in range(4)), nn.Linear(12, 5))
    result = ps.compress(model, samples(), target={"ms": 0.6}, latency=False, progress=False)
    # Two of four are left: five layers of nine.
    assert sum(site.kept == 0 for site in result.report.sites) == 2
    assert len(layers_of(result.model)) == 5


def test_other_measures_hold_as_well(monkeypatch):
    clock(monkeypatch)
    result = compressed({"ms": 0.6, "params": 0.3})
    assert result.report.share("params") <= 0.3
    assert left(result) < 0.6
    result = compressed({"ms": 0.3, "params": 0.6})
    assert result.report.share("params") <= 0.6
    assert left(result) == pytest.approx(0.3, rel=0.05)


def test_sizes_keep_to_the_multiples_that_were_asked_for(monkeypatch):
    clock(monkeypatch)
    result = compressed({"ms": 0.5}, round_to=4)
    assert {site.kept % 4 for site in result.report.sites if site.pinned is None} == {0}
    assert left(result) == pytest.approx(0.5, rel=0.1)


def test_a_target_below_the_smallest_network_says_what_is_in_reach(monkeypatch):
    overhead = NETWORKS["overhead"]
    clock(monkeypatch, network=overhead)
    whole, least = overhead(seconds_of(mlp())), overhead(1e-6 * (12 + 1 + 1 + 5))
    with pytest.raises(ps.PysolveError, match="ms cannot go below") as raised:
        compressed({"ms": 0.9 * least / whole})
    assert f"({100 * least / whole:.3g} %)" in str(raised.value)


def test_the_report_says_what_was_wanted_predicted_and_measured(monkeypatch):
    clock(monkeypatch)
    result = compressed({"ms": 0.5})
    (note,) = [note for note in result.report.notes if " ms for " in note]
    said = re.match(
        r"of (\S+) ms for \d+ samples (\S+) were wanted; a network of these widths takes (\S+) \((\S+)%\), "
        r"(\S+) were predicted$",
        note,
    )
    whole, wanted, found = map(float, said.groups()[:3])
    assert whole == pytest.approx(1e3 * seconds_of(mlp()), rel=1e-2)
    assert wanted == pytest.approx(whole / 2, rel=1e-2)
    assert found == pytest.approx(1e3 * seconds_of(result.model), rel=1e-2)


def test_a_target_that_no_widths_come_near_to_says_so(monkeypatch):
    def coarse(out, into):
        return 1e-6 * (4096 if max(out, into) > 32 else 64)

    clock(monkeypatch, coarse, lambda seconds: seconds)
    result = compressed({"ms": 0.55})
    (note,) = [note for note in result.report.notes if " ms for " in note]
    assert "no widths that were tried came nearer" in note
    # Rather below the target than above it.
    assert left(result, coarse) <= 0.55


def test_a_busy_machine_is_named(monkeypatch):
    clock(monkeypatch)
    steady = timed.times_of
    monkeypatch.setattr(
        timed, "times_of", lambda *given: [[one[0], 1.5 * one[0], 1.5 * one[0]] for one in steady(*given)]
    )
    notes = compressed({"ms": 0.5}).report.notes
    assert any("calls took 50% longer than the fastest" in note for note in notes)


def test_on_a_busy_machine_networks_are_called_again_and_neighbouring_calls_compared(monkeypatch):
    clock(monkeypatch)
    steady, runs = timed.times_of, []

    def disturbed(models, batch, seconds):
        """Both networks by the same, but for one call of the smaller one."""
        runs.append(len(models))
        found = [np.array([1.0, 3.0, 2.0, 4.0]) * one[0] for one in steady(models, batch, seconds)]
        found[-1][0] *= 10
        return [one.tolist() for one in found]

    monkeypatch.setattr(timed, "times_of", disturbed)
    assert left(compressed({"ms": 0.5})) == pytest.approx(0.5, rel=0.05)
    assert runs.count(2) % timed.TRIES == 0


def test_calls_of_large_networks_are_of_fewer_samples(monkeypatch):
    sizes = []

    def of_networks(models, batch, seconds):
        sizes.append(len(batch))
        return [[len(batch) * 10 * seconds_of(model)] for model in models]

    clock(monkeypatch)
    monkeypatch.setattr(timed, "times_of", of_networks)
    result = compressed({"ms": 0.5}, latency=True)
    each = 10 * seconds_of(mlp())
    assert each * sizes[-1] <= timed.LONGEST < each * sizes[0]
    # The report's last times are of as many.
    assert result.report.latencies[-1][0].batch_size == sizes[-1]


def test_layers_of_repeated_blocks_stay_equal(monkeypatch):
    clock(monkeypatch)
    torch.manual_seed(0)

    def block():
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 12))

    net = nn.Sequential(block(), block(), nn.Linear(12, 5))
    result = ps.compress(net, samples(), target={"ms": 0.6}, widths="uniform", latency=False, progress=False)
    assert seconds_of(result.model) / seconds_of(net) == pytest.approx(0.6, rel=0.05)
    assert result.model[0][0].out_features == result.model[1][0].out_features < 32


def test_sweep_and_prune_take_it_too(monkeypatch):
    clock(monkeypatch)
    options = {"latency": False, "progress": False}
    targets = [{"ms": 0.7}, {"params": 0.5}, {"ms": 0.3}]
    reports = ps.sweep(mlp(), samples(), targets=targets, sites=sites(), **options).reports
    assert [report.target for report in reports] == [{"ms": 0.7}, {"params": 0.5}, {"ms": 0.3}]
    assert reports[0].after["params"] > reports[2].after["params"]
    for method in ("elimination", "ln"):
        result = ps.prune(mlp(), samples(), method=method, target={"ms": 0.5}, refit=None, **options)
        assert left(result) == pytest.approx(0.5, rel=0.05)


def test_convolutions_and_what_stands_between_count(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 5),
    ).eval()

    def convolved(model):
        """With a tenth of the time in what is no layer, by the channels that it reads."""
        convs = [one for one in layers_of(model) if isinstance(one, nn.Conv2d)]
        return seconds_of(model) + 3e-6 * sum(one.out_channels for one in convs)

    clock(monkeypatch)
    monkeypatch.setattr(timed, "times_of", lambda models, *_: [[convolved(one)] for one in models])
    images = [*torch.randn(160, 3, 4, 4).split(32)]
    result = ps.compress(net, images, target={"ms": 0.5}, latency=False, progress=False)
    assert convolved(result.model) / convolved(net) == pytest.approx(0.5, rel=0.05)


def test_nothing_is_timed_for_other_targets(monkeypatch):
    def refuse(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(timed, "times_of", refuse)
    monkeypatch.setattr(width_times, "times_of", refuse)
    compressed({"params": 0.5, "macs": 0.6, "bytes": 0.7})


def test_a_real_clock_is_good_enough_to_get_there():
    result = compressed({"ms": 0.999})
    assert any(" ms for " in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ps.low_rank(mlp(), samples(), target={"ms": 0.5}), "layer by layer.*got ms"),
        (lambda: ps.deep_compress(mlp(), samples(), target={"ms": 0.5}), "got ms"),
        (lambda: ps.quantize(mlp(), samples(), scheme="codebook", target={"ms": 0.5}), "got ms"),
        (lambda: ps.prune(mlp(), samples(), method="magnitude", target={"ms": 0.5}), "got ms"),
        (lambda: compressed({"ms": 0}), r"ms must be a share in \(0, 1\] or a number above 1, got 0"),
        (lambda: compressed({"ms": float("nan")}), "the target for ms must be"),
        (lambda: compressed({"seconds": 1}), "unknown measure 'seconds'.*ms"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_result_is_saved_with_its_target(monkeypatch, tmp_path):
    clock(monkeypatch, slow)
    wanted = 0.5 * 1e3 * seconds_of(mlp(), slow) + 0.5
    result = compressed({"ms": wanted})
    ps.save(result, tmp_path / "small.safetensors")
    restored, x = ps.load(tmp_path / "small.safetensors", mlp()), samples()[0]
    assert torch.equal(restored(x), result.model(x))


def test_a_time_near_the_target_counts_when_it_is_seen_again(monkeypatch):
    """The first network of chosen widths seems to take what was asked for, once."""
    other = NETWORKS["faster when small"]
    clock(monkeypatch, network=other)
    honest, pairs = timed.times_of, []

    def lucky(models, batch, seconds):
        times = honest(models, batch, seconds)
        pairs.extend([seconds] if len(models) == 2 else [])
        # The smallest network comes first.
        return [times[0], [0.6 * one for one in times[0]]] if len(models) == len(pairs) == 2 else times

    monkeypatch.setattr(timed, "times_of", lucky)
    result = compressed({"ms": 0.6})
    assert pairs[1:3] == [timed.SECONDS, 2 * timed.SECONDS]
    assert left(result, network=other) == pytest.approx(0.6, rel=0.05)
