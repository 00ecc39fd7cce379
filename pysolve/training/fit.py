"""Training on labels that are at hand in one array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pysolve.nn.running import Values, device_of, keeping_modes, labelled
from pysolve.training.loop import Beside, broken_sample, computing, in_full, optimise, shuffled
from pysolve.training.options import Training, run_of

Loss = Callable[[Tensor, Tensor], Tensor]


def fit(
    model: nn.Module,
    x: Values,
    y: Values,
    *,
    batch_size: int = 256,
    loss: Loss = cross_entropy,
    **training: Unpack[Training],
) -> list[float]:
    """Train in place, with Adam on a one-cycle schedule unless told otherwise.

    The same seed gives the same network; torch's global random state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained; its mode is restored afterwards.
    x : (n, …) array or tensor
    y : (n,) array or tensor
    batch_size : int
        Samples are shuffled in every epoch, and cut into parts of nearly equal size, of so many at most.
    loss : callable
        Of outputs and labels, averaged over the batch.
    **training
        As ``finetune`` has them; ``epochs`` or ``seconds`` must be given.

    Returns
    -------
    list of float
        Mean loss of each epoch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    inputs, labels = labelled(model, x, y)
    n, device = len(inputs), device_of(model)
    run = run_of(math.ceil(n / batch_size), training)

    def loss_of(rows: Tensor) -> Tensor:
        with computing(run, device):
            output = model(inputs[rows].to(device))
        return loss(in_full(output), labels[rows].to(device))

    beside = Beside(settings={"samples": n}, broken=lambda rows, _: broken_sample(inputs, rows))
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, shuffled(n, run.steps, run.seed), beside)
