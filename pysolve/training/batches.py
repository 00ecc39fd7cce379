"""What a student is taught on: batches as they come, or samples of all of them, shuffled and mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysolve.errors import DataError
from pysolve.nn.running import arguments
from pysolve.training.finetune import counted, generators, one_by_one
from pysolve.training.loop import Passes, shuffled

# Where a batch is from: its number, or the indices of its samples.
Key = int | Tensor


@dataclass(frozen=True)
class Lessons:
    """Batches to teach on.

    Parameters
    ----------
    steps : int
        Batches in an epoch.
    passes : callable
        From the number of an epoch to its batches, each with its weight and key.
    first : callable
        Gives a batch like all others.
    held : sequence of batches, or None
        Everything, where it is in memory; a key speaks of these.
    samples : tensor, optional
        All inputs, where keys are their indices.
    generators : sequence of torch.Generator
        Of a loader.
    """

    steps: int
    passes: Passes
    first: Callable[[], Any]
    held: Sequence[Any] | None
    samples: Tensor | None = None
    generators: Sequence[torch.Generator] = ()


def lessons_of(
    batches: Iterable[Any], batch_size: int | None, mix: float, *, hold: bool, labels: bool, seed: int
) -> Lessons:
    """Batches as ``distill`` has them; those of a loader are kept with ``hold``, read once."""
    if batch_size is not None or (hold and not isinstance(batches, list | tuple)):
        batches = _read(batches, seed)
    loader, steps = counted(batches)
    if batch_size is not None:
        items = list(loader)
        samples = joined(items, labels=labels)
        if samples is not None:
            return _of_samples(*samples, batch_size, mix, seed)
        order = shuffled(steps, steps, seed)

        def anew(epoch: int) -> Iterator[tuple[int, Any]]:
            return ((1, (int(row), items[int(row)])) for _, row in order(epoch))

        return Lessons(steps, anew, lambda: items[0], items)

    def in_order(_: int) -> Iterator[tuple[int, Any]]:
        batches = enumerate(one_by_one(loader))
        return ((weight, (i, _mixed_batch(batch, mix))) for i, (weight, batch) in batches)

    if isinstance(loader, list | tuple):
        return Lessons(steps, in_order, lambda: loader[0], loader)
    own = generators(loader)
    return Lessons(steps, in_order, lambda: _read(loader, seed, 1)[0], None, generators=own)


def _of_samples(inputs: Tensor, labels: Tensor | None, size: int, mix: float, seed: int) -> Lessons:
    steps = math.ceil(len(inputs) / size)
    order = shuffled(len(inputs), steps, seed)

    def batch(rows: Any) -> Any:
        return inputs[rows] if labels is None else (inputs[rows], labels[rows])

    def passes(epoch: int) -> Iterator[tuple[int, Any]]:
        for weight, rows in order(epoch):
            yield weight, (rows, mixed(inputs[rows], inputs, mix) if mix else batch(rows))

    held = [batch(slice(start, start + size)) for start in range(0, len(inputs), size)]
    return Lessons(steps, passes, lambda: held[0], held, inputs)


def _read(batches: Iterable[Any], seed: int, most: int | None = None) -> list[Any]:
    """The first or all batches; random states are left as they were, and the order follows the seed."""
    if isinstance(batches, Tensor | Mapping):
        counted(batches)
    own = generators(batches)
    states = [generator.get_state() for generator in own]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(seed))
        items = []
        for batch in batches:
            items.append(batch)
            if len(items) == most:
                break
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    if not items:
        raise DataError("there are no batches: expected at least one. Was a generator used up before?")
    return items


def joined(batches: list[Any], *, labels: bool = False) -> tuple[Tensor, Tensor | None] | None:
    """All samples in one tensor, and all labels, if all batches are alike: of one shape, type and device."""
    given = [arguments(batch) for batch in batches]
    inputs = _together([args[0] if not kwargs else None for args, kwargs in given])
    if inputs is None or not labels:
        return None if inputs is None else (inputs, None)
    if not all(isinstance(batch, tuple | list) and len(batch) > 1 for batch in batches):
        return None
    targets = _together([batch[1] for batch in batches])
    alike = targets is not None and all(len(batch[0]) == len(batch[1]) for batch in batches)
    return (inputs, targets) if alike else None


def _together(parts: list[Any]) -> Tensor | None:
    if not all(isinstance(part, Tensor) and part.ndim for part in parts):
        return None
    return torch.cat(parts) if len({(x.shape[1:], x.dtype, x.device) for x in parts}) == 1 else None


def mixed(batch: Tensor, samples: Tensor, mix: float) -> Tensor:
    """Floating-point samples, each moved towards a random one by a random share of up to ``mix``."""
    if not mix or not samples.is_floating_point():
        return batch
    others = samples[torch.randint(len(samples), (len(batch),))]
    shares = mix * torch.rand(len(batch), *[1] * (samples.ndim - 1)).to(batch)
    return torch.lerp(batch, others, shares)


def _mixed_batch(batch: Any, mix: float) -> Any:
    args, kwargs = arguments(batch) if mix else ((), {})
    mixable = bool(args) and not kwargs and isinstance(args[0], Tensor) and args[0].ndim > 0
    return mixed(args[0], args[0], mix) if mixable else batch


def cached(
    lessons: Lessons, ask: Callable[[Key, Any], list[Tensor]], room: float
) -> Callable[[Key], list[Tensor]] | None:
    """What a teacher answers about every batch that is held, asked once, if it fits in ``room`` bytes."""
    assert lessons.held is not None
    answers: list[list[Tensor]] = []
    start = 0
    for i, batch in enumerate(lessons.held):
        key: Key = i
        if lessons.samples is not None:
            size = len(arguments(batch)[0][0])
            key, start = torch.arange(start, start + size), start + size
        answers.append([tensor.cpu() for tensor in ask(key, batch)])
        if not i and sum(map(_bytes, answers[0])) * len(lessons.held) > room:
            return None
        # Outputs without a sample in each row cannot be shared out to other batches.
        if isinstance(key, Tensor) and any(len(tensor) != len(key) for tensor in answers[-1]):
            return None
    if lessons.samples is None:
        return lambda key: answers[int(key)]
    tables = [torch.cat(parts) for parts in zip(*answers, strict=True)]
    return lambda rows: [table[rows] for table in tables]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
