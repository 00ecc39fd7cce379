"""Samples in users' batches: counted, taken apart, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import length_hint
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.errors import DataError
from pysolve.nn.batches.items import Items, Transform, batched
from pysolve.nn.outputs import main_output
from pysolve.nn.refusal import output_of
from pysolve.nn.running import (
    NO_BATCHES,
    Batch,
    Device,
    Inputs,
    arguments,
    evaluating,
    few_samples,
    forward,
    same_draws,
    sample_leaves,
    with_leaves,
)

_MIXED = (
    "samples alone get other outputs than in a batch: are they not along the first dimension of batches? "
    "Held-out samples and figures a sample count that dimension"
)


def samples_in(batch: Batch) -> int:
    """How many samples a batch holds: the common first dimension of its tensors."""
    if isinstance(batch, Inputs) and not sample_leaves(batch):
        return 1
    sizes = {len(leaf) for leaf in sample_leaves(batch).values()}
    if len(sizes) != 1:
        raise DataError(
            f"the tensors of a batch must share their first dimension, the samples; got {sorted(sizes)}."
        )
    return sizes.pop()


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start … stop − 1 of a batch, in the same form; views."""
    return with_leaves(batch, {i: leaf[start:stop] for i, leaf in sample_leaves(batch).items()})


def moved(batch: Batch, device: Device) -> Batch:
    """A batch on a device; as it is, without one."""
    if device is None:
        return batch
    return with_leaves(batch, {i: leaf.to(device) for i, leaf in _tensors(batch).items()})


def on_device(batches: Iterable[Batch], device: Device) -> Iterable[Batch]:
    """Batches on a device, as often as they can be gone through."""
    if device is None:
        return batches
    if isinstance(batches, Iterator):
        return ahead(batches, torch.device(device))
    return Moved(batches, torch.device(device))


