"""Memory: what a call may take, what running a network takes, and passes over the data that fit."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysolve.errors import PysolveError
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.sizes import hint, traced_samples
from pysolve.nn.refit.walk import last_uses, unread


@dataclass(frozen=True)
class Bound:
    """Bytes that a call may take in memory beyond what the process has at its start.

    Parameters
    ----------
    total : int
    start : int
        Bytes of the process when the call began.
    words : str
        The total as it was given.
    """

    total: int
    start: int
    words: str = ""

    @classmethod
    def of(cls, total: int, words: object) -> Bound:
        """From now on."""
        return cls(total, resident(), str(words))

    def left(self) -> int:
        """Bytes that may still be taken, after what is free was given back to the system; 0: none."""
        give_back()
        return max(0, self.total - max(0, resident() - self.start))


def give_back() -> None:
    """Have the C library return free memory, which it keeps otherwise, and counts as the process's."""
    gc.collect()
    # Other systems, and other C libraries, have no such function.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not tell."""
    return _told("/proc/self/status", "VmRSS") or 0


def free_memory(share: float = 0.5) -> int:
    """A share of the memory that is free now, in bytes; of 2 GiB where the system does not tell."""
    return int(share * (_told("/proc/meminfo", "MemAvailable") or 2**31))


def _told(path: str, name: str) -> int | None:
    """Bytes that a file of the system tells under a name."""
    try:
        with open(path) as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
    except (OSError, StopIteration, ValueError):
        return None


def room_for(graph: Graph, memory: int) -> int:
    """How many samples a walk through the graph in two networks can hold within ``memory`` bytes."""
    return max(1, memory // max(1, walk_bytes(graph)))


def walk_bytes(graph: Graph) -> int:
    """Most bytes of results of one sample that are alive at once in a walk through two networks.

    Outputs are there once more when a bias comes to them, but for those that no walk makes.
    """
    *_, output = graph.module.graph.nodes
    unmade = unread(graph)
    more = sum(_bytes(node) for node in output.all_input_nodes if node not in unmade)
    return -(-(2 * _live_bytes(graph, {output, *unmade}) + more) // traced_samples(graph))


def sample_bytes(graph: Graph) -> int:
    """Most bytes of results of one sample that are alive at once in a network."""
    return -(-_live_bytes(graph) // traced_samples(graph))


def traced_bytes(graph: Graph) -> int:
    """Bytes of all results for the example that was traced: what gradients keep, at most."""
    return sum(_bytes(node) for node in graph.module.graph.nodes if node not in graph.parameters)


def output_bytes(graph: Graph) -> int:
    """Bytes of the outputs for the example that was traced."""
    last = next(reversed(graph.module.graph.nodes))
    return sum(map(_bytes, last.all_input_nodes))


def windows(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Consecutive names whose sizes together fit into a room; PysolveError where one alone does not."""
    found: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if size > room:
            raise PysolveError(f"{name} alone takes {in_bytes(size)}, more than the {in_bytes(room)} left.")
        if not found or size > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= size
    return found


def in_bytes(count: float) -> str:
    """A number of bytes in words: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _live_bytes(graph: Graph, without: Collection[Node] = ()) -> int:
    """Most bytes of results that are alive at once for the example that was traced; views count too."""
    free = {*graph.parameters, *without}
    sizes = {node: 0 if node in free else _bytes(node) for node in graph.module.graph.nodes}
    finished, alive, most = last_uses([*sizes]), 0, 0
    for node, size in sizes.items():
        alive += size
        most = max(most, alive)
        alive -= sum(sizes[done] for done in finished[node])
    return most


def _bytes(node: Node) -> int:
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sum(hint(v.numel()) * v.element_size() for v in values)
