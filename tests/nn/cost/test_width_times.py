"""Few widths are timed; steps of kernels are found, and no width is thought faster than it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pysolve.nn.cost import width_times as module
from pysolve.nn.cost.width_times import MOST_WIDTHS, OPEN, SAME, Seen, seen_by, width_times


def clock(monkeypatch, seconds):
    """Take these seconds for a layer, and note the layers that were timed."""
    timed = []

    def times_of(models, batch, least):
        for model in models:
            model(*batch)
        timed.extend(models)
        return [[seconds(model)] for model in models]

    monkeypatch.setattr(module, "times_of", times_of)
    return timed


def of_outputs(monkeypatch, cost, width=256, least=1, step=1):
    """Times of a Linear layer by its outputs, and the widths that were timed."""
    timed = clock(monkeypatch, lambda layer: cost(layer.out_features))
    layer = nn.Linear(4, width)
    found = width_times(layer, Seen((8, 4), False, 32, 8 * width), (least, 4), (step, 1), {})
    return found.by_outputs, {layer.out_features for layer in timed}


def blocks(n):
    """Sixteen outputs at a time, behind something constant."""
    return 1.0 + -(-n // 16)


def aligned(n):
    """Twice as slow unless a multiple of eight."""
    return n * (1 if n % 8 == 0 else 2)


@pytest.mark.parametrize("width", [16, 30, 64, 80])
def test_steps_of_a_kernel_are_found(monkeypatch, width):
    shares, timed = of_outputs(monkeypatch, blocks, width)
    np.testing.assert_allclose(
        shares[1:], [blocks(min(n, width)) / blocks(width) for n in range(1, width + 1)], atol=OPEN + SAME
    )
    assert len(timed) <= MOST_WIDTHS
    steps = np.flatnonzero(np.diff(shares[1:])) + 1
    assert set(steps.tolist()) == {n for n in range(1, width) if n % 16 == 0}


def test_widths_that_kernels_do_not_like_count_as_the_next_that_they_do(monkeypatch):
    shares, _ = of_outputs(monkeypatch, aligned)
    steps = np.flatnonzero(np.diff(shares[1:])) + 1
    assert all(n % 8 == 0 for n in steps.tolist() if n > 1)
    assert (np.diff(shares) >= 0).all()


@given(st.integers(2, 300), st.integers(1, 40), st.floats(0.2, 3.0), st.floats(0, 2))
def test_no_rising_width_is_thought_faster_than_it_is(width, size, power, constant):
    def cost(n):
        return constant + (-(-n // size) * size / width) ** power

    with pytest.MonkeyPatch.context() as patch:
        shares, timed = of_outputs(patch, cost, width)
    true = np.array([cost(n) for n in range(1, width + 1)]) / cost(width)
    assert shares[-1] == 1
    assert (np.diff(shares) >= 0).all()
    # What saves next to nothing is taken to save nothing.
    assert (shares[1:] >= true - 1e-12).all()
    assert len(timed) <= MOST_WIDTHS


def test_a_smooth_time_is_known_everywhere(monkeypatch):
    shares, _ = of_outputs(monkeypatch, lambda n: float(n), 688)
    np.testing.assert_allclose(shares[1:], np.arange(1, 689) / 688, atol=2 * OPEN)


def test_only_widths_that_can_be_left_are_timed(monkeypatch):
    _, timed = of_outputs(monkeypatch, float, 256, least=32, step=32)
    assert {n % 32 for n in timed} == {0}


def test_equal_layers_are_timed_once_and_calls_add_up(monkeypatch):
    timed, known = clock(monkeypatch, lambda layer: float(layer.in_features)), {}
    seen = Seen((8, 6), False, 48, 80), Seen((8, 6), False, 96, 160, 2)
    one, two = (width_times(nn.Linear(6, 10), own, (1, 1), (1, 1), known) for own in seen)
    count = len(timed)
    assert two.seconds == 2 * one.seconds == 12.0
    width_times(nn.Linear(6, 10), Seen((9, 6), False, 54, 90), (1, 1), (1, 1), known)
    assert len(timed) == 2 * count


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 6, 3, stride=2), (2, 8, 9, 9)),
        (nn.ConvTranspose2d(8, 6, 3), (2, 8, 5, 5)),
        (nn.Conv1d(8, 6, 3), (2, 8, 9)),
        (nn.Linear(8, 6, bias=False), (2, 3, 8)),
    ],
)
def test_layers_are_narrowed_both_ways_and_called_on_inputs_that_fit(monkeypatch, layer, shape):
    def area(one):
        return float(one.weight.numel())

    clock(monkeypatch, area)
    found = width_times(layer, Seen(shape, False, 1, 1), (1, 1), (1, 1), {})
    np.testing.assert_allclose(found.by_outputs[1:], np.arange(1, 7) / 6)
    np.testing.assert_allclose(found.by_inputs[1:], np.arange(1, 9) / 8)


def test_a_depthwise_convolution_loses_both_at_once(monkeypatch):
    clock(monkeypatch, lambda layer: float(layer.groups))
    found = width_times(nn.Conv2d(8, 8, 3, groups=8), Seen((2, 8, 5, 5), False, 1, 1), (1, 1), (1, 1), {})
    np.testing.assert_allclose(found.by_outputs[1:], np.arange(1, 9) / 8)
    assert (found.by_inputs == 1).all()


class Fussy(nn.Linear):
    def forward(self, x):
        if x.shape[-1] != 6:
            raise RuntimeError("six only")
        return super().forward(x)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8), Fussy(6, 8)])
def test_layers_that_cannot_be_called_alone_have_no_times(monkeypatch, layer):
    clock(monkeypatch, lambda _: 1.0)
    shape = (2, 6) if isinstance(layer, Fussy) else (2, 8, 5, 5)
    assert width_times(layer, Seen(shape, False, 1, 1), (1, 1), (1, 1), {}) is None


def test_what_passes_is_seen_by_name():
    conv = nn.Conv2d(3, 4, 1)
    net = nn.Sequential(conv, nn.ReLU(), conv.__class__(4, 2, 1))
    x = torch.randn(5, 3, 6, 6).to(memory_format=torch.channels_last)
    seen = seen_by(net, ["0", "2", "nothing"], x)
    assert set(seen) == {"0", "2"}
    assert seen["0"].shape == (5, 3, 6, 6)
    assert seen["0"].last
    assert (seen["2"].read, seen["2"].written, seen["2"].calls) == (720, 360, 1)
