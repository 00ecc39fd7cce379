"""Distillation: train a network to reproduce another one's outputs, with labels or without."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from pysolve.errors import DataError, check_flags, whole
from pysolve.nn.batches.items import Transform, batched
from pysolve.nn.gathering.memory import free_memory
from pysolve.nn.running import Batch, calling_layers, check_model, evaluating, find_layer, keeping_modes
from pysolve.nn.state import keeping_state
from pysolve.training import loss as losses
from pysolve.training.batches import BatchSource, Key, Keyed, batch_source, cached
from pysolve.training.loop import Extras, nonfinite_batch, nonfinite_sample, optimise
from pysolve.training.options import Run, TrainingOptions, run_of

# With a limit in seconds, computing the teacher's outputs beforehand may take this share of them.
_SHARE = 0.25


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    loss: losses.Soft = "kl",
    features: Sequence[str] | Mapping[str, str] | None = None,
    feature_weight: float = 1.0,
    batch_size: int | None = None,
    mix: float = 0.0,
    cache: bool | None = None,
    frozen: bool = False,
    transform: Transform | None = None,
    **training: Unpack[TrainingOptions],
) -> list[float]:
    """Train a network in place to reproduce another one's outputs; no labels are needed.

    Minimises, with the outputs s of the student and t of the teacher, and features s_l and t_l of layers,

        α T² KL(softmax(t / T) ‖ softmax(s / T)) + (1 − α) CE(s, labels) + w Σ_l ‖A_l s_l − t_l‖² / Var(t_l)

    averaged over samples and positions. With epochs the same seed gives the same network; torch's global
    random state is left alone.

    Parameters
    ----------
    student : nn.Module
        Its parameters that require a gradient are trained; its modes are restored afterwards.
    teacher : nn.Module
        Never changed; it runs in evaluation mode. It must not share parameters with the student.
    batches : iterable of tensors, of tuples or lists, or of mappings
        A tuple's or list's first item is the input; a mapping holds keyword arguments. They must be iterable
        again, as a list or a DataLoader is. Or a Dataset of single samples, which are shuffled.
    temperature : float
        T. At a high one, the first term is half the squared error of centred logits, over their number.
    alpha : float
        α within 0 and 1. Below 1 labels are needed: pairs of inputs and labels, or mappings for a student
        whose output has a ``loss``, which then is CE. At 1 labels are ignored.
    loss : "kl", "mse" or callable
        In place of T² KL: ``mse``, the squared error of the outputs, which knows no temperature, or a
        function of the student's tensor and the teacher's; summed over outputs. Compared are the ``logits``
        of an output that has them, and otherwise all its floating-point tensors. Classes lie along dimension
        1 of outputs with 2 or 4 and more dimensions, along the last of those with 3.
    features : sequence of str, or {student's layer: teacher's layer}, optional
        Layers whose outputs are matched, too: the squared error over the variance of the teacher's around the
        mean of each channel. Where channels differ in number, an auxiliary linear map A_l is trained and
        dropped afterwards; the shapes must agree otherwise. Channels lie along dimension 1; of three
        dimensions along the last, except for Conv1d and its norms.
    feature_weight : float
        w.
    batch_size : int, optional
        Shuffle the samples of all batches in every epoch, with their labels, into batches of this size; where
        batches are not tensors of one sample shape, only their order is shuffled. All batches are then read
        at once. By default batches stay as they come.
    mix : float
        Floating-point inputs are moved towards others, of all samples or of the batch, by a random share of
        at most this, and the teacher runs on the mixture: few samples go further.
    cache : bool, optional
        Compute the teacher's outputs on every batch once and keep them. By default so if batches are held in
        memory (a list, a tuple, or with ``batch_size``), nothing is mixed, all outputs fit in half of the
        free memory and, by the clock, take less than a quarter of the time. True: for a loader too, which is
        then read once, so in one order. The result is the same, up to rounding where samples are shuffled.
    frozen : bool
        The student runs in evaluation mode: no dropout, and batch norms keep their statistics.
    transform : callable, optional
        Makes such inputs, or pairs of inputs and labels, of an item of ``batches``, of a Dataset's sample.
    **training
        As ``finetune`` has them; ``epochs`` or ``seconds`` must be given.

    Returns
    -------
    list of float
        Mean loss of each epoch, the last of which may be incomplete with ``seconds``.

    Raises
    ------
    ValueError
        When an option is out of its range, outputs have no classes for ``kl``, or parameters are shared.
    DataError
        When the teacher answers with NaN or infinity, or labels are missing.
    PysolveError
        When outputs or features of the two cannot be compared, or the loss is not finite.

    References
    ----------
    G. Hinton, O. Vinyals, J. Dean, Distilling the knowledge in a neural network, 2015. A. Romero et al.,
    FitNets: Hints for thin deep nets, 2015. L. Beyer et al., Knowledge distillation: A good teacher is
    patient and consistent, 2022. H. Zhang et al., mixup: Beyond empirical risk minimization, 2018.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> smaller = ps.compress(model, batches, keep=0.25, refit="none", latency=False).model
    >>> losses = ps.distill(smaller, model, batches, loss="mse", epochs=5)
    >>> losses[-1] < losses[0]
    True
    """
    _check_networks(student, teacher)
    terms = losses.DistillationLoss(
        temperature, alpha, loss, losses.layer_pairs(features), feature_weight, mix
    )
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size)
    if cache is not None:
        check_flags(cache=cache)
    if cache and mix:
        raise ValueError("cache=True keeps nothing of use where mix makes new samples: give one of them.")
    run = run_of(1, training)
    batches = batched(batches, transform, shuffle=True)
    source = batch_source(batches, batch_size, mix, store=bool(cache), labels=alpha < 1, seed=run.seed)
    run = replace(run, steps=source.steps)
    with (
        keeping_modes(student, teacher),
        keeping_state(teacher),
        calling_layers(),
        losses.tapped(student, [*terms.pairs], run) as answer,
        losses.tapped(teacher, [*terms.pairs.values()], run) as wanted,
    ):
        teacher.eval()
        student.train(not frozen)
        maps, dims = _maps(student, answer, wanted, terms.pairs, run, source)
        ask, fill_cache = _asking(wanted, source, run, False if mix else cache)

        def loss_of(item: Keyed) -> Tensor:
            given = ask(*item)
            output, outputs, own = answer(item[1])
            given = [one.to(outputs[0].device) for one in given] if outputs else given
            count = len(given) - len(own)
            value = losses.output_loss(terms, output, outputs, given[:count], item[1])
            matched = zip(own, given[count:], maps, dims, strict=True)
            return value + feature_weight * sum(losses.unexplained(*one) for one in matched)

        extras = Extras[Keyed](
            auxiliary=maps if any(True for _ in maps.parameters()) else None,
            generators=source.generators,
            prepare=fill_cache,
            settings={"batch_size": batch_size, "frozen": frozen, **terms.settings()},
            nonfinite=partial(_nonfinite, source.samples),
        )
        return optimise(student, loss_of, run, source.passes, extras)


def _check_networks(student: nn.Module, teacher: nn.Module) -> None:
    check_model("student", student)
    check_model("teacher", teacher)
    own = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if student is teacher or shared:
        what = "are one network" if student is teacher else f"share {', '.join(shared[:3])}"
        raise ValueError(
            f"student and teacher {what}: the teacher would change, too. Make the student of a copy.deepcopy."
        )


def _maps(
    student: nn.Module,
    answer: losses.Answering,
    wanted: losses.Answering,
    pairs: Mapping[str, str],
    run: Run,
    source: BatchSource,
) -> tuple[nn.ModuleList, list[int]]:
    """Maps between the channels of the matched layers, and the dimensions of these channels."""
    if not pairs:
        return nn.ModuleList(), []
    batch = source.first()
    with evaluating(student):
        (_, _, own), (_, _, hints) = answer(batch), wanted(batch)
    layers = [find_layer(student, name) for name in pairs]
    dims = [losses.channel_dim(layer, feature) for layer, feature in zip(layers, own, strict=True)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(run.seed))
        return losses.maps_between(pairs, dims, own, hints), dims


def _asking(
    wanted: losses.Answering, source: BatchSource, run: Run, cache: bool | None
) -> tuple[Callable[[Key, Batch], list[Tensor]], Callable[[], None]]:
    """A function that gives the teacher's outputs, then its features; and one that caches all of them."""
    known: Callable[[Key], list[Tensor]] | None = None

    def ask(key: Key, batch: Batch) -> list[Tensor]:
        if known is not None:
            return known(key)
        with torch.no_grad():
            _, outputs, hints = wanted(batch)
        return _finite([*outputs, *hints], key)

    def fill_cache() -> None:
        nonlocal known
        if source.stored is not None and cache is not False:
            known = cached(source, ask, math.inf if cache else _cache_limit(source, run, ask))

    return ask, fill_cache


