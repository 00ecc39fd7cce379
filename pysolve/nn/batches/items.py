"""The user's items become batches: of a Dataset's samples, and of what a function makes of each item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pysolve.errors import DataError
from pysolve.nn.running import NO_BATCHES, Batch

# How many samples of a Dataset make a batch.
DATASET_BATCH = 64
# From an item of ``batches``, of a Dataset one sample, to inputs of the network, or inputs and labels.
Transform = Callable[[Any], Batch]


@dataclass(frozen=True, eq=False)
class Items:
    """What a function makes of a loader's items, as often as these can be gone through."""

    given: Iterable[object]
    made: Transform

    def __iter__(self) -> Iterator[Batch]:
        return map(self.made, self.given)

    def __len__(self) -> int:
        return len(self.given)  # type: ignore[arg-type]

    def __length_hint__(self) -> int:
        return length_hint(self.given, 10)


def batched(
    batches: Iterable[object], transform: Transform | None = None, *, shuffle: bool = False
) -> Iterable[Batch]:
    """The network's batches: items as they are, or what ``transform`` makes of them.

    A Dataset's items are single samples: they are transformed one by one, and then put together; in a random
    order every time with ``shuffle``. An iterator stays one.
    """
    check_batches(batches)
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of an item of batches, got {transform!r}.")
    given: Iterable[object] | Dataset[object] = batches
    made = None if transform is None else _telling(transform)
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        if not hasattr(given, "__len__"):
            raise TypeError(f"{type(given).__name__} has no __len__: give a DataLoader, or batches.")
        if not len(given):
            raise DataError(NO_BATCHES)

        def collated(samples: list[object]) -> Batch:
            return _collated(samples if made is None else [*map(made, samples)])

        # Without a generator of its own a loader draws a number of all for every epoch.
        own = None if shuffle else torch.Generator()
        return DataLoader(given, DATASET_BATCH, shuffle=shuffle, collate_fn=collated, generator=own)
    if made is None:
        return batches
    return map(made, given) if isinstance(given, Iterator) else Items(given, made)


def check_batches(batches: object) -> None:
    """Refuse nothing at all, and a single batch where an iterable of batches is expected."""
    if batches is None:
        raise DataError("there are no batches, but None: give inputs, such as [x] or a DataLoader.")
    if isinstance(batches, Tensor | Mapping):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got one {kind}: wrap it in a list.")
    if isinstance(batches, type):
        raise TypeError(
            f"batches must be an iterable of batches, got the class {batches.__name__}: make one."
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}.")


def example_of(given: object, transform: Transform | None = None) -> Batch:
    """One batch: what is given, or the first of a loader or Dataset; made by ``transform`` of an item."""
    if isinstance(given, DataLoader | Dataset):
        for first in batched(cast("Iterable[object]", given), transform):
            return first
        raise DataError(NO_BATCHES)
    return next(iter(batched([given], transform)))


def _telling(transform: Transform) -> Transform:
    """The user's function, with errors that name it and its item."""

    def made(item: object) -> Batch:
        try:
            return transform(item)
        # Whatever the user's code raises.
        except Exception as error:
            raise DataError(
                f"transform fails on an item of batches, {_described(item)}: {type(error).__name__}: {error}."
            ) from error

    return made


def _described(item: object) -> str:
    kind = type(item).__name__
    if isinstance(item, Mapping):
        return f"a {kind} of {', '.join(map(str, item))}"
    if isinstance(item, tuple | list):
        return f"a {kind} of {', '.join(type(part).__name__ for part in item[:8])}"
    return f"{kind}{[*item.shape]}" if isinstance(item, Tensor) else f"a {kind}"


def _collated(samples: list[object]) -> Batch:
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        what = next(iter(str(error).splitlines()), repr(error)).rstrip(".")
        raise DataError(
            f"samples of the Dataset make no batch: {what}. Give transform=, which makes inputs of one "
            "shape of each sample, or a DataLoader with a collate_fn of your own."
        ) from error
