"""Labels of channels, unions of them, and the resulting classes.

A label is an integer that stands for one channel of one layer; −1 stands for no channel. Every value of a
network gets a tensor of labels in its own shape. Where labels do not vary along a dimension, that dimension
is a broadcast one (stride 0), so that labels take memory for channels only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.fx import Node

from pysolve.correlations import Indices
from pysolve.plan import Norm

ROLES = ("writers", "passed", "readers", "norms")
# A parameter or buffer, and a size of the values that are made of it.
Blame = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Member:
    """Output channels of a layer that writes or passes channels, or input channels of one that reads them.

    Of a norm over all channels: all of them, by the name of its weight.
    """

    layer: str
    role: str
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Attended:
    """Labels of queries, keys and values that meet: (…, heads, positions, d), keys and values repeated."""

    node: Node
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes of united labels.

    Parameters
    ----------
    members : tuple of Member
        In the order in which the network first uses them.
    roots : (labels,) int array
        Class of each label.
    pinned : {class: str}
        Why its channels cannot be removed.
    first : {class: str}
        First operator that pins these channels or unites several of them.
    blamed : set of (str, int)
        Parameters and buffers that pin channels, and the size along which they meet these.
    grids : {Node: set of classes}
        Views that lay channels out in a grid, and the classes of these.
    norms : {weight: Norm}
        Norms over all channels of a value.
    attended : tuple of Attended
        Attention whose dimensions were followed.
    """

    members: tuple[Member, ...]
    roots: Indices
    pinned: Mapping[int, str]
    first: Mapping[int, str]
    blamed: frozenset[Blame] = frozenset()
    grids: Mapping[Node, set[int]] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)
    attended: tuple[Attended, ...] = ()


@dataclass(frozen=True, eq=False)
class _Remark:
    """A reason about labels; with ``dims`` only about classes that vary along these, where ``among``."""

    labels: Tensor
    reason: str
    pins: bool = True
    dims: tuple[int, ...] = ()
    among: Tensor | None = None
    wildcard: bool = False
    blamed: frozenset[Blame] = frozenset()


class Ledger:
    """Labels, unions and reasons, collected while a network's graph is run."""

    def __init__(self) -> None:
        self.members: dict[tuple[str, str], Member] = {}
        self._sizes: list[int] = []
        self._edges: list[Tensor] = []
        self._remarks: list[_Remark] = []

    def fresh(self, n: int) -> Tensor:
        """(n,) new labels."""
        start = sum(self._sizes)
        self._sizes.append(n)
        return torch.arange(start, start + n)

    def member(self, layer: str, role: str, n: int) -> Tensor:
        """(n,) labels of one side of a layer, the same in every call."""
        key = (layer, role)
        if key not in self.members:
            self.members[key] = Member(layer, role, self.fresh(n))
        return self.members[key].labels

    def unite(self, *values: Tensor, reason: str = "") -> Tensor:
        """Broadcast label tensors against each other and unite labels that meet.

        ``reason`` is for channels of one value that all meet those of another.
        """
        shape = torch.broadcast_shapes(*(v.shape for v in values))  # type: ignore[no-untyped-call]
        result, *others = map(squashed, values)
        for other in others:
            largest = max(result.numel(), other.numel())
            result, other = _broadcast(result, other)
            both = (result >= 0) & (other >= 0)
            if self._join(result, other, both) and result.numel() > largest:
                self._remarks.append(_Remark(result[both], reason, pins=False))
            result = torch.where(result >= 0, result, other)
        return result.expand(shape)

    def mix(self, labels: Tensor, dims: Sequence[int], reason: str, *, wildcard: bool = False) -> Tensor:
        """Unite labels along ``dims``; the result has size 1 along these.

        Labels that are mixed with values of no channel are pinned, unless ``wildcard``.
        """
        if not labels.numel() or not dims:
            return labels
        core = squashed(labels)
        top = core.amax(tuple(dims), keepdim=True)
        spread = top.expand_as(core)
        if self._join(core, spread, core >= 0):
            self._remarks.append(_Remark(top, reason, pins=False))
        if not wildcard and bool(((core < 0) & (spread >= 0)).any()):
            self.pin(top, reason)
        sizes = [1 if dim in {d % labels.ndim for d in dims} else n for dim, n in enumerate(labels.shape)]
        return top.expand(sizes)

    def pin(self, labels: Tensor, reason: str, blamed: Iterable[Blame] = ()) -> None:
        """Mark channels as not removable."""
        if labelled(labels):
            self._remarks.append(_Remark(squashed(labels), reason, blamed=frozenset(blamed)))

    def pin_varying(
        self,
        labels: Tensor,
        dims: Sequence[int],
        reason: str,
        *,
        among: Tensor | None = None,
        wildcard: bool = False,
        blamed: Iterable[Blame] = (),
    ) -> None:
        """Mark channels whose classes turn out to vary along one of ``dims`` as not removable.

        ``among`` narrows this to where it is true; ``wildcard`` says that no channel goes with any.
        """
        core = squashed(labels)
        dims = tuple(d % core.ndim for d in dims if core.shape[d] > 1)
        if dims and labelled(core):
            self._remarks.append(_Remark(core, reason, True, dims, among, wildcard, frozenset(blamed)))

    def resolve(self) -> Classes:
        """Classes of labels after all unions, and the reasons that pin them."""
        roots = self._roots()
        table = torch.from_numpy(roots)
        pinned: dict[int, str] = {}
        first: dict[int, str] = {}
        blamed: set[Blame] = set()
        for remark in self._remarks:
            touched = _touched(remark, table)
            blamed |= remark.blamed if touched else set()
            for root in touched:
                first.setdefault(root, remark.reason)
                if remark.pins:
                    pinned.setdefault(root, remark.reason)
        return Classes(tuple(self.members.values()), roots, pinned, first, frozenset(blamed))

    def _join(self, a: Tensor, b: Tensor, where: Tensor) -> bool:
        """Unite labels at the same places; returns whether any two differed."""
        where = where & (a != b)
        if not bool(where.any()):
            return False
        self._edges.append(torch.stack([a[where], b[where]]))
        return True

    def _roots(self) -> Indices:
        n = sum(self._sizes)
        if not self._edges:
            return np.arange(n)
        a, b = torch.cat(self._edges, 1).numpy()
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.intp)


