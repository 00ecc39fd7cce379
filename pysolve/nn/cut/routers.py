"""Routers that never choose some experts: logits of −∞ in a network that is as wide as before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysolve.correlations import Indices
from pysolve.nn.cut.bare import find_member
from pysolve.nn.cut.slicing import channels_of
from pysolve.nn.graph.export import Graph
from pysolve.nn.overrides import Args, Function, Kwargs, Overriding
from pysolve.plan import Site


def chosen_by_routers(model: nn.Module, keep: Mapping[Site, Indices]) -> dict[str, Indices]:
    """Experts that stay of every router that loses some, by the name of its weight."""
    found = {}
    for site, kept in keep.items():
        if site.router is not None and len(kept) < site.channels:
            name = site.writers[0]
            table = channels_of(site, "writers", name, find_member(model, name))
            found[site.router] = np.sort(table[kept].ravel())
    return found


def router_nodes(graph: Graph, chosen: Mapping[str, Indices]) -> dict[Node, Tensor]:
    """The operators that make the logits of these routers, and the experts that stay."""
    found, own = dict[Node, Tensor](), set(graph.parameters)
    for start, name in graph.parameters.items():
        waiting = [start] if name in chosen else []
        while waiting:
            for user in waiting.pop().users:
                if any(one not in own for one in user.all_input_nodes):
                    found[user] = torch.as_tensor(chosen[name])
                else:
                    own.add(user)
                    waiting.append(user)
    return found


def never_chosen(logits: Tensor, kept: Tensor, experts: int) -> Tensor:
    """Logits of −∞ but for the experts that stay, along the last dimension of as many."""
    dim = next((d for d in reversed(range(logits.ndim)) if logits.shape[d] == experts), None)
    if dim is None:
        return logits
    kept = kept.to(logits.device)
    return torch.full_like(logits, -torch.inf).index_copy(dim, kept, logits.index_select(dim, kept))


@contextmanager
def choosing(
    model: nn.Module, chosen: Mapping[str, Indices], values: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """The network's routers choose among these experts alone, whatever code multiplies with their weights.

    ``values`` are parameters that it runs with in the place of its own.
    """
    if not chosen:
        yield
        return
    own = dict(model.named_parameters(remove_duplicate=False))
    weights = [((values or {}).get(name, own[name]), torch.as_tensor(kept)) for name, kept in chosen.items()]
    with _Choosing(weights):
        yield


def choose_among(network: nn.Module, chosen: Mapping[str, Indices]) -> None:
    """Have a network's routers choose among these experts alone from now on, in place."""
    if not chosen:
        return
    kind = type(network)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        with choosing(self, chosen):
            return kind.forward(self, *args, **kwargs)

    network.__class__ = type(kind.__name__, (kind,), {"forward": forward})


class _Choosing(Overriding):
    """Results of whatever multiplies with some weights lose the logits of experts that go."""

    def __init__(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        # The tensors themselves, so that no other one gets the number of one that was freed.
        self.weights = {id(weight): (weight, kept, len(weight)) for weight, kept in weights}

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        result = func(*args, **kwargs)
        given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        weight = next((self.weights[id(one)] for one in given if id(one) in self.weights), None)
        if weight is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        _, kept, experts = weight
        if any(id(one) not in self.weights and one.is_floating_point() for one in given):
            return never_chosen(result, kept, experts)
        # Casts and transposes of the weight.
        self.weights[id(result)] = (result, kept, experts)
        return result
