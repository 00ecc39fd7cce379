"""What is looked up in embeddings while a network runs, and what errors there mean to its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.functional import embedding

from pysolve.correlations import Array
from pysolve.nn.batches.padding import Masks, token_masks, without_padding, zero_padding
from pysolve.nn.gathering.watching import check_visible
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.sizes import fits
from pysolve.nn.outputs import main_output
from pysolve.nn.overrides import Args, Function, Kwargs, Overriding
from pysolve.nn.refit.walk import Walk
from pysolve.nn.running import Batch, device_of, evaluating, forward, same_draws
from pysolve.nn.sensitivity import by_offsets, without_mean

# Called with the name of a table, the rows that are looked up, and what is found; what it returns, if
# anything, takes the place of that.
Record = Callable[[str, Tensor, Tensor], Tensor | None]


class _Lookups(Overriding):
    """Records what is looked up in some tables, whatever the code around it does."""

    def __init__(self, tables: Mapping[str, Tensor], record: Record) -> None:
        super().__init__()
        self.names = {table.data_ptr(): name for name, table in tables.items()}
        self.record = record

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        result = func(*args, **kwargs)
        if func is not embedding:
            return result
        ids, table = (*args, *(kwargs[key] for key in ("input", "weight") if key in kwargs))[:2]
        name = self.names.get(table.data_ptr())
        if name is None:
            return result
        check_visible(name, ids, result)
        changed = self.record(name, ids, result)
        return result if changed is None else changed


def lookup_counts(
    model: nn.Module, graph: Graph | None, tables: Mapping[str, Tensor], batches: Iterable[Batch]
) -> dict[str, Array]:
    """(V,) how often each row of each table is looked up for real tokens.

    Where the graph takes a batch, nothing runs but what leads to the rows' numbers.
    """
    graph = graph if graph is not None and _shows(graph, model, tables) else None
    found = {name: np.zeros(len(table)) for name, table in tables.items()}
    masks: Masks = {}

    def count(name: str, ids: Tensor, _: Tensor | None = None) -> None:
        mask = masks.get(tuple(ids.shape))
        real = ids.flatten() if mask is None else ids[mask.to(ids.device)]
        found[name] += np.bincount(real.cpu().numpy(), minlength=len(found[name]))

    with evaluating(model), same_draws(model):
        for batch in batches:
            masks = token_masks(batch)
            if graph is not None and fits(graph, batch):
                for name, ids in _looked_up(graph, model, tables, batch):
                    count(name, ids)
                continue
            with _Lookups(tables, count):
                forward(model, batch, device_of(model))
    return found


def _shows(graph: Graph, model: nn.Module, tables: Mapping[str, Tensor]) -> bool:
    """Whether all that reads these tables is an operator of the graph, none a block, as of autocast."""
    walk, places = Walk(graph, model, [], {}), {table.data_ptr() for table in tables.values()}
    own = [node for node in graph.parameters if walk.fixed[node].data_ptr() in places]
    return all(isinstance(user.target, OpOverload) for node in own for user in node.users)


def _looked_up(
    graph: Graph, model: nn.Module, tables: Mapping[str, Tensor], batch: Batch
) -> Iterator[tuple[str, Tensor]]:
    """Names of tables, and which of their rows a batch looks up."""
    walk, names = Walk(graph, model, [batch], {}), {table.data_ptr(): name for name, table in tables.items()}
    own = {node: names.get(walk.original_value(node, 0).data_ptr()) for node in graph.parameters}
    nodes = [*graph.module.graph.nodes]
    asked = [(own.get(n.args[0]), n.args[1]) for n in nodes if n.target is torch.ops.aten.embedding.default]
    wanted = [(name, ids) for name, ids in asked if name is not None]
    needed = {ids for _, ids in wanted}
    for node in reversed(nodes):
        needed.update(node.all_input_nodes if node in needed else ())
    for node in nodes:
        if node in needed and node.op != "placeholder" and node not in walk.fixed:
            walk.run_original(node)
            walk.run_compressed(node)
    yield from ((name, walk.original_value(ids, 0)) for name, ids in wanted)


def lookup_sensitivities(
    model: nn.Module,
    tables: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    probes: int,
    seed: int = 0,
) -> dict[str, Array]:
    """(D, D) E[Jᵀ J] of what is looked up, J the derivative of the network's outputs by it.

    As ``sensitivities`` has it, but in the outputs' own units; zero where no gradient is known.
    """
    sums = {name: np.zeros((table.shape[1],) * 2) for name, table in tables.items()}
    counts = dict.fromkeys(tables, 0)
    random = torch.Generator().manual_seed(seed)
    offsets: list[tuple[str, Tensor]] = []
    looked_up = _Lookups(tables, partial(_offset, offsets))
    with evaluating(model), same_draws(model), torch.enable_grad(), looked_up:
        for batch in batches:
            offsets.clear()
            result = main_output(forward(model, batch, device_of(model)))
            for _ in range(probes if result.requires_grad and offsets else 0):
                signs = torch.randint(0, 2, result.shape, generator=random).to(result) * 2 - 1
                try:
                    direction = zero_padding(without_mean(signs), batch)
                    found = by_offsets(result, offsets, direction, again=True)
                except RuntimeError:
                    # A tensor that the gradient needs was changed in place.
                    return {name: np.zeros_like(one) for name, one in sums.items()}
                for name, gradient in found:
                    rows = without_padding(gradient, batch).flatten(0, -2).double()
                    sums[name] += (rows.T @ rows).cpu().numpy()
                    counts[name] += len(rows)
    return {name: one / max(1, counts[name]) for name, one in sums.items()}


def _offset(offsets: list[tuple[str, Tensor]], name: str, _: Tensor, found: Tensor) -> Tensor:
    """Record that adds zeros to what is looked up; their gradient is that of it."""
    offset = torch.zeros_like(found).requires_grad_()
    offsets.append((name, offset))
    return found.detach() + offset