def none(shape: Sequence[int]) -> Tensor:
    """Labels of a value that has no channels."""
    return torch.full((), -1).expand(tuple(shape))


def labelled(labels: Tensor) -> bool:
    """Whether any element belongs to a channel."""
    return bool((squashed(labels) >= 0).any())


def complete(labels: Tensor) -> bool:
    """Whether every element belongs to a channel."""
    return bool((squashed(labels) >= 0).all())


def squashed(labels: Tensor) -> Tensor:
    """Labels with size 1 along broadcast dimensions."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and not stride:
            labels = labels.narrow(dim, 0, 1)
    return labels


def lean(labels: Tensor) -> Tensor:
    """The same labels, broadcast along every dimension along which they do not vary."""
    core = squashed(labels)
    for dim, size in enumerate(core.shape):
        if size > 1 and bool((core == core.narrow(dim, 0, 1)).all()):
            core = core.narrow(dim, 0, 1)
    return core.expand(labels.shape)


def spread(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """(n,) labels along one dimension of a value of the given shape."""
    sizes = [1] * len(shape)
    sizes[dim] = len(labels)
    return labels.view(sizes).expand(tuple(shape))


def along(labels: Tensor, dim: int) -> Tensor:
    """(n,) labels along one dimension: wherever the others have one."""
    core = squashed(labels.movedim(dim, 0))
    if not core.numel():
        return none(labels.shape[dim : dim + 1])
    return core.reshape(len(core), -1).amax(1).expand(labels.shape[dim])


def _touched(remark: _Remark, table: Tensor) -> list[int]:
    """Classes that a remark applies to, once all unions are known."""
    roots = torch.where(remark.labels >= 0, table[remark.labels.clamp(min=0)], -1)
    where = roots >= 0
    if remark.dims:
        varying = torch.zeros_like(where)
        for dim in remark.dims:
            lowest = torch.where(where, roots, len(table)) if remark.wildcard else roots
            varying = varying | (lowest.amin(dim, keepdim=True) != roots.amax(dim, keepdim=True))
        among = torch.ones((), dtype=torch.bool) if remark.among is None else remark.among
        roots, where, varying, among = _broadcast(roots, where, varying, among)
        where = where & varying & among
    found: list[int] = np.unique(roots[where].numpy()).tolist()
    return found


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.broadcast_tensors(*tensors)  # type: ignore[no-any-return, no-untyped-call]
