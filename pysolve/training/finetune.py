"""Fine-tuning on labelled batches, also of networks that are pruned meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss
from torch.nn.functional import cross_entropy

from pysolve.errors import DataError
from pysolve.nn.batches.items import Items, Transform, batched, check_batches
from pysolve.nn.refusal import in_words, output_of, sentence
from pysolve.nn.running import NO_BATCHES, Batch, Output, check_model, device_of, keeping_modes
from pysolve.training.loop import Extras, computing, in_float32, nonfinite_batch, optimise
from pysolve.training.options import TrainingOptions, run_of

# From outputs and labels to the mean loss.
Loss = Callable[[Output, Tensor], Tensor]


def finetune(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss = cross_entropy,
    transform: Transform | None = None,
    **training: Unpack[TrainingOptions],
) -> list[float]:
    """Train a network on labelled batches, in place: by default with Adam on a one-cycle schedule.

    Minimises the mean of ``loss`` over batches. Pruned weights of masked layers stay zero. The same seed and
    epochs give the same network, and torch's global random state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained, in training mode; modes are restored afterwards.
    batches : iterable of batches that can be iterated again, such as a DataLoader
        Pairs of inputs and labels; or mappings of keyword arguments, labels among them, for a network whose
        output has a ``loss``. Or a Dataset of single samples, which are shuffled.
    loss : callable
        Of outputs and labels, averaged over the batch.
    transform : callable, optional
        Makes such a pair, or mapping, of an item of ``batches``, of a Dataset's sample.
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
        From the network, in evaluation mode, to a score, higher is better: called after each epoch. At the
        end the parameters and buffers of the best epoch are restored. Its time counts as training's.
    patience : int, optional
        Stop once the score has not risen for this many epochs; a falling schedule is then cut short.
    checkpoint : path, optional
        File with the training's state, renewed after each epoch; where it exists, training resumes from it,
        and a finished one returns its network at once. With ``epochs`` the result is bit for bit that of
        uninterrupted training, if batches depend on torch's global random state and the loader's generator
        alone. Such files are safe to load whoever wrote them.
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

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [(torch.randn(50, 16), torch.randint(4, (50,))) for _ in range(4)]
    >>> losses = ps.finetune(model, batches, epochs=5)
    >>> losses[-1] < losses[0]
    True
    """
    check_model("model", model)
    run = run_of(1, training)
    loader, n = counted(batched(batches, transform, shuffle=True))
    run, device = replace(run, steps=n), device_of(model)

    def loss_of(batch: Batch) -> Tensor:
        if not isinstance(batch, Mapping):
            check_labelled(batch)
        with computing(run, device):
            output = output_of(model, batch, device)
        if isinstance(batch, Mapping):
            return in_float32(own_loss(output))
        return loss_on(loss, in_float32(output), batch[1].to(device))

    extras = Extras[Batch](generators=generators(loader), nonfinite=nonfinite_batch)
    with keeping_modes(model):
        return optimise(model.train(), loss_of, run, lambda _: one_by_one(loader), extras)


def loss_on(loss: Loss, output: Output, labels: Tensor) -> Tensor:
    """The loss of outputs on their labels.

    Raises
    ------
    DataError
        Labels that a loss of torch's refuses; errors of other functions are their own.
    TypeError
        The function returns something else than one number that can be trained on.
    """
    if loss is cross_entropy and not labels.is_floating_point():
        # Of integers it takes the longest and the shortest alone.
        labels = labels.long()
    if not callable(loss):
        raise TypeError(f"loss must be a function of outputs and labels, got {loss!r}.")
    try:
        value = loss(output, labels)
    except (IndexError, ValueError, TypeError, RuntimeError) as error:
        if not (getattr(loss, "__module__", None) or "").startswith("torch."):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            raise
        entropy = loss is cross_entropy or isinstance(loss, CrossEntropyLoss)
        name = "cross entropy" if entropy else getattr(loss, "__name__", type(loss).__name__)
        remedy = (
            "Classes are counted from 0, one for each sample; or give another loss."
            if entropy
            else ("Give labels that it takes, or another loss.")
        )
        raise DataError(
            f"the {name} of outputs {in_words(output)} refuses labels {in_words(labels)}: "
            f"{sentence(error)}. {remedy}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise TypeError(
            f"loss must return a tensor of one number, computed from the outputs, got {in_words(value)}."
        )
    return value


def check_labelled(batch: Batch) -> None:
    """Refuse what is no pair of inputs and labels."""
    kinds = [type(item).__name__ for item in batch] if isinstance(batch, tuple | list) else []
    if len(kinds) < 2 or not hasattr(batch[1], "to"):
        got = type(batch).__name__ + (f" of {', '.join(kinds[:2])}" if kinds else "")
        raise DataError(f"expected batches of inputs and labels, got {got}: give tensors of both.")


def one_by_one(batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
    """One pass over batches, with equal weights in the mean loss."""
    return ((1, batch) for batch in batches)


def generators(batches: Iterable[Batch]) -> list[torch.Generator]:
    """The random generators that a loader shuffles with."""
    batches = batches.given if isinstance(batches, Items) else batches
    holders = (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [*{id(one): one for one in found if isinstance(one, torch.Generator)}.values()]


def counted(batches: Iterable[Batch]) -> tuple[Iterable[Batch], int]:
    """Batches that can be iterated again, and their number."""
    check_batches(batches)
    try:
        n = len(batches)  # type: ignore[arg-type]
    except TypeError:
        # A generator, or a loader of a stream.
        batches = list(batches)
        n = len(batches)
    if not n:
        raise DataError(NO_BATCHES)
    return batches, n


def own_loss(output: Output) -> Tensor:
    """The ``loss`` of a network's output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(
            "batches that are mappings need a network whose output has a loss, so labels among them; got "
            f"{type(output).__name__}. Or give pairs of inputs and labels."
        )
    return loss
