"""Batches of distillation: as they come, or samples of all of them, shuffled and mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pysolve.errors import DataError
from pysolve.nn.batches.items import check_batches
from pysolve.nn.running import NO_BATCHES, Batch, arguments
from pysolve.training.finetune import counted, generators, one_by_one
from pysolve.training.loop import Passes, shuffled

# Position of a batch, or indices of its samples.
Key = int | Tensor
Keyed = tuple[Key, Batch]


@dataclass(frozen=True)
class BatchSource:
    """Batches to train a student on: ``steps`` in an epoch, each with its weight and key.

    ``first`` returns one of them, for the shapes. ``stored`` are all batches where they are in memory, to
    which keys refer; ``samples`` all inputs where keys are their indices; ``generators`` those of a loader.
    """

    steps: int
    passes: Passes[Keyed]
    first: Callable[[], Batch]
    stored: Sequence[Batch] | None
    samples: Tensor | None = None
    generators: Sequence[torch.Generator] = ()


def batch_source(
    batches: Iterable[Batch], batch_size: int | None, mix: float, *, store: bool, labels: bool, seed: int
) -> BatchSource:
    """Batches as ``distill`` takes them; with ``store`` those of a loader are read once and kept."""
    if batch_size is not None or (store and not isinstance(batches, list | tuple)):
        batches = _read(batches, seed)
    loader, steps = counted(batches)
    if batch_size is not None:
        items = list(loader)
        samples = joined(items, labels=labels)
        if samples is not None:
            return _from_samples(*samples, batch_size, mix, seed)
        order = shuffled(steps, steps, seed)

        def reordered(epoch: int) -> Iterator[tuple[int, Keyed]]:
            return ((1, (int(row), items[int(row)])) for _, row in order(epoch))

        return BatchSource(steps, reordered, lambda: items[0], items)

    def in_order(_: int) -> Iterator[tuple[int, Keyed]]:
        batches = enumerate(one_by_one(loader))
        return ((weight, (i, _mixed_batch(batch, mix))) for i, (weight, batch) in batches)

    if isinstance(loader, list | tuple):
        return BatchSource(steps, in_order, lambda: loader[0], loader)
    own = generators(loader)
    return BatchSource(steps, in_order, lambda: _read(loader, seed, 1)[0], None, generators=own)


def _from_samples(inputs: Tensor, labels: Tensor | None, size: int, mix: float, seed: int) -> BatchSource:
    """Shuffled batches of samples."""
    steps = math.ceil(len(inputs) / size)
    order = shuffled(len(inputs), steps, seed)

    def batch(rows: Tensor | slice) -> Batch:
        return inputs[rows] if labels is None else (inputs[rows], labels[rows])

    def passes(epoch: int) -> Iterator[tuple[int, Keyed]]:
        for weight, rows in order(epoch):
            yield weight, (rows, mixed(inputs[rows], inputs, mix) if mix else batch(rows))

    stored = [batch(slice(start, start + size)) for start in range(0, len(inputs), size)]
    return BatchSource(steps, passes, lambda: stored[0], stored, inputs)


def _read(batches: Iterable[Batch], seed: int, most: int | None = None) -> list[Batch]:
    """The first ``most`` or all batches, in an order set by the seed; random states are restored."""
    check_batches(batches)
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
        raise DataError(NO_BATCHES)
    return items


def joined(batches: list[Batch], *, labels: bool = False) -> tuple[Tensor, Tensor | None] | None:
    """All samples in one tensor, and all labels, if shapes, types and devices agree across batches."""
    given = [arguments(batch) for batch in batches]
    inputs = _together([args[0] if not kwargs else None for args, kwargs in given])
    if inputs is None or not labels:
        return None if inputs is None else (inputs, None)
    if not all(isinstance(batch, tuple | list) and len(batch) > 1 for batch in batches):
        return None
    targets = _together([batch[1] for batch in batches])
    alike = targets is not None and all(len(batch[0]) == len(batch[1]) for batch in batches)
    return (inputs, targets) if alike else None


def _together(parts: list[object]) -> Tensor | None:
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim]
    alike = len({(x.shape[1:], x.dtype, x.device) for x in tensors}) == 1
    return torch.cat(tensors) if alike and len(tensors) == len(parts) else None


def mixable(batch: Batch) -> bool:
    """Whether its input holds samples that can be moved towards one another."""
    args, kwargs = arguments(batch)
    only = args[0] if args and not kwargs else None
    return isinstance(only, Tensor) and only.ndim > 0 and only.is_floating_point()


def mixed(batch: Tensor, samples: Tensor, mix: float) -> Tensor:
    """Floating-point samples, each moved towards a random one by a random share in [0, mix)."""
    if not mix or not samples.is_floating_point():
        return batch
    others = samples[torch.randint(len(samples), (len(batch),))]
    shares = mix * torch.rand(len(batch), *[1] * (samples.ndim - 1)).to(batch)
    return torch.lerp(batch, others, shares)


def _mixed_batch(batch: Batch, mix: float) -> Batch:
    if not mix or not mixable(batch):
        return batch
    (samples, *_), _ = arguments(batch)
    return mixed(samples, samples, mix)


def cached(
    source: BatchSource, ask: Callable[[Key, Batch], list[Tensor]], limit: float
) -> Callable[[Key], list[Tensor]] | None:
    """The teacher's outputs on every stored batch, computed once, if they fit in ``limit`` bytes."""
    assert source.stored is not None
    known: list[list[Tensor]] = []
    start = 0
    for i, batch in enumerate(source.stored):
        key: Key = i
        if source.samples is not None:
            size = len(arguments(batch)[0][0])
            key, start = torch.arange(start, start + size), start + size
        known.append([tensor.cpu() for tensor in ask(key, batch)])
        if not i and sum(tensor.nbytes for tensor in known[0]) * len(source.stored) > limit:
            return None
        # Outputs without one row a sample cannot be regrouped into other batches.
        if isinstance(key, Tensor) and any(len(tensor) != len(key) for tensor in known[-1]):
            return None
    if source.samples is None:
        return lambda key: known[int(key)]
    tables = [torch.cat(parts) for parts in zip(*known, strict=True)]
    return lambda rows: [table[rows] for table in tables]
