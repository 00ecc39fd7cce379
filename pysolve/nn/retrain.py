"""Training on with labels: of networks that were made smaller, and of networks that are pruned meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pysolve.errors import DataError
from pysolve.nn.loop import Run, Step, optimise
from pysolve.nn.network import device_of, forward, keeping_modes

Loss = Callable[[Any, Any], Tensor]


def finetune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int | None = None,
    seconds: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    loss: Loss = cross_entropy,
    seed: int = 0,
    progress: bool = True,
    after_step: Step | None = None,
) -> list[float]:
    """Train a network on labelled batches, in place: Adam on a one-cycle schedule.

    Masked weights stay zero where they are pruned. The same seed and epochs give the same network, and
    torch's global random state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained, in training mode; modes are restored afterwards.
    batches : iterable of batches that can be gone through again, such as a DataLoader
        Pairs of inputs and labels; or mappings of keyword arguments, labels among them, for a network whose
        output has a ``loss``.
    epochs : int, optional
    seconds : float, optional
        Instead of epochs: how long to train. The schedule follows the clock.
    lr : float
        The highest learning rate of the cycle.
    weight_decay : float
    loss : callable
        Of outputs and labels, averaged over the batch.
    seed : int
        Of dropout, and of a DataLoader's shuffling that has no generator of its own.
    progress : bool
        Show a progress bar, with the time left, when on a terminal.
    after_step : callable, optional
        Called after each step with the share of the training that is done.

    Returns
    -------
    list of float
        Mean loss of each epoch.

    Raises
    ------
    PysolveError
        When the loss becomes NaN or infinite.
    """
    _check_model(model)
    _check_length(epochs, seconds, lr)
    loader, n = counted(batches)
    device, stream = device_of(model), _again(loader)

    def loss_of(_: Tensor) -> Tensor:
        batch = next(stream)
        if isinstance(batch, Mapping):
            return _own_loss(forward(model, batch, device))
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise DataError(f"expected batches of inputs and labels, got {type(batch).__name__}.")
        return loss(forward(model, batch, device), batch[1].to(device))

    run = Run(n, n, epochs, seconds, lr=lr, weight_decay=weight_decay, seed=seed)
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, progress=progress, after_step=after_step)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, such as the model of a Compressed; got {kind}.")


def _check_length(epochs: int | None, seconds: float | None, lr: float) -> None:
    if (epochs is None) == (seconds is None):
        raise ValueError(f"expected either epochs or seconds, got epochs={epochs} and seconds={seconds}.")
    if (epochs is not None and epochs < 1) or (seconds is not None and not 0 < seconds < math.inf):
        raise ValueError(f"{epochs=} or {seconds=} must be positive.")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr}.")


def counted(batches: Iterable[Any]) -> tuple[Iterable[Any], int]:
    """Batches that can be gone through again, and how many they are."""
    if isinstance(batches, Tensor | Mapping):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got one {kind}: wrap it in a list.")
    try:
        n = len(batches)  # type: ignore[arg-type]
    except TypeError:
        # A generator, or a loader of a stream.
        batches = list(batches)
        n = len(batches)
    if not n:
        raise DataError("there are no batches: expected at least one. Was a generator used up before?")
    return batches, n


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise DataError("there are no batches any more: give a list of them, or a DataLoader.")


def _own_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(
            "batches that are mappings need a network whose output has a loss, so labels among them; got "
            f"{type(output).__name__}. Or give pairs of inputs and labels."
        )
    return loss