@dataclass(frozen=True, eq=False)
class Moved:
    """A loader's batches on a device."""

    given: Iterable[Batch]
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        return ahead(self.given, self.device)

    def __length_hint__(self) -> int:
        return length_hint(self.given, 10)


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device; on a GPU the next one is copied while the last is computed with."""
    if device.type != "cuda":
        yield from (moved(batch, device) for batch in batches)
        return
    copies, waiting = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copies):
            after = _copied(batch, device)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream(device).wait_stream(copies)
        # Its memory is not given to others before the computation is done with it.
        for leaf in _tensors(after).values():
            leaf.record_stream(torch.cuda.current_stream(device))
        waiting = after
    if waiting is not None:
        yield waiting


def _copied(batch: Batch, device: torch.device) -> Batch:
    leaves = _tensors(batch)
    pinned = {i: leaf.pin_memory() if leaf.device.type == "cpu" else leaf for i, leaf in leaves.items()}
    return with_leaves(batch, {i: leaf.to(device, non_blocking=True) for i, leaf in pinned.items()})


def _tensors(batch: Batch) -> dict[int, Tensor]:
    leaves = enumerate(pytree.tree_leaves(arguments(batch)))
    return {i: leaf for i, leaf in leaves if isinstance(leaf, Tensor)}


def first_samples(batches: list[Batch], count: int) -> list[Batch]:
    """The first samples of several batches, still in batches."""
    taken = []
    for batch in batches:
        if count > 0:
            taken.append(take(batch, 0, count))
            count -= samples_in(taken[-1])
    return taken


def later_samples(batches: list[Batch], count: int) -> list[Batch]:
    """The samples behind the first ones of several batches, still in batches."""
    later = []
    for batch in batches:
        n = samples_in(batch)
        later += [take(batch, count, n)] if count < n else []
        count = max(0, count - n)
    return later


def joined(batches: list[Batch]) -> list[Batch]:
    """One batch instead of several, if all have the same form and sample shapes; otherwise as they are."""
    flat = [pytree.tree_flatten(arguments(batch)) for batch in batches]
    columns = [*zip(*(leaves for leaves, _ in flat), strict=False)]
    divided = sample_leaves(batches[0]) if batches else {}
    alike = (_alike(column, i in divided) for i, column in enumerate(columns))
    if not divided or any(form != flat[0][1] for _, form in flat) or not all(alike):
        return batches
    return [with_leaves(batches[0], {i: torch.cat(columns[i]) for i in divided})]


def _alike(values: tuple[object, ...], divided: bool) -> bool:
    """Whether values of several batches can become one."""
    first = values[0]
    if divided:
        return len({(v.shape[1:], v.dtype, v.device) if _has_samples(v) else None for v in values}) == 1
    if isinstance(first, Tensor):
        return all(isinstance(value, Tensor) and torch.equal(value, first) for value in values)
    return all(not isinstance(value, Tensor) and bool(value == first) for value in values)


def _has_samples(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0


def joined_within(batches: list[Batch], most: int) -> list[Batch]:
    """The same samples in as few equal batches of at most so many as there can be, as ``joined`` allows."""
    found = joined(batches)
    if len(found) != 1 or samples_in(found[0]) <= most:
        return found
    count = samples_in(found[0])
    parts = -(-count // most)
    return [take(found[0], i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def regrouped(batches: list[Batch], size: int) -> list[Batch]:
    """The same samples in batches of one size, without what is left at the end."""
    return [
        take(batch, start, start + size)
        for batch in joined(batches)
        for start in range(0, samples_in(batch) - size + 1, size)
    ]


def laid_out(model: nn.Module, first: Batch, batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """Batches that know which of their tensors hold samples, where these are not simply all.

    Of tensors with different first dimensions, or in lists, those with as many entries as the outputs are
    taken for the samples, the others for the same in all, if the network then gives the first samples alone
    what it gives them among all. Otherwise a batch is one sample: a graph, or a list of images. That is also
    asked where one of several tensors has as many entries along another dimension, as an adjacency has.
    """
    args, kwargs = arguments(first)
    leaves = sample_leaves(first)
    every = range(len(pytree.tree_leaves((args, kwargs))))
    alike = len(every) == len(kwargs) and len({len(leaf) for leaf in leaves.values()}) == 1
    square = len(leaves) > 1 and any(len(leaf) in leaf.shape[1:] for leaf in leaves.values())
    if args or (alike and not square):
        return first, batches
    with evaluating(model):
        whole = main_output(output_of(model, first))
        count = len(whole) if whole.ndim else 0
        shared = {i for i in every if i not in leaves or len(leaves[i]) != count}
        if not _divides(model, Inputs(kwargs, shared), whole):
            shared = {*every}

    def known(batch: Batch) -> Inputs:
        return Inputs(arguments(batch)[1], shared)

    return known(first), map(known, batches) if isinstance(batches, Iterator) else Items(batches, known)


def _divides(model: nn.Module, batch: Inputs, whole: Tensor) -> bool:
    """Whether the network gives a few samples alone what it gives them among all."""
    few = few_samples(batch)
    if few is batch:
        return False
    try:
        alone = main_output(forward(model, few))
    # Whatever the network's code raises.
    except Exception:
        return False
    among = whole[: len(alone)]
    return alone.shape == among.shape and torch.allclose(
        alone.double(), among.double(), rtol=1e-3, atol=1e-5 + _rounding(among)
    )


def mixed(model: nn.Module, batch: Batch) -> str:
    """What to say where the last samples of a batch get other outputs alone; "" where they get the same.

    Nothing is said of networks that draw random numbers, take no fewer samples, or make no floats.
    """
    count = samples_in(batch)
    if count < 4:
        return ""
    with evaluating(model):
        with same_draws(model):
            whole = main_output(output_of(model, batch))
        try:
            with same_draws(model):
                alone = main_output(forward(model, take(batch, count - 2, count)))
        # Whatever the network's code raises.
        except Exception:
            return ""
        if not whole.is_floating_point() or _of_samples(whole, alone, count):
            return ""
        with same_draws(model, seed=1):
            again = main_output(forward(model, batch))
    return _MIXED if torch.equal(again, whole) else ""


def _of_samples(whole: Tensor, alone: Tensor, count: int) -> bool:
    """Whether two samples' outputs are those among all, along some dimension; or nothing is known."""
    if alone.shape == whole.shape:
        return False
    other = [dim for dim, (n, few) in enumerate(zip(whole.shape, alone.shape, strict=False)) if n != few]
    if whole.ndim != alone.ndim or len(other) != 1 or whole.shape[other[0]] != count:
        return True
    same = whole.narrow(other[0], count - 2, 2)
    return torch.allclose(
        alone, same, rtol=0, atol=max(_rounding(same), 1e-3 * _largest(same)), equal_nan=True
    )


def _rounding(outputs: Tensor) -> float:
    """How far outputs may be apart that were computed in other batches."""
    return 16 * torch.finfo(outputs.dtype).eps * _largest(outputs) if outputs.is_floating_point() else 0.0


def _largest(outputs: Tensor) -> float:
    return float(outputs.abs().nan_to_num(0.0, 0.0, 0.0).max()) if outputs.numel() else 0.0


def peek(batches: Iterable[object], transform: Transform | None = None) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them."""
    batches = batched(batches, transform)
    iterator = iter(batches)
    for first in iterator:
        # An iterator is used up by looking at it; a loader begins again.
        return first, chain([first], iterator) if iterator is batches else batches
    raise DataError(NO_BATCHES)
