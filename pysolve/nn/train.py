"""One plain training loop, for labels and for another network's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from pysolve.errors import DataError, PysolveError
from pysolve.nn.loop import Run, optimise
from pysolve.nn.network import Values, arguments, device_of, forward, keeping_modes, labelled

Loss = Callable[[Tensor, Tensor], Tensor]


def fit(
    model: nn.Module,
    x: Values,
    y: Values,
    *,
    epochs: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    loss: Loss = cross_entropy,
    progress: bool = True,
) -> list[float]:
    """Train in place with Adam on a one-cycle schedule.

    The same seed gives the same network; torch's global random state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained; its mode is restored afterwards.
    x : (n, …) array or tensor
    y : (n,) array or tensor
    epochs, batch_size : int
    lr : float
        The highest learning rate of the cycle.
    weight_decay : float
    seed : int
        Of the shuffling and of dropout.
    loss : callable
        Of outputs and labels, averaged over the batch.
    progress : bool
        Show a progress bar when on a terminal.

    Returns
    -------
    list of float
        Mean loss of each epoch.

    References
    ----------
    L. N. Smith, N. Topin, Super-convergence, 2019.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
    inputs, labels = labelled(model, x, y)
    device, steps = device_of(model), math.ceil(len(inputs) / batch_size)

    def loss_of(rows: Tensor) -> Tensor:
        return loss(model(inputs[rows].to(device)), labels[rows].to(device))

    run = Run(len(inputs), steps, epochs, lr=lr, weight_decay=weight_decay, seed=seed)
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, progress=progress)


def match(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int | None = None,
    seconds: float | None = None,
    batch_size: int = 32,
    lr: float = 1e-3,
    mix: float = 0.5,
    seed: int = 0,
    loss: Loss = mse_loss,
    progress: bool = True,
) -> list[float]:
    """Train a network in place to give another one's outputs; no labels are needed.

    Adam on a one-cycle schedule, as ``fit``. With ``epochs`` the same seed gives the same network; torch's
    global random state is left alone.

    Parameters
    ----------
    student, teacher : nn.Module
        Both run in evaluation mode: without dropout, and with the batch norms' statistics as they are. The
        student's parameters that require a gradient are trained.
    batches : iterable of tensors, of tuples or lists, or of mappings
        A tuple's or list's first item is the input (labels are ignored); a mapping holds keyword arguments.
    epochs : int, optional
        Passes over the batches.
    seconds : float, optional
        Instead of epochs: how long to train. The schedule follows the clock and ends with it, however fast
        the machine is; one step is taken at least.
    batch_size : int
        When all inputs are tensors of one sample shape, their samples are shuffled into batches of this
        size; otherwise the batches stay as they are and only their order is shuffled.
    lr : float
        The highest learning rate of the cycle.
    mix : float
        Samples that can be shuffled and are floating-point are moved towards one another, by a random share
        of up to so much, and the teacher is asked about the mixture: few samples go further. 0: none are.
    seed : int
        Of the shuffling and the mixing.
    loss : callable
        Of two tensors, the student's and the teacher's, averaged; summed over the outputs. Compared are the
        ``logits`` of an output that has them, and otherwise all its floating-point tensors.
    progress : bool
        Show a progress bar when on a terminal.

    Returns
    -------
    list of float
        Mean loss of each epoch, the last of which may be incomplete with ``seconds``.

    Raises
    ------
    PysolveError
        When the outputs of the two cannot be compared, or the loss is not finite.

    References
    ----------
    H. Zhang, M. Cissé, Y. N. Dauphin, D. Lopez-Paz, mixup: Beyond empirical risk minimization, 2018.
    """
    if (epochs is None) == (seconds is None):
        raise ValueError(f"expected either epochs or seconds, got epochs={epochs} and seconds={seconds}.")
    if min(batch_size, 1 if epochs is None else epochs) < 1 or (seconds is not None and seconds <= 0):
        raise ValueError(f"{epochs=}, {seconds=} and {batch_size=} must be positive.")
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be within 0 and 1, got {mix}.")
    items = _listed(batches)
    samples = _joined(items)
    n = len(items) if samples is None else len(samples)
    steps = n if samples is None else math.ceil(n / batch_size)

    def answers(model: nn.Module, batch: Any) -> list[Tensor]:
        return _floating(forward(model, batch, device_of(model)))

    def loss_of(rows: Tensor) -> Tensor:
        batch = items[int(rows)] if samples is None else _mixed(samples, rows, mix)
        with torch.no_grad():
            wanted = _finite([target.to(device_of(student)) for target in answers(teacher, batch)])
        return _compared(loss, answers(student, batch), wanted)

    run = Run(n, steps, epochs, seconds, lr=lr, seed=seed)
    with keeping_modes(student, teacher):
        student.eval()
        teacher.eval()
        return optimise(student, loss_of, run, progress=progress)


def _listed(batches: Iterable[Any]) -> list[Any]:
    """The batches, checked to be some."""
    if isinstance(batches, Tensor | Mapping):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got one {kind}: wrap it in a list.")
    items = list(batches)
    if not items:
        raise DataError("there are no batches: expected at least one. Was a generator used up before?")
    return items


def _joined(batches: list[Any]) -> Tensor | None:
    """All samples in one tensor if each batch is one tensor, of one sample shape, type and device."""
    given = [arguments(batch) for batch in batches]
    inputs = [args[0] for args, kwargs in given if not kwargs]
    kinds = {(x.shape[1:], x.dtype, x.device) for x in inputs if x.ndim}
    if len(inputs) < len(batches) or len(kinds) != 1 or not all(x.ndim for x in inputs):
        return None
    return torch.cat(inputs)


def _mixed(samples: Tensor, rows: Tensor, mix: float) -> Tensor:
    """Some samples, each moved towards a random one by a random share of up to ``mix``."""
    batch = samples[rows]
    if not mix or not samples.is_floating_point():
        return batch
    others = samples[torch.randint(len(samples), (len(rows),))]
    shares = mix * torch.rand(len(rows), *[1] * (samples.ndim - 1)).to(batch)
    return torch.lerp(batch, others, shares)


def _floating(output: Any) -> list[Tensor]:
    """The tensors in a network's output to compare: its logits, or all that are floating-point."""
    if isinstance(output, Mapping):
        return _floating(output["logits"] if "logits" in output else [*output.values()])
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in _floating(item)]
    # Single numbers are losses and counts.
    return [output] if isinstance(output, Tensor) and output.is_floating_point() and output.ndim else []


def _finite(targets: list[Tensor]) -> list[Tensor]:
    """The teacher's outputs, checked to be numbers."""
    if not all(bool(target.isfinite().all()) for target in targets):
        raise DataError("the teacher's outputs hold NaN or infinity: check the batches and its weights.")
    return targets


def _compared(loss: Loss, outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The loss summed over the outputs, which must be alike."""
    shapes, wanted = ([list(tensor.shape) for tensor in tensors] for tensors in (outputs, targets))
    if shapes != wanted or not shapes:
        raise PysolveError(
            "the student must answer with floating-point tensors of the same shapes as the teacher: got "
            f"{shapes}, expected {wanted}."
        )
    losses = [loss(output, target.to(output.dtype)) for output, target in zip(outputs, targets, strict=True)]
    return torch.stack(losses).sum()
