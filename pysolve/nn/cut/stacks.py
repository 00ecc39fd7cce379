"""Matrices in one parameter, such as those of experts, in sites: what is known of their inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from pysolve.correlations import Array, Correlations, Indices
from pysolve.nn.batches.samples import first_samples
from pysolve.nn.cut.bare import Stack, find_member, is_stack
from pysolve.nn.graph.calls import holder, operator_name
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.sizes import usable
from pysolve.nn.refit.walk import Walk, last_uses
from pysolve.nn.running import Batch, as_array, evaluating
from pysolve.plan import Site

# Samples that tell the size of each input.
_SAMPLES = 64
# Stacks that a note names.
_NAMED = 3


def stack_correlations(
    model: nn.Module, graph: Graph | None, batches: Sequence[Batch], sites: Iterable[Site]
) -> dict[str, Correlations]:
    """What stacks that read the channels of sites lose without some of them, as diagonal correlations.

    Each input counts by itself, with Σ x² over all matrices and the mean over these of its weights' squares:
    which matrix takes which row is left aside, and so is what a refit compensates.

    Parameters
    ----------
    model : nn.Module
    graph : Graph, optional
        Without, all inputs are taken for equally large.
    batches : sequence of batches
    sites : iterable of Site

    Returns
    -------
    {reader: Correlations}
    """
    names = {name for name in _matrices_read(sites) if _is_shown(_stack(model, name))}
    if not names:
        return {}
    energies = {}
    if graph is not None:
        energies = _energies(model, graph, usable(graph, first_samples([*batches], _SAMPLES)), names)
    found = {}
    for name in sorted(names):
        stack = _stack(model, name)
        count, squares = energies.get(name, (1, np.ones(stack.inputs)))
        weights, nothing = _norms(stack), np.zeros(stack.inputs)
        products = np.diag(weights * squares)
        found[name] = Correlations(np.diag(squares), products, weights**2 * squares, count, nothing, nothing)
    return found


def stack_notes(sites: Iterable[Site], known: Collection[str] = ()) -> list[str]:
    """What the report says of stacks whose inputs can go, but for parameters of which more is known."""
    names = {name for name in _matrices_read(sites) if name.partition(":")[0] not in known}
    if not names:
        return []
    more = ", …" * (len(names) > _NAMED)
    return [
        f"of the inputs of matrices in one parameter ({', '.join(sorted(names)[:_NAMED])}{more}), those stay "
        "that add most"
    ]


def not_refitted(keep: Mapping[Site, Indices], refitted: Collection[str]) -> tuple[str, ...]:
    """What the report says of stacks that lost inputs and have their old weights for the others."""
    names = _matrices_read(site for site, kept in keep.items() if len(kept) < site.channels)
    names = {name for name in names if name.partition(":")[0] not in refitted}
    more = ", …" * (len(names) > _NAMED)
    return (f"not refitted: {', '.join(sorted(names)[:_NAMED])}{more}",) if names else ()


def _matrices_read(sites: Iterable[Site]) -> set[str]:
    """Matrices in parameters that can lose inputs."""
    free = [site for site in sites if site.pinned is None and site.router is None]
    return {name for site in free for name in site.readers if is_stack(name)}


def _energies(
    model: nn.Module, graph: Graph, batches: Sequence[Batch], names: Iterable[str]
) -> dict[str, tuple[int, Array]]:
    """Rows that stacks read, and Σ x² of each input."""
    paths = {name.partition(":")[0]: name for name in names}
    nodes = [node for node in graph.module.graph.nodes if node.op != "output"]
    walk, finished = Walk(graph, model, batches, {}), last_uses(nodes)
    found: dict[str, tuple[int, Array]] = {}
    with evaluating(model), torch.no_grad():
        for node in nodes if batches else ():
            if node.op != "placeholder":
                reads = [*_reads(graph, paths, node)]
                walk.run_original(node)
                walk.run_compressed(node)
                for name, read in reads:
                    stack = _stack(model, name)
                    for b in walk.batches:
                        value = walk.value(read, b)
                        if stack.gates and stack.leaf.startswith("weight_hh"):
                            made = walk.value(node, b)
                            value = _states(stack, made if isinstance(made, Tensor) else made[0])
                        count, squares = _squares(value, stack.inputs)
                        before = found.get(name, (0, np.zeros(stack.inputs)))
                        found[name] = before[0] + count, before[1] + squares
            walk.forget(finished[node])
    return found


def _is_shown(stack: Stack) -> bool:
    """Whether a graph has what a stack reads: not what recurrent layers hand on inside of a module."""
    owner = stack.owner
    if not stack.gates or not isinstance(owner, nn.RNNBase):
        return True
    shown = 0 if stack.leaf.startswith("weight_ih") else owner.num_layers - 1
    return stack.leaf.removesuffix("_reverse").endswith(f"_l{shown}")


def _states(stack: Stack, made: Tensor) -> Tensor:
    """Hidden units of one direction of what a recurrent layer makes."""
    return made[..., -stack.inputs :] if stack.leaf.endswith("_reverse") else made[..., : stack.inputs]


def _reads(graph: Graph, paths: Mapping[str, str], node: Node) -> Iterator[tuple[str, Node]]:
    """Stacks that an operator multiplies with, and the value that it multiplies."""
    given = node.all_input_nodes
    for one in given:
        name = paths.get(graph.parameters.get(holder(one)[0], ""))
        if name is not None and holder(node)[0] is node and len(given) > 1:
            others = [
                other for other in given if other is not one and holder(other)[0] not in graph.parameters
            ]
            # A bias comes first.
            yield from [(name, others[operator_name(node) == "baddbmm"])] if others else []


def _squares(x: Tensor, width: int) -> tuple[int, Array]:
    """Rows of a value, and Σ x² of each input: the last dimension of the right size."""
    dim = next((dim for dim in reversed(range(x.ndim)) if x.shape[dim] == width), None)
    if dim is None:
        return 0, np.zeros(width)
    rows = x.movedim(dim, -1).reshape(-1, width).double()
    return len(rows), as_array(rows.square().sum(0))


def _norms(stack: Stack) -> Array:
    """(inputs,) root of the mean over matrices of the squares of each input's weights."""
    squares = stack.matrices.double().square()
    return as_array(squares.sum(-2).reshape(-1, stack.inputs).mean(0).sqrt())


def stack_inputs(model: nn.Module, name: str) -> int:
    """Inputs of each matrix."""
    return _stack(model, name).inputs


def _stack(model: nn.Module, name: str) -> Stack:
    found = find_member(model, name)
    assert isinstance(found, Stack)
    return found
