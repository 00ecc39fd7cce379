"""Norms over some of their channels: of a network that is as wide as before, and of one that is narrower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from pysolve.correlations import Indices
from pysolve.nn.graph.export import Graph
from pysolve.nn.running import find_layer
from pysolve.plan import Norm, Site


class OverKept(nn.Module):
    """A narrowed norm on the channels that stay of a wide value; zero for the others."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) values."""
        kept = self.kept.to(x.device)
        return torch.zeros_like(x).index_copy(-1, kept, self.norm(x.index_select(-1, kept)))


def rescale(network: nn.Module, norm: Norm, more: float) -> None:
    """Give a narrowed norm the gain and the ε that leave its values as they are; ``more``: D / d."""
    owner, _, leaf = norm.epsilon.rpartition(".")
    name, _, part = norm.weight.rpartition(".")
    layer, holder = find_layer(network, owner), find_layer(network, name)
    weight: Tensor = getattr(holder, part).data
    weight.copy_((weight + norm.offset) * more**0.5 - norm.offset)
    value = getattr(layer, leaf)
    setattr(layer, leaf, (torch.finfo(weight.dtype).eps if value is None else value) * more)


def kept_of_norms(keep: Mapping[Site, Indices]) -> dict[str, Indices]:
    """Channels that stay of every centred norm, by the name of its weight."""
    found = {}
    for site, kept in keep.items():
        for norm in site.norms:
            if norm.centred and len(kept) < site.channels:
                table = site.rows_of(norm.weight.removesuffix(".weight"), site.channels)
                found[norm.weight] = table[kept, 0]
    return found


def norm_nodes(graph: Graph, kept: Mapping[str, Indices]) -> dict[Node, Tensor]:
    """The nodes of these norms, and the channels that stay."""
    weights = {node: kept[name] for node, name in graph.parameters.items() if name in kept}
    users = ((user, one) for node, one in weights.items() for user in node.users)
    return {user: torch.as_tensor(one) for user, one in users}


def norm_over(kept: Tensor, args: Sequence[Any]) -> Tensor:
    """A call of a layer norm over some channels, scaled as if the others were zero; zero for these."""
    x, _, weight, bias, epsilon = args[:5]
    kept = kept.to(x.device)
    more = x.shape[-1] / len(kept)
    own = None if bias is None else bias.index_select(0, kept)
    gain = weight.index_select(0, kept) * more**0.5
    made: Tensor = F.layer_norm(x.index_select(-1, kept), (len(kept),), gain, own, epsilon * more)
    return torch.zeros_like(x).index_copy(-1, kept, made)
