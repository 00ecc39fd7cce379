"""Scores of attention in heads of fewer dimensions: their scale stays what it was."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Indices
from pysolve.errors import CollapseError
from pysolve.nn.cut.bare import find_member
from pysolve.nn.cut.slicing import Cut
from pysolve.nn.layer_kinds import inputs_first
from pysolve.nn.layers.base import weight_of
from pysolve.nn.running import find_layer
from pysolve.plan import Attention, Collapse, Plan, weight_name


def check_scale(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan whose attributes do not hold the scale of scores, or whose queries take other forms.

    Raises
    ------
    CollapseError
    """
    for step in plan.steps:
        for one in step.site.attention if len(step.removed) else ():
            if one.scale and _scale(model, one)[2] != one.queries.shape[1] ** -0.5:
                raise CollapseError(f"{one.scale} is not the scale of scores in {step.site.name}.")
            if one.scale is not None and weight_name(one.query) in plan.forms:
                raise CollapseError(
                    f"{one.query} makes queries of heads that lose dimensions, which are scaled anew: its "
                    "weight takes no other form in the same plan. Apply one plan after the other."
                )


def keep_scale(network: nn.Module, step: Collapse, cuts: Mapping[str, Cut]) -> None:
    """Multiply narrowed queries by √(d' / d) where the scale of scores follows the size d' of a head."""
    for one in step.site.attention if len(step.removed) else ():
        if one.scale is None:
            continue
        d = one.queries.shape[1]
        now = d * len(step.keep) // step.site.channels
        if one.scale:
            owner, leaf, _ = _scale(network, one)
            setattr(owner, leaf, now**-0.5)
        layer = find_layer(network, one.query)
        kept = next(cut.rows for name, cut in cuts.items() if find_member(network, name) is layer)
        rows = (np.cumsum(kept) - 1)[one.queries[kept[one.queries]]]
        _multiply(weight_of(layer), 1 if inputs_first(layer) else 0, rows, (now / d) ** 0.5)
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            _multiply(bias, 0, rows, (now / d) ** 0.5)


def _scale(network: nn.Module, one: Attention) -> tuple[nn.Module, str, object]:
    """The module and the attribute that hold the scale, and its value."""
    owner, _, leaf = (one.scale or "").rpartition(".")
    layer = find_layer(network, owner)
    return layer, leaf, vars(layer).get(leaf)


def _multiply(values: Tensor, dim: int, places: Indices, factor: float) -> None:
    index = torch.as_tensor(places, device=values.device)
    values.data.index_copy_(dim, index, values.data.index_select(dim, index) * factor)
