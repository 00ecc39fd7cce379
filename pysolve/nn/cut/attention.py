"""Torch's attention opened for a plan that names its projections, and closed again where it can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray
from pysolve.forms import Codebook
from pysolve.nn.layers.attention import (
    PROJECTIONS,
    Attention,
    adapt,
    openable,
    opened,
    together,
    with_layers,
)
from pysolve.nn.running import as_array, as_tensor
from pysolve.plan import Plan, tensor_name


def opened_for(model: nn.Module, plan: Plan) -> nn.Module:
    """The network with a layer for each projection that a plan names; itself where that is none."""
    return opened(model, asked) if (asked := attention_of(plan)) else model


def attention_of(plan: Plan) -> set[str]:
    """Modules whose projections of queries, keys or values a plan names, or cuts those of their outputs."""
    return {
        *_owners(_cut(plan), (*PROJECTIONS, "out_proj")),
        *_owners((*plan.values, *plan.untied), PROJECTIONS),
    }


def _owners(names: Iterable[str], projections: Sequence[str]) -> Iterator[str]:
    """Modules of which one of these projections is among layers and tensors."""
    for name in names:
        parts = name.partition(":")[0].split(".")
        yield from (".".join(parts[:i]) for i, part in enumerate(parts) if part in projections)


def closed(network: nn.Module, given: nn.Module, studied: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """The network, and its plan, with torch's own attention where a plan brings it nothing but values.

    Parameters
    ----------
    network : nn.Module
        What the plan makes of the given network; its parameters are shared.
    given : nn.Module
    studied : nn.Module
        The given network, with the attention open that the plan may open.
    plan : Plan
    """
    # Modules behind experts that go have other names.
    renamed = any(step.site.router is not None for step in plan.steps)
    cut = [f"{name.partition(':')[0]}." for name in _cut(plan)]
    found, named = dict[nn.Module, nn.Module](), attention_of(plan)
    open_before = {name for name, one in studied.named_modules() if isinstance(one, Attention)}
    for name, like in openable(given).items():
        attention = None if renamed else _fitting(network, name, like)
        if attention is not None and not any(one.startswith(tensor_name(name, "")) for one in cut):
            found[attention] = together(attention, like)
            plan = _with_fused(plan, name, like)
        elif name in open_before - named:
            # What it keeps tells that it is open.
            weight = tensor_name(name, "q_proj.weight")
            plan = replace(plan, values={weight: _queries(like), **plan.values})
    if not found:
        return network, plan
    network = with_layers(network, found)
    layers = dict(network.named_modules())
    for path, like in given.named_modules():
        # Another module stands where a branch has gone as a whole.
        if path in layers:
            adapt(layers[path], like)
    return network, plan


def _cut(plan: Plan) -> Iterator[str]:
    """Layers and tensors that a plan narrows, or gives a form that torch's attention cannot have."""
    for step in plan.steps:
        yield from (*step.site.writers, *step.site.readers, *step.site.passed)
    for name, form in plan.forms.items():
        if not (isinstance(form, Codebook) and name.endswith("out_proj.weight")):
            yield name


def _fitting(network: nn.Module, name: str, like: nn.MultiheadAttention) -> Attention | None:
    """Opened attention of plain layers, with biases where torch's has some."""
    attention = dict(network.named_modules()).get(name)
    if not isinstance(attention, Attention):
        return None
    # Torch's stubs know tensors alone where there may be none.
    biases: tuple[object, ...] = (*[like.in_proj_bias] * len(PROJECTIONS), like.out_proj.bias)
    pairs = zip(attention.children(), biases, strict=True)
    plain = all(type(one) is nn.Linear and (one.bias is None) == (own is None) for one, own in pairs)
    return attention if plain else None


def _queries(layer: nn.MultiheadAttention) -> AnyArray:
    """The weight of its projection of queries."""
    weight: Any = Attention.of(layer).q_proj.weight
    return as_array(weight)


def _with_fused(plan: Plan, name: str, like: nn.MultiheadAttention) -> Plan:
    """The plan with values of torch's own tensors in the place of those of projections."""
    values, before = dict(plan.values), Attention.of(like)

    def taken(layer: str, leaf: str) -> Tensor:
        value: AnyArray | None = values.pop(tensor_name(name, f"{layer}.{leaf}"), None)
        own: Tensor = getattr(getattr(before, layer), leaf)
        return own.detach() if value is None else as_tensor(value).to(own)

    given = {one.removeprefix(tensor_name(name, "")) for one in values}
    for leaf in ("weight", "bias"):
        if not any(f"{one}.{leaf}" in given for one in PROJECTIONS):
            continue
        parts = {one: taken(one, leaf) for one in PROJECTIONS}
        if leaf == "weight" and not like._qkv_same_embed_dim:
            values |= {tensor_name(name, f"{one}_weight"): as_array(part) for one, part in parts.items()}
        else:
            values[tensor_name(name, f"in_proj_{leaf}")] = as_array(torch.cat([*parts.values()]))
    return replace(plan, values=values)