def _cache_limit(source: BatchSource, run: Run, ask: Callable[[Key, Batch], list[Tensor]]) -> float:
    """Bytes of the teacher's outputs that may be cached by default."""
    if run.epochs == 1 or source.stored is None:
        return 0
    if run.seconds is not None:
        start = time.perf_counter()
        ask(0, source.stored[0])
        if (time.perf_counter() - start) * len(source.stored) > _SHARE * run.seconds:
            return 0
    return free_memory()


def _finite(outputs: list[Tensor], key: Key) -> list[Tensor]:
    """The teacher's outputs, checked to be finite."""
    for output in outputs:
        if not bool(output.isfinite().all()):
            where = f"batch {key + 1}" if isinstance(key, int) else _nonfinite_rows(output, key)
            raise DataError(
                f"the teacher's outputs hold NaN or infinity in {where}: check the batches and its weights."
            )
    return outputs


def _nonfinite_rows(output: Tensor, rows: Tensor) -> str:
    if len(output) != len(rows):
        return f"samples {rows.tolist()}"
    finite = output.reshape(len(output), -1).isfinite().all(1).cpu()
    return f"sample {int(rows[~finite][0])}"


def _nonfinite(samples: Tensor | None, item: Keyed, number: int) -> str:
    """What of an item is NaN or infinite, in words."""
    key, batch = item
    if isinstance(key, Tensor) and samples is not None:
        return nonfinite_sample(samples, key)
    return nonfinite_batch(batch, number)
