"""Training on with labels: of networks that were made smaller, and of networks that are pruned meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pysolve.errors import DataError
from pysolve.nn.running import device_of, forward, keeping_modes
from pysolve.training.loop import Beside, broken_batch, computing, in_full, optimise
from pysolve.training.options import Training, run_of

Loss = Callable[[Any, Any], Tensor]


def finetune(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = cross_entropy,
    **training: Unpack[Training],
) -> list[float]:
    """Train a network on labelled batches, in place: Adam on a one-cycle schedule unless told otherwise.

    Masked weights stay zero where they are pruned. The same seed and epochs give the same network, and
    torch's global random state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained, in training mode; modes are restored afterwards.
    batches : iterable of batches that can be gone through again, such as a DataLoader
        Pairs of inputs and labels; or mappings of keyword arguments, labels among them, for a network whose
        output has a ``loss``.
    loss : callable
        Of outputs and labels, averaged over the batch.
    epochs : int, optional
        Passes over the batches.
    seconds : float, optional
        Instead of epochs: how long to train. The schedule follows the clock and ends with it, however fast
        the machine is; one step is taken at least.
    lr : float, default 1e-3
        The highest learning rate.
    weight_decay : float, default 0
    optimizer : "adam", "adamw", "sgd" or callable, default "adam"
        ``sgd`` has a momentum of 0.9. A callable makes a torch optimizer of a list of parameters; ``lr`` and
        ``weight_decay`` are then its own, and the schedule scales the learning rate of each of its groups.
    schedule : "one-cycle", "cosine", "constant" or callable, default "one-cycle"
        ``one-cycle`` rises to ``lr`` and falls again, the momentum of a named optimizer the other way round.
        A callable gives the factor of ``lr`` for the share of the training that is done, from 0 to 1.
    clip : float, optional
        Gradients of a larger norm, that of all parameters together, are scaled down to it.
    precision : "float32", "bfloat16" or "auto", default "float32"
        What the network computes in by torch's autocast; parameters stay as they are, and the loss of its
        outputs is taken in float32. ``auto``: bfloat16 where an accelerator has it, else float32.
    evaluate : callable, optional
        From the network, in evaluation mode, to a score, where higher is better: called after each epoch. The
        parameters and buffers of the best epoch are put back in the end. Its time counts as training's.
    patience : int, optional
        Stop once the score has not risen for so many epochs; a schedule that falls is then cut short.
    checkpoint : path, optional
        A file to keep the training's state in, renewed after each epoch; where it exists, training goes on
        from it, and one that is finished gives its network at once. With ``epochs`` the result is that of
        training without a stop, bit for bit, if batches depend on torch's global random state and the
        loader's generator alone. Such files are safe to load whoever wrote them.
    seed : int, default 0
        Of shuffling, of dropout, and of a DataLoader's shuffling that has no generator of its own.
    progress : bool, default True
        Show a progress bar, with the time left, when on a terminal.
    after_step : callable, optional
        Called after each step with the share of the training that is done. If it has ``state_dict`` and
        ``load_state_dict``, a checkpoint holds its state.

    Returns
    -------
    list of float
        Mean loss of each epoch; with ``seconds``, the last may be incomplete.

    Raises
    ------
    PysolveError
        When the loss becomes NaN or infinite: says in which batch, if it was the data's fault.
    DataError
        When there are no labels, or the checkpoint is of another training: says what differs.

    References
    ----------
    L. N. Smith, N. Topin, Super-convergence, 2019.
    """
    check_model("model", model)
    run = run_of(1, training)
    loader, n = counted(batches)
    run, device = replace(run, steps=n), device_of(model)

    def loss_of(batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) and (not isinstance(batch, tuple | list) or len(batch) < 2):
            raise DataError(f"expected batches of inputs and labels, got {type(batch).__name__}.")
        with computing(run, device):
            output = forward(model, batch, device)
        if isinstance(batch, Mapping):
            return in_full(own_loss(output))  # type: ignore[no-any-return]
        return loss(in_full(output), batch[1].to(device))

    beside = Beside(generators=generators(loader), broken=broken_batch)
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, lambda _: one_by_one(loader), beside)


def one_by_one(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """One pass over batches that count alike in the mean loss."""
    return ((1, batch) for batch in batches)


def generators(batches: Any) -> list[torch.Generator]:
    """The random generators that a loader shuffles with."""
    holders = (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [*{id(one): one for one in found if isinstance(one, torch.Generator)}.values()]


def check_model(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{name} must be a torch.nn.Module, such as the model of a Compressed; got {kind}.")


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


def own_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(
            "batches that are mappings need a network whose output has a loss, so labels among them; got "
            f"{type(output).__name__}. Or give pairs of inputs and labels."
        )
    return loss
