"""Training on arrays of inputs and labels."""

from __future__ import annotations

import math
from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pysolve.errors import whole
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Values, device_of, keeping_modes, labelled
from pysolve.training.finetune import Loss, loss_on
from pysolve.training.loop import Extras, computing, in_float32, nonfinite_sample, optimise, shuffled
from pysolve.training.options import TrainingOptions, run_of


def fit(
    model: nn.Module,
    x: Values,
    y: Values,
    *,
    batch_size: int = 256,
    loss: Loss = cross_entropy,
    **training: Unpack[TrainingOptions],
) -> list[float]:
    """Train a network on arrays, in place: by default with Adam on a one-cycle schedule.

    Minimises the mean of ``loss`` over samples. The same seed gives the same network; torch's global random
    state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained; its mode is restored afterwards.
    x : (n, …) array or tensor
    y : (n,) array or tensor
    batch_size : int
        Samples in a step, at most: they are shuffled in every epoch and cut into nearly equal parts.
    loss : callable
        Of outputs and labels, averaged over the batch.
    **training
        As ``finetune`` has them; ``epochs`` or ``seconds`` must be given.

    Returns
    -------
    list of float
        Mean loss of each epoch.

    Raises
    ------
    ValueError
        When an option is out of its range.
    DataError
        When inputs and labels differ in number, a sample is not finite, or the network refuses a batch.
    PysolveError
        When the loss becomes NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> x, y = torch.randn(200, 16), torch.randint(4, (200,))
    >>> losses = ps.fit(model, x, y, epochs=5)
    >>> losses[-1] < losses[0]
    True
    """
    batch_size = whole("batch_size", batch_size)
    inputs, labels = labelled(model, x, y)
    n, device = len(inputs), device_of(model)
    run = run_of(math.ceil(n / batch_size), training)

    def loss_of(rows: Tensor) -> Tensor:
        with computing(run, device):
            output = output_of(model, inputs[rows], device)
        return loss_on(loss, in_float32(output), labels[rows].to(device))

    extras = Extras[Tensor](settings={"samples": n}, nonfinite=lambda rows, _: nonfinite_sample(inputs, rows))
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, shuffled(n, run.steps, run.seed), extras)
