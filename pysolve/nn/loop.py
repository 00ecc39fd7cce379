"""The training loop: Adam on a one-cycle schedule, for a number of steps or for a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from pysolve.errors import PysolveError
from pysolve.nn.network import device_of

# Called after each step with the share of the training that is done.
Step = Callable[[float], None]

# Learning rates of a schedule that follows the clock.
_TICKS = 1000


@dataclass(frozen=True)
class Run:
    """How, and how long, to train on n examples.

    Parameters
    ----------
    n : int
    steps : int
        Parts of nearly equal size that the shuffled examples are cut into, an optimiser step each.
    epochs : int, optional
    seconds : float, optional
        Instead of epochs.
    lr : float
        The highest learning rate of the cycle.
    weight_decay : float
    seed : int
        Of the shuffling and of dropout.
    """

    n: int
    steps: int
    epochs: int | None = None
    seconds: float | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0

    @property
    def length(self) -> int:
        """How many learning rates the schedule has."""
        return _TICKS if self.epochs is None else self.epochs * self.steps

    def position(self, done: int, elapsed: float) -> int:
        """Where on the schedule the next step is; it is not taken when that is the end, ``length``."""
        if self.seconds is None:
            return min(done, self.length)
        # By the clock, and as it will be after one more step: so the last step ends in time.
        return min(int(self.length * elapsed * (done + 1) / done / self.seconds), self.length)

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the epoch and indices of the examples, step after step; shuffled anew in every epoch."""
        shuffle = torch.Generator().manual_seed(self.seed)
        for epoch in count():
            # Parts of nearly equal size: batch norm cannot train on a last batch of one sample.
            for rows in torch.randperm(self.n, generator=shuffle).tensor_split(self.steps):
                yield epoch, rows


def optimise(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    run: Run,
    *,
    progress: bool = True,
    after_step: Step | None = None,
) -> list[float]:
    """Train the parameters that require a gradient, in place; the network's mode is the caller's affair.

    Parameters
    ----------
    model : nn.Module
    loss : callable
        Mean loss of the examples whose indices it is given.
    run : Run
    progress : bool
        Show a progress bar when on a terminal.
    after_step : callable, optional
        Called after each step with the share of the schedule that is done.

    Returns
    -------
    list of float
        Mean loss of each epoch; by the clock, the last one may be incomplete.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PysolveError("no parameter of the network requires a gradient: nothing can be trained.")
    optimizer = Adam(trained, lr=run.lr, weight_decay=run.weight_decay)
    schedule = OneCycleLR(optimizer, run.lr, total_steps=run.length)
    sums: list[tuple[float, int]] = []
    position = 0
    start = time.perf_counter()
    with _bar(run, progress) as bar, torch.enable_grad(), _random_state(run.seed, device_of(model)):
        for done, (epoch, rows) in enumerate(run.parts(), start=1):
            value = _step(optimizer, loss(rows))
            if not math.isfinite(value):
                raise PysolveError(f"the loss became {value} in epoch {epoch + 1}: lower lr ({run.lr}).")
            total, seen = sums.pop() if len(sums) > epoch else (0.0, 0)
            sums.append((total + value * len(rows), seen + len(rows)))
            # The clock's estimate may fall back.
            position = max(position, run.position(done, time.perf_counter() - start))
            bar.set_postfix(epoch=epoch + 1, loss=f"{sums[-1][0] / sums[-1][1]:.4f}", refresh=False)
            bar.update(position - bar.n)
            if after_step is not None:
                after_step(position / run.length)
            if position == run.length:
                break
            while schedule.last_epoch < position:
                schedule.step()
    return [total / seen for total, seen in sums]


def _step(optimizer: Optimizer, loss: Tensor) -> float:
    """One step down the gradient; the loss before it."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def _bar(run: Run, progress: bool) -> tqdm[Any]:
    form = None if run.seconds is None else "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    off = None if progress else True
    return tqdm(total=run.length, desc="train", unit="batch", disable=off, bar_format=form)


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own inside (for dropout); torch's global one is put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
