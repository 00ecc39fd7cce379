"""Processes of a torch.distributed group that work on one network, each with its share of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from pysolve.correlations import Array, Correlations
from pysolve.errors import PysolveError
from pysolve.nn.gathering.sums import Sums
from pysolve.nn.refusal import sentence

T = TypeVar("T")
# Numbers that are summed over processes at once.
CHUNK = 2**24


@dataclass(frozen=True)
class Ranks:
    """The processes of a group; without one, this process alone.

    All of them must make the same calls in the same order. Batches go round: the i-th batch of rank r is
    number i · size + r of all.
    """

    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.group is not None and not (dist.is_available() and isinstance(self.group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a group of this process, as torch.distributed.group.WORLD is and "
                f"new_group gives it, got {type(self.group).__name__}."
            )

    @property
    def rank(self) -> int:
        """The number of this process."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def all(self, value: T) -> list[T]:
        """The values of all processes; tensors on the CPU."""
        if self.size == 1:
            return [value]
        found = [value] * self.size
        with _failures():
            dist.all_gather_object(found, _sent(value), self.group)
        return found

    def first(self, value: T) -> T:
        """The value of the first process; tensors on the CPU."""
        if self.size == 1:
            return value
        found = [_sent(value)]
        with _failures():
            dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    def add_up(self, *arrays: Array) -> None:
        """Sum arrays of float64, which lie in order, over all processes, in their place."""
        if self.size == 1:
            return
        home = self._home()
        for array in arrays:
            for part in torch.split(torch.from_numpy(array).view(-1), CHUNK):
                moved = part.to(home)
                with _failures():
                    dist.all_reduce(moved, group=self.group)
                if moved is not part:
                    part.copy_(moved)

    def counts(self, count: int) -> list[int]:
        """A number of each process."""
        if self.size == 1:
            return [count]
        found = torch.zeros(self.size, dtype=torch.int64, device=self._home())
        found[self.rank] = count
        with _failures():
            dist.all_reduce(found, group=self.group)
        return [int(one) for one in found.tolist()]

    def shared_out(self, count: int, one: Callable[[int], T]) -> list[T]:
        """What a function makes of 0 … count − 1, each in one of the processes."""
        if self.size == 1:
            return [one(i) for i in range(count)]
        parts = self.all([one(i) for i in range(self.rank, count, self.size)])
        return [parts[i % self.size][i // self.size] for i in range(count)]

    def together(
        self, batches: Iterable[T], count: Callable[[T], int]
    ) -> Iterator[tuple[T | None, list[int]]]:
        """Batch after batch, None behind the last, and how many samples each process has in its own.

        Ends when no process has any more; a process that fails on the way ends the others.
        """
        given = iter(batches)
        while True:
            try:
                batch = next(given, None)
                samples = 0 if batch is None else count(batch)
            except BaseException:
                self.counts(_FAILED)
                raise
            counts = self.counts(samples)
            if min(counts) < 0:
                failed = [str(rank) for rank, one in enumerate(counts) if one < 0]
                raise PysolveError(f"process {' and '.join(failed)} of the group failed: see its own error.")
            if not any(counts):
                return
            yield batch, counts

    def check_same(self, what: str, value: object) -> None:
        """PysolveError where processes have different values."""
        found = self.all(value)
        others = [str(rank) for rank, one in enumerate(found) if one != found[0]]
        if others:
            raise PysolveError(
                f"process {' and '.join(others)} of the group has another {what} than process 0: all must "
                "call with the same network and the same arguments."
            )

    def _home(self) -> torch.device:
        """Where tensors are that the group's backend sends."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


# Without a group.
ALONE = Ranks()


def merged(own: Correlations | None, d: int, h: int, group_size: int, ranks: Ranks) -> Correlations | None:
    """Correlations of d inputs and h outputs over all processes; None where none has any."""
    if ranks.size == 1:
        return own
    shapes = {"xx": (d, d), "yx": (h, d), "yy": (h,), "x_sum": (d,), "y_sum": (h,)}
    parts = {part: getattr(own, part) if own else np.zeros(shape) for part, shape in shapes.items()}
    parts["yy"] = np.diag(parts["yy"]).copy() if parts["yy"].ndim == 2 else parts["yy"]
    ranks.add_up(*parts.values())
    count = sum(ranks.counts(own.count if own else 0))
    return Correlations(**parts, count=count, group_size=group_size) if count else None


def summed(
    blocks: Iterable[tuple[tuple[Tensor, ...], Tensor | None]],
    inputs: int,
    outputs: int,
    device: torch.device,
    ranks: Ranks,
) -> Correlations | None:
    """Correlations of blocks of rows, inputs and outputs, over all processes; None where none has any.

    With each block its rows' weights, of mean 1 over all rows, or None.
    """
    sums, given = Sums.zeros(inputs, outputs, device), iter(blocks)
    first = next(given, None)
    if ranks.size > 1:
        # Products are rounded as in one process. Weights have mean 1 over all processes: one shift for all.
        start = ranks.first(None if first is None else sums.start_of(*first[0]))
        if start is not None and first is not None:
            parts, weights = first
            if sums.is_shifted(*parts, weighed=weights is not None):
                sums.start(*start)
    for parts, weights in () if first is None else chain([first], given):
        sums.add(*parts, weights=weights)
    own = sums.correlations(last=True) if sums.count else None
    return merged(own, inputs, outputs, 1, ranks)


_FAILED = -(2**40)


def _sent(value: T) -> T:
    """Tensors of one process's device are none of another's, and views would bring all that they are of."""
    found: T = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), value)
    return found


def of_all_processes(own: Mapping[str, Correlations], ranks: Ranks) -> dict[str, Correlations]:
    """Correlations by layer over all processes, of those that any has."""
    sizes = {name: (one.yx.shape, one.group_size) for name, one in own.items()}
    every = {name: size for part in ranks.all(sizes) for name, size in part.items()}
    found = {name: merged(own.get(name), d, h, size, ranks) for name, ((h, d), size) in sorted(every.items())}
    return {name: one for name, one in found.items() if one is not None}


@contextmanager
def _failures() -> Iterator[None]:
    """One error where another process died, hangs, or left."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise PysolveError(
            f"the processes of the group could not go on: {sentence(error)}. Another one failed, was killed, "
            "or hangs: see its own error, and start all of them again; checkpoints are kept."
        ) from error
