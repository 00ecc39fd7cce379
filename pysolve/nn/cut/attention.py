"""Torch's attention opened for a plan that names its projections, and closed again where it can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray
from pysolve.nn.layers.attention import (
    PROJECTIONS,
    Attention,
    has_opened,
    openable,
    opened,
    together,
    use_nested,
    with_layers,
)
from pysolve.nn.running import as_array, as_tensor
from pysolve.plan import Plan, tensor_name


def opened_for(model: nn.Module, plan: Plan) -> nn.Module:
    """The network with a layer for each projection that a plan names; itself where that is none."""
    return opened(model, asked) if (asked := attention_of(plan)) else model


def attention_of(plan: Plan) -> set[str]:
    """Modules whose projections of queries, keys or values a plan names."""
    names = chain(_cut(plan), plan.values, plan.untied)
    parts = [name.partition(":")[0].split(".") for name in names]
    return {".".join(one[:i]) for one in parts for i, part in enumerate(one) if part in PROJECTIONS}


def closed(network: nn.Module, given: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """The network, and its plan, with torch's own attention where a plan brings it nothing but values.

    Parameters
    ----------
    network : nn.Module
        What the plan makes of the given network; its parameters are shared.
    given : nn.Module
    plan : Plan
    """
    # Modules behind those that go have other names.
    if any(not len(step.keep) or step.site.router is not None for step in plan.steps):
        return network, plan
    cut = [f"{name.partition(':')[0]}." for name in _cut(plan)]
    found = dict[nn.Module, nn.Module]()
    for name, like in openable(given).items():
        attention = _fitting(network, name, like)
        if attention is not None and not any(one.startswith(f"{name}.".lstrip(".")) for one in cut):
            found[attention] = together(attention, like)
            plan = _with_fused(plan, name, like)
    if not found:
        return network, plan
    network = with_layers(network, found)
    for path, encoder in given.named_modules():
        if isinstance(encoder, nn.TransformerEncoder):
            own = network.get_submodule(path)
            assert isinstance(own, nn.TransformerEncoder)
            use_nested(own, encoder.use_nested_tensor and not has_opened(own))
    return network, plan


def _cut(plan: Plan) -> Iterator[str]:
    """Layers and tensors that a plan narrows, or gives another form."""
    for step in plan.steps:
        yield from (*step.site.writers, *step.site.readers, *step.site.passed)
    yield from plan.forms


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
