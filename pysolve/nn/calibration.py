"""The user's batches, shared out: most samples to fit with, some held back to measure with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysolve.errors import DataError
from pysolve.nn.graph.export import Graph
from pysolve.nn.running import arguments
from pysolve.nn.walk import last_uses

# Of each batch this share is held back, until there are so many samples.
HELD_SHARE, HELD_SAMPLES = 1 / 8, 256


@dataclass(eq=False)
class Calibration:
    """Samples kept at hand while any amount of data streams by.

    Parameters
    ----------
    limit : int
        Samples that may be kept for the refit.
    held : list of batches
        Held back from every fit, to measure the network's outputs on.
    kept : list of batches
        For the refit.
    seen : int
        Samples that were given on to be gathered.
    """

    limit: int
    held: list[Any] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    seen: int = 0

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches less what is held back, keeping what may be kept."""
        room = self.limit
        for batch in batches:
            n = samples_in(batch)
            wanted = min(max(1, int(n * HELD_SHARE)), HELD_SAMPLES - sum(map(samples_in, self.held)))
            back = wanted if n > 1 and wanted > 0 else 0
            if back:
                self.held.append(take(batch, 0, back))
            rest = take(batch, back, n)
            if room > 0:
                self.kept.append(take(rest, 0, min(room, n - back)))
                room -= n - back
            self.seen += n - back
            yield rest
        # Single samples cannot be shared out: the measurements then see what the fits saw.
        self.held = joined(self.held or self.kept[:HELD_SAMPLES])

    @property
    def used(self) -> int:
        """Samples kept for the refit."""
        return sum(map(samples_in, self.kept))


def samples_in(batch: Any) -> int:
    """How many samples a batch holds: the common first dimension of its tensors."""
    sizes = {len(leaf) for leaf in _tensors(batch) if leaf.ndim}
    if len(sizes) != 1:
        raise DataError(
            f"the tensors of a batch must share their first dimension, the samples; got {sorted(sizes)}."
        )
    return sizes.pop()


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples start … stop − 1 of a batch, in the same form; views."""
    args, kwargs = arguments(batch)

    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.ndim else leaf

    return {key: pytree.tree_map(cut, value) for key, value in kwargs.items()} if kwargs else cut(args[0])


def first_samples(batches: list[Any], count: int) -> list[Any]:
    """The first samples of several batches, still in batches."""
    taken = []
    for batch in batches:
        if count > 0:
            taken.append(take(batch, 0, count))
            count -= samples_in(taken[-1])
    return taken


def joined(batches: list[Any]) -> list[Any]:
    """One batch instead of several, if all have the same form and sample shapes; otherwise as they are."""
    flat = [pytree.tree_flatten(arguments(batch)) for batch in batches]
    columns = [*zip(*(leaves for leaves, _ in flat), strict=False)]
    if len({len(leaves) for leaves, _ in flat}) != 1 or not all(map(_alike, columns)):
        return batches
    if any(structure != flat[0][1] for _, structure in flat):
        return batches
    leaves = [torch.cat(column) if _has_samples(column[0]) else column[0] for column in columns]
    args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
    return [kwargs if kwargs else args[0]]


def _alike(values: tuple[Any, ...]) -> bool:
    """Whether values of several batches can become one."""
    first = values[0]
    if not _has_samples(first):
        return all(not _has_samples(value) and bool(value == first) for value in values)
    kinds = {(v.shape[1:], v.dtype, v.device) if _has_samples(v) else None for v in values}
    return len(kinds) == 1


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def traced_samples(graph: Graph) -> int:
    """How many samples the batch had that the graph was traced with."""
    shapes = [node.meta["val"].shape for node in graph.inputs if isinstance(node.meta.get("val"), Tensor)]
    return next((hint(shape[0]) for shape in shapes if len(shape)), 1)


def fits(graph: Graph, batch: Any) -> bool:
    """Whether a batch has the sizes that the network's code has fixed in its graph."""

    def agree(size: Any, traced: Any) -> bool:
        fixed = traced.node.maybe_as_int() if isinstance(traced, torch.SymInt) else traced
        return fixed is None or size == fixed

    return all(
        value.ndim == len(node.meta["val"].shape) and all(map(agree, value.shape, node.meta["val"].shape))
        for node, value in graph.bind(batch).items()
        if isinstance(value, Tensor)
    )


def usable(graph: Graph, batches: list[Any]) -> list[Any]:
    """Batches that can walk through the graph: as they are, or whole ones of the size that its code fixes."""
    if all(fits(graph, batch) for batch in batches):
        return batches
    return [batch for batch in regrouped(batches, traced_samples(graph)) if fits(graph, batch)]


def regrouped(batches: list[Any], size: int) -> list[Any]:
    """The same samples in batches of one size, without what is left at the end."""
    return [
        take(batch, start, start + size)
        for batch in joined(batches)
        for start in range(0, samples_in(batch) - size + 1, size)
    ]


def room_for(graph: Graph, memory: int) -> int:
    """How many samples a walk through the graph in two networks can hold within ``memory`` bytes."""
    return max(1, memory // max(1, 2 * _live_bytes(graph) // traced_samples(graph)))


def free_memory(share: float = 0.5) -> int:
    """A share of the memory that is free now, in bytes; of 2 GiB where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        available = 2**31
    return int(share * available)


def _live_bytes(graph: Graph) -> int:
    """Most bytes of results that are alive at once for the example that was traced; views count too."""
    nodes = list(graph.module.graph.nodes)
    finished, alive, most = last_uses(nodes), 0, 0
    for node in nodes:
        if node not in graph.parameters:
            alive += _bytes(node)
            most = max(most, alive)
        alive -= sum(_bytes(done) for done in finished[node] if done not in graph.parameters)
    return most


def _bytes(node: Node) -> int:
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sum(hint(v.numel()) * v.element_size() for v in values)


def hint(size: Any) -> int:
    """A size as the example had it."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _tensors(batch: Any) -> list[Tensor]:
    args, kwargs = arguments(batch)
    leaves: Mapping[str, Any] = kwargs
    return [leaf for leaf in pytree.tree_leaves((args, dict(leaves))) if isinstance(leaf, Tensor)]
