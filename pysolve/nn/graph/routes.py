"""Rows that a network chooses by what it computes: two networks need not choose the same ones.

An index is *computed* where whole numbers or truth values come from what parameters have touched: the best k,
an order, a comparison. Rows picked by it are routed, and so is all that is made of them, until they are put
back by an index of the same origin: added up where they came from, or sorted back by the inverse order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysolve.nn.graph.calls import operator_name
from pysolve.nn.graph.export import Graph, is_in_place

_PICKS = {"index", "index_select", "gather", "take_along_dim", "take", "masked_select"}
_PUTS = {
    "index_put",
    "index_add",
    "index_copy",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "masked_scatter",
}
_PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "einsum"}
# Values of the keys are summed up: their order is all the same.
_ATTENTION = "scaled_dot_product_attention"
Origins = frozenset[Node]
_NONE: Origins = frozenset()


@dataclass(frozen=True, eq=False)
class _Marks:
    """What is known of the nodes so far.

    ``touched`` by parameters, ``fed`` by inputs; origins of numbers, empty where these are not ``computed``,
    and of ``routed`` rows.
    """

    touched: set[Node] = field(default_factory=set)
    fed: set[Node] = field(default_factory=set)
    computed: dict[Node, Origins] = field(default_factory=dict)
    routed: dict[Node, Origins] = field(default_factory=dict)

    def numbers(self, nodes: Iterable[Node]) -> Origins:
        return _NONE.union(*(self.computed.get(one, _NONE) for one in nodes))

    def rows(self, nodes: Iterable[Node]) -> Origins:
        return _NONE.union(*(self.routed.get(one, _NONE) for one in nodes))

    def moved(self, source: Node, indices: Iterable[Node]) -> Origins:
        """What has chosen rows once an index picked them, or put them back."""
        chosen, before = self.numbers(indices), self.rows([source])
        if source not in self.fed:
            return before
        return _NONE if before and chosen >= before else before | chosen


def routed(graph: Graph) -> dict[Node, Origins]:
    """Results whose rows another network may choose otherwise, and the computed indices that chose them."""
    marks = _Marks()
    for node in graph.module.graph.nodes:
        value, reads = node.meta.get("val"), node.all_input_nodes
        if not any(isinstance(part, Tensor) for part in pytree.tree_leaves(value)):
            continue
        if node in graph.inputs or any(one in marks.fed for one in reads):
            marks.fed.add(node)
        if (node in graph.parameters and _is_float(node)) or any(one in marks.touched for one in reads):
            marks.touched.add(node)
        if reads and isinstance(value, Tensor) and not _is_float(node):
            marks.computed[node] = _origins_of_numbers(node, marks)
        elif reads:
            if all(one in marks.computed for one in reads):
                # Choices as zeros and ones.
                marks.computed[node] = marks.numbers(reads)
            found = _origins_of_rows(node, marks)
            marks.routed[node] = found or _origin_of_number_of_rows(node, marks)
            if is_in_place(node):
                marks.routed[reads[0]] = marks.routed[node]
    return {node: origins for node, origins in marks.routed.items() if origins}


def _origins_of_numbers(node: Node, marks: _Marks) -> Origins:
    """Where whole numbers come from: themselves, if from what parameters have touched."""
    reads = node.all_input_nodes
    own = any(one in marks.touched and one not in marks.computed for one in reads)
    return marks.numbers(reads) | {node} if own else marks.numbers(reads)


def _origins_of_rows(node: Node, marks: _Marks) -> Origins:
    """What chose the rows of a result."""
    name, (first, *others) = operator_name(node), node.all_input_nodes
    if name in _PICKS:
        return marks.moved(first, others)
    if name in _PUTS:
        indices = [one for one in others if one in marks.computed]
        moved = (marks.moved(one, indices) for one in others if one not in marks.computed)
        return marks.rows([first]).union(*moved)
    if name == _ATTENTION:
        return marks.rows([first])
    if name in _PRODUCTS:
        masks = [one for one in node.all_input_nodes if marks.computed.get(one)]
        return _NONE.union(*(marks.moved(one, masks) for one in node.all_input_nodes if one not in masks))
    return marks.rows(_not_broadcast(node) if name == "mul" else node.all_input_nodes)


def _origin_of_number_of_rows(node: Node, marks: _Marks) -> Origins:
    """The node itself, where it makes as many rows as computed values say in a way that is not known here."""
    known = operator_name(node) in _PICKS or any(map(_depends_on_values, node.all_input_nodes))
    own = _depends_on_values(node) and not known and node in marks.touched
    return frozenset({node}) if own else _NONE


def _depends_on_values(node: Node) -> bool:
    shape = getattr(node.meta.get("val"), "shape", ())
    return any(isinstance(size, torch.SymInt) and size.node.hint is None for size in shape)


def _not_broadcast(node: Node) -> list[Node]:
    """Operands of a product without weights of rows, which are one number for all channels."""
    wide = [one for one in node.all_input_nodes if _last(one) != 1]
    return wide or node.all_input_nodes


def _last(node: Node) -> int | None:
    value = node.meta.get("val")
    last = value.shape[-1] if isinstance(value, Tensor) and value.ndim else 1
    return last if isinstance(last, int) else None


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
