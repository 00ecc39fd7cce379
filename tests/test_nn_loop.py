"""A run visits every example once an epoch, and one by the clock ends with its schedule and in time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pysolve.errors import PysolveError
from pysolve.nn import loop, optimizers
from pysolve.nn.loop import optimise, shuffled
from pysolve.nn.options import Run


class Clock:
    """Stands in for the module ``time``: every step takes as long as told, the last of them from then on."""

    def __init__(self, *durations):
        self.durations, self.calls, self.now = durations, 0, 100.0

    def perf_counter(self):
        if self.calls:
            self.now += self.durations[min(self.calls, len(self.durations)) - 1]
        self.calls += 1
        return self.now


def trained(run, monkeypatch=None, clock=None, n=10):
    """Learning rates of the steps that a run takes, and its history."""
    if clock is not None:
        monkeypatch.setattr(loop, "time", clock)
    model, rates = nn.Linear(1, 1), []
    x = torch.arange(n, dtype=torch.float32)[:, None]

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(optimizers.OPTIMIZERS, "adam", Spy)
        passes = shuffled(n, run.steps, run.seed)
        history = optimise(model, lambda rows: model(x[rows]).square().mean(), run, passes)
    return rates, history


@given(st.integers(1, 40), st.data(), st.integers(0, 3))
def test_every_epoch_visits_every_example_once_in_parts_of_nearly_equal_size(n, data, seed):
    steps = data.draw(st.integers(1, n))
    passes = shuffled(n, steps, seed)
    for epoch in range(2):
        sizes, rows = zip(*passes(epoch), strict=True)
        assert len(rows) == steps
        assert [*map(len, rows)] == [*sizes]
        assert sorted(torch.cat(rows).tolist()) == list(range(n))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


@given(st.integers(1, 500), st.floats(1e-3, 1.0), st.floats(0.01, 100.0))
def test_by_the_clock_steps_of_equal_length_fill_the_time_and_no_more(n, share, seconds):
    run, step, done = Run(n, seconds=seconds), share * seconds, 1
    while run.position(done, done * step) < run.length:
        done += 1
    assert done == 1 or done * step <= seconds
    assert (done + 1) * step > 0.998 * seconds


@given(st.lists(st.floats(1e-3, 0.05), min_size=1, max_size=300), st.floats(1, 20))
def test_by_the_clock_a_slower_machine_costs_at_most_one_of_its_steps(durations, slower):
    run, elapsed, positions = Run(2, seconds=1.0), 0.0, []
    for done, duration in enumerate([*durations, *[slower * durations[-1]] * 1000], start=1):
        elapsed += duration
        positions.append(run.position(done, elapsed))
        if positions[-1] == run.length:
            break
    assert elapsed <= 1.0 + slower * max(durations)
    assert positions[-1] == run.length


def test_a_run_of_epochs_takes_all_its_steps_whatever_the_clock_says(monkeypatch):
    rates, history = trained(Run(3, epochs=4, lr=0.1), monkeypatch, Clock(1e9))
    assert len(rates) == 12
    assert len(history) == 4


@pytest.mark.parametrize("run", [Run(3, epochs=40, lr=0.1), Run(3, seconds=100.0, lr=0.1)])
def test_the_learning_rate_rises_once_and_ends_near_zero(run, monkeypatch):
    rates, _ = trained(run, monkeypatch, Clock(0.5))
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert 0.2 < peak / len(rates) < 0.4
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 1e-3


def test_a_machine_that_slows_down_still_ends_with_small_steps(monkeypatch):
    rates, _ = trained(Run(3, seconds=100.0, lr=0.1), monkeypatch, Clock(*[0.25] * 200, 5.0))
    assert 200 < len(rates) < 215
    assert rates[-1] < 0.02


def test_one_step_is_taken_even_when_the_time_is_too_short(monkeypatch):
    rates, history = trained(Run(3, seconds=1.0), monkeypatch, Clock(7.0))
    assert len(rates) == len(history) == 1


def test_an_epoch_that_the_clock_cuts_short_counts_with_what_it_saw(monkeypatch):
    _, history = trained(Run(3, seconds=5.0), monkeypatch, Clock(1.0), n=9)
    assert len(history) == 2
    assert all(value > 0 for value in history)


def test_training_works_where_gradients_are_switched_off():
    with torch.no_grad():
        rates, _ = trained(Run(2, epochs=1))
    assert len(rates) == 2


def test_a_loss_that_is_not_finite_stops_at_once_with_its_epoch():
    model, seen = nn.Linear(1, 1), []

    def loss(rows):
        seen.append(rows)
        return model.weight.sum() / (0 if len(seen) == 5 else 1)

    with pytest.raises(PysolveError, match=r"in epoch 2: lower lr"):
        optimise(model, loss, Run(3, epochs=5), shuffled(9, 3, 0))
    assert len(seen) == 5
