"""Norms over some of their channels: of a network that is as wide as before, and of one that is narrower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from pysolve.correlations import Indices
from pysolve.errors import CollapseError
from pysolve.nn.cut.bare import find_member
from pysolve.nn.graph.export import Graph
from pysolve.nn.layer_kinds import WHOLE_NORMS
from pysolve.nn.overrides import Args, Function, Kwargs, Overriding
from pysolve.nn.running import find_layer
from pysolve.plan import Norm, Plan, Site, weight_name


class OverKept(nn.Module):
    """A narrowed norm on the channels that stay of a wide value; zero for the others.

    What its own code does besides, such as putting channels last, is done with the wide value.
    """

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, *args: object, **kwargs: object) -> object:
        """What the norm gives."""
        with _Among(self.kept):
            return self.norm(*args, **kwargs)


class _Among(Overriding):
    """Layer norms are over some channels of (…, D) values."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        if func not in (F.layer_norm, torch.layer_norm):
            return func(*args, **kwargs)
        x, *rest = args or [kwargs.pop("input")]
        kept = self.kept.to(x.device)
        made = func(x.index_select(-1, kept), *rest, **kwargs)
        return torch.zeros_like(x).index_copy(-1, kept, made)


def norms_of(model: nn.Module, plan: Plan) -> dict[Norm, float]:
    """How many times as many channels each norm of a plan had.

    Raises
    ------
    CollapseError
        One is no norm over the channels of its site, is cut twice, or passes channels without being named.
    """
    found: dict[str, tuple[Norm, float]] = {}
    state = dict(model.named_parameters(remove_duplicate=False))
    for step in plan.steps:
        named = {norm.weight for norm in step.site.norms}
        for name in step.site.passed:
            if isinstance(find_member(model, name), WHOLE_NORMS) and weight_name(name) not in named:
                what = f"{name} normalises all channels of {step.site.name}"
                raise CollapseError(f"{what}: name it in the norms.")
        for norm in step.site.norms:
            owner, _, leaf = norm.epsilon.rpartition(".")
            layer = find_layer(model, owner)
            value = vars(layer).get(leaf)
            known = type(value) is float or (value is None and isinstance(layer, nn.RMSNorm))
            weight = state.get(norm.weight)
            if norm.weight in found or not known or weight is None or weight.shape != (step.site.channels,):
                raise CollapseError(f"{norm.weight} is no norm over the channels of {step.site.name}.")
            found[norm.weight] = norm, step.site.channels / len(step.keep)
    return {norm: more for norm, more in found.values()}


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
                table = site.rows_of(norm.layer, site.channels)
                found[norm.weight] = table[kept, 0]
    return found


def norm_nodes(graph: Graph, kept: Mapping[str, Indices]) -> dict[Node, Tensor]:
    """The nodes of these norms, and the channels that stay."""
    weights = {node: kept[name] for node, name in graph.parameters.items() if name in kept}
    users = ((user, one) for node, one in weights.items() for user in node.users)
    return {user: torch.as_tensor(one) for user, one in users}


def norm_over(kept: Tensor, args: Args) -> Tensor:
    """A call of a layer norm over some channels, scaled as if the others were zero; zero for these."""
    # Exported graphs of some releases leave out what is the operator's default.
    x, _, weight, bias, epsilon = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
    kept = kept.to(x.device)
    more = x.shape[-1] / len(kept)
    own = None if bias is None else bias.index_select(0, kept)
    gain = weight.index_select(0, kept) * more**0.5
    made: Tensor = F.layer_norm(x.index_select(-1, kept), (len(kept),), gain, own, epsilon * more)
    return torch.zeros_like(x).index_copy(-1, kept, made)
