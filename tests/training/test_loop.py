"""A run visits every example once an epoch, and one by the clock ends with its schedule and in time."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from pysolve.errors import PysolveError
from pysolve.training import loop, options
from pysolve.training.loop import (
    Extras,
    computing,
    in_float32,
    nonfinite_batch,
    nonfinite_sample,
    optimise,
    shuffled,
)
from pysolve.training.options import Run


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
        patch.setitem(options.OPTIMIZERS, "adam", Spy)
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
@example(1, 0.001, 16.586832594541438)
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


def centre():
    """Ten points, and a network whose loss is how far it is from their mean."""
    torch.manual_seed(0)
    return nn.Linear(1, 1), torch.randn(10, 1)


def distances(model, x, run, **options):
    passes = shuffled(len(x), run.steps, run.seed)
    return optimise(model, lambda rows: (model(x[rows]) - 3).square().mean(), run, passes, **options)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant", lambda share: (1 - share) ** 2])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", lambda given: torch.optim.SGD(given, lr=0.05)])
def test_every_optimizer_learns_on_every_schedule(optimizer, schedule):
    model, x = centre()
    history = distances(model, x, Run(5, epochs=40, lr=0.05, optimizer=optimizer, schedule=schedule))
    assert history[-1] < 0.1 * history[0]


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["cosine", "constant", "own"]))
def test_learning_rates_follow_the_schedule_of_the_share_done(steps, epochs, schedule):
    def own(share):
        return 1 - share / 3

    factor = {"cosine": lambda t: (1 + np.cos(np.pi * t)) / 2, "constant": lambda t: 1.0, "own": own}[
        schedule
    ]
    rates, _ = trained(Run(steps, epochs=epochs, lr=0.1, schedule=own if schedule == "own" else schedule))
    n = steps * epochs
    np.testing.assert_allclose(rates, [0.1 * factor(i / n) for i in range(n)], rtol=1e-12)


def test_an_optimizer_of_ones_own_keeps_its_rates_and_its_momentum():
    model, x = centre()
    seen = []

    def own(parameters):
        groups = [{"params": parameters[:1], "lr": 0.02}, {"params": parameters[1:]}]
        optimizer = torch.optim.SGD(groups, lr=0.004, momentum=0.5)
        optimizer.register_step_pre_hook(
            lambda made, *_: seen.append([(group["lr"], group["momentum"]) for group in made.param_groups])
        )
        return optimizer

    distances(model, x, Run(2, epochs=10, lr=7.0, optimizer=own))
    first, second = np.array(seen).transpose(1, 0, 2)
    assert first[:, 0].max() == pytest.approx(0.02, rel=0.02)
    np.testing.assert_allclose(first[:, 0], 5 * second[:, 0])
    assert {*first[:, 1], *second[:, 1]} == {0.5}


def test_gradients_are_clipped_to_their_common_norm():
    model, x = nn.Linear(1, 1), torch.full((4, 1), 1e3)
    before = torch.cat([value.detach().clone().flatten() for value in model.parameters()])
    distances(model, x, Run(1, epochs=1, lr=0.1, optimizer="sgd", schedule="constant", clip=0.5))
    after = torch.cat([value.detach().flatten() for value in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.05, rel=1e-3)


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6), st.integers(1, 6))
def test_the_best_epoch_comes_back_and_patience_stops_in_time(scores, patience):
    model, x = centre()
    model.register_buffer("calls", torch.zeros(()), persistent=False)
    states = []

    def evaluate(network):
        assert not network.training
        assert not torch.is_grad_enabled()
        network.calls += 1
        states.append([value.detach().clone() for value in (*network.parameters(), *network.buffers())])
        return scores[len(states) - 1]

    history = distances(model, x, Run(2, epochs=6, evaluate=evaluate, patience=patience))
    best, wanted = 0, 6
    for i in range(1, 6):
        best = i if scores[i] > scores[best] else best
        if i - best >= patience:
            wanted = i + 1
            break
    assert len(history) == len(states) == wanted
    now = (*model.parameters(), *model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(now, states[best], strict=True))


def test_looking_at_the_network_does_not_change_the_training():
    results = []
    for evaluate in (None, lambda network: torch.rand(()).item() * 0 + len(results)):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)), torch.randn(8, 1)
        results.append(distances(model, x, Run(2, epochs=3, evaluate=evaluate)))
    assert results[0] == results[1]


def test_a_score_that_is_not_a_number_is_an_error():
    with pytest.raises(PysolveError, match="evaluate gave nan after epoch 1"):
        distances(*centre(), Run(2, epochs=3, evaluate=lambda _: float("nan")))


def test_by_the_clock_the_last_epoch_is_judged_too(monkeypatch):
    monkeypatch.setattr(loop, "time", Clock(1.0))
    scores = []
    model, x = centre()
    history = distances(model, x, Run(3, seconds=5.0, evaluate=lambda _: scores.append(0) or 0.0))
    assert len(history) == len(scores) == 2


def test_time_that_is_spent_before_the_first_step_counts_but_is_no_step(monkeypatch):
    monkeypatch.setattr(loop, "time", Clock(40.0, *[1.0] * 1000))
    steps = []
    run = Run(10, seconds=100.0, after_step=steps.append)
    distances(*centre(), run, extras=Extras(prepare=lambda: None))
    assert len(steps) in (59, 60)


def test_a_step_that_is_not_taken_leaves_the_weights_as_they_were():
    model, x = centre()
    before = model.weight.detach().clone()
    x[:] = float("inf")
    with pytest.raises(PysolveError, match=r"or give clip. That was in step 1 of the epoch"):
        distances(model, x, Run(1, epochs=1))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_the_network_computes_in_the_precision_and_the_loss_in_float32(precision):
    model, seen = nn.Linear(1, 1), []
    run = Run(1, epochs=1, precision=precision)
    with computing(run, torch.device("cpu")):
        output = model(torch.ones(2, 1))
    seen.append(output.dtype)
    assert seen == [torch.bfloat16 if precision == "bfloat16" else torch.float32]
    assert in_float32({"a": [output]})["a"][0].dtype == torch.float32
    assert in_float32(output.double()).dtype == torch.float64


def test_what_broke_is_named():
    x = torch.zeros(5, 2)
    x[3, 1] = float("nan")
    assert nonfinite_sample(x, torch.tensor([4, 3, 0])) == "sample 3"
    assert nonfinite_sample(x, torch.tensor([4, 2])) == ""
    assert nonfinite_sample(x[:, 1], torch.tensor([0, 3])) == "sample 3"
    assert nonfinite_batch({"x": x, "n": 3}, 7) == "batch 7"
    assert nonfinite_batch((x[:3], torch.ones(3, dtype=torch.long)), 7) == ""
