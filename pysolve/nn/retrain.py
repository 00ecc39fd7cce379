"""Training on: of networks that were made smaller, and of networks that are pruned meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pysolve.errors import DataError
from pysolve.masks import masks as chosen
from pysolve.nn.loop import Run, optimise
from pysolve.nn.masking import masks_of
from pysolve.nn.network import arguments, as_array, device_of, forward, keeping_modes

Loss = Callable[[Any, Any], Tensor]
# Called after each step with the share of the training that is done.
Step = Callable[[float], None]


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

    Masked weights stay zero where they are pruned.

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
        Of dropout; shuffling is the loader's.
    progress : bool
        Show a progress bar, with the time left, when on a terminal.
    after_step : callable, optional
        Called after each step with the share of the training that is done.

    Returns
    -------
    list of float
        Mean loss of each epoch.
    """
    if (epochs is None) == (seconds is None):
        raise ValueError(f"expected either epochs or seconds, got epochs={epochs} and seconds={seconds}.")
    loader = batches if hasattr(batches, "__len__") else list(batches)
    n, device, stream = len(loader), device_of(model), _again(loader)  # type: ignore[arg-type]
    if not n:
        raise DataError("there are no batches: expected at least one. Was a generator used up before?")

    def loss_of(_: Tensor) -> Tensor:
        batch = next(stream)
        if isinstance(batch, Mapping):
            return forward(model, batch, device)["loss"]  # type: ignore[no-any-return]
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise DataError(f"expected batches of inputs and labels, got {type(batch).__name__}.")
        (inputs,), _none = arguments(batch)
        return loss(forward(model, inputs, device), batch[1].to(device))

    run = Run(n, n, epochs, seconds, lr=lr, weight_decay=weight_decay, seed=seed)
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, progress=progress, after_step=after_step)


def gradually(model: nn.Module, amount: float | Mapping[str, float], *, steps: int, end: float) -> Step:
    """Prune a network's masked weights by magnitude while it is trained, more and more.

    The share that is pruned follows  s(t) = amount · (1 − (1 − t / end)³)  in equal steps.

    Parameters
    ----------
    model : nn.Module
        With masks on the layers to prune.
    amount : float or {layer: float}
        Share of each layer's weights that is zero in the end.
    steps : int
    end : float
        Share of the training after which the masks stay as they are.

    References
    ----------
    M. Zhu, S. Gupta, To prune, or not to prune, 2017.
    """
    masks = masks_of(model)
    done = -1

    def prune(share: float) -> None:
        nonlocal done
        step = min(steps, int(steps * share / end))
        if step == done:
            return
        done = step
        level = 1 - (1 - step / steps) ** 3
        weights = {name: as_array(model.get_submodule(name).weight) for name in masks}
        each = amount if isinstance(amount, Mapping) else dict.fromkeys(weights, amount)
        kept = chosen(weights, {name: level * value for name, value in each.items()})
        for name, mask in kept.items():
            masks[name].mask.copy_(torch.from_numpy(mask))

    return prune


def surgery(
    model: nn.Module,
    thresholds: Mapping[str, float],
    *,
    end: float,
    probability: Mapping[str, float],
    seed: int,
) -> Step:
    """Prune a network's masked weights while it is trained, and put back those that turn out to matter.

    With a threshold t of a layer, weights below 0.9 t go, those above 1.1 t come back, and those between stay
    as they are. A layer's mask is looked at with a probability that falls as the training goes on.

    Parameters
    ----------
    model : nn.Module
        With splicing masks.
    thresholds : {layer: float}
    end : float
        Share of the training after which the masks stay as they are.
    probability : {layer: float}
        In the beginning; it falls in a straight line, to a tenth at the end.
    seed : int

    References
    ----------
    Y. Guo, A. Yao, Y. Chen, Dynamic network surgery for efficient DNNs, 2016.
    """
    masks, random = masks_of(model), np.random.default_rng(seed)
    modules = dict(model.named_modules())

    def operate(share: float) -> None:
        if share >= end:
            return
        for name, threshold in thresholds.items():
            if random.random() >= probability[name] * (1 - 0.9 * share / end):
                continue
            size = modules[name].parametrizations.weight.original.abs()
            mask = masks[name].mask
            mask &= size >= 0.9 * threshold
            mask |= size > 1.1 * threshold

    return torch.no_grad()(operate)


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches
