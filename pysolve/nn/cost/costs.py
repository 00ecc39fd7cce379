"""Networks to cost models: parameters, MACs and bytes at any width of their sites."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
from torch import Tensor, nn

from pysolve.correlations import Array, Indices
from pysolve.errors import PysolveError
from pysolve.nn.cost.counting import by_layer
from pysolve.nn.cost.cut_costs import rest_of
from pysolve.nn.cost.per_sample import Workload, as_workload, sample_calls, sample_calls_and_weights
from pysolve.nn.cut.bare import Bare, Listed, Stack, find_member
from pysolve.nn.cut.slicing import ROLES, Narrowable, channels_of, check_kind, inputs, outputs
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.layer_kinds import CONVOLUTIONS, WEIGHTED, plain
from pysolve.nn.running import Batch, find_layer
from pysolve.plan import EXPERTS, Site
from pysolve.solve.budget import Costs

# Number of a site, role, name, layer, and how many of its channels are one of the site's.
_Use = tuple[int, str, str, Narrowable, int]


def cost_model(
    model: nn.Module,
    sites: Sequence[Site],
    example: Batch | Workload,
    *,
    extra_biases: Collection[str] = (),
    also: Collection[str] = (),
) -> Costs:
    """Count what the network costs, as a function of how many channels each site keeps.

    Exactly the ``parameters``, ``sample_macs`` and ``nbytes`` of the network that ``apply`` makes. Layers
    cost what their widths say; the MACs of all else, such as attention's, are read off networks that are cut.
    Experts take as many MACs however many there are, for each token goes to as many; of code that runs all of
    them for all tokens, that is more than the network with fewer takes.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode, on the example.
    sites : sequence of Site
        One that is pinned costs the same whatever it keeps.
    example : one batch, or Workload
        In the forms that ``gather`` takes; samples lie along the first dimension of its first tensor.
    extra_biases : collection of str
        Linear layers and convolutions that will be given a bias if they have none: counted with their rows,
        but not in what shares refer to.
    also : collection of str
        Further Linear layers, convolutions and matrices in one parameter to list, whatever the sites do.

    Returns
    -------
    Costs

    Raises
    ------
    DataError
        When the network refuses the example.
    CollapseError
        When a site names a layer that cannot be narrowed.
    PysolveError
        When a grouped layer would lose whole groups for one site and parts of them for another, or a tensor
        experts, inputs and outputs.
    """
    uses, extents = _of_experts(list(_uses(model, sites)))
    extra = [find_layer(model, name) for name in extra_biases]
    for name, layer in zip(extra_biases, extra, strict=True):
        check_kind(name, layer, "readers")
    names: dict[Narrowable, str] = {layer: name for _, _, name, layer, _ in uses}
    names |= {layer: name for layer, name in zip(extra, extra_biases, strict=True) if layer not in names}
    names |= {one: name for name in also if (one := find_member(model, name)) not in names}
    layers = [*names]
    rows, columns = _tables(sites, uses, layers)
    out, into = (
        np.array([extents.get((side, layer), width(layer)) for layer in layers], dtype=float)
        for side, width in (("writers", outputs), ("readers", _inputs))
    )
    work = as_workload(example)
    now, weights = sample_calls_and_weights(model, work)
    count = partial(sample_calls, work=work, weights=weights)
    called: dict[object, str] = {module: name for name, module in model.named_modules()}
    first = {layer: called.get(_multiplying(layer), name) for layer, name in names.items()}
    macs = by_layer(now)
    counts = {layer: macs.get(first[layer], 0.0) for layer in layers}
    product, per_output = _coefficients(layers, counts, out, into)

    def explained(kept: Indices) -> dict[str, float]:
        gone = np.array([site.channels for site in sites]) - kept
        found = product[1] * (out - rows @ gone) * (into - columns @ gone)
        return {first[layer]: value for layer, value in zip(layers, found.tolist(), strict=True)}

    rest = rest_of(model, sites, count, now, explained)
    product[1] *= [first[layer] not in rest.modules for layer in layers]
    biases = np.array([_new_bias(layer) if layer in extra else np.zeros(3) for layer in layers])
    biases = biases.reshape(-1, 3).T
    channels = np.array([site.channels for site in sites], dtype=np.intp)
    gradient, hessian = np.zeros((3, len(sites))), np.zeros((3, len(sites), len(sites)))
    gradient[1], hessian[1] = rest.gradient, rest.hessian
    totals = np.array([parameters(model), sum(macs.values()), nbytes(model)], dtype=float)
    totals -= product @ (out * into) + per_output @ out + (gradient + 0.5 * hessian @ channels) @ channels
    return Costs(
        channels=channels,
        outputs=out,
        inputs=into,
        rows=rows,
        columns=columns,
        product=product,
        per_output=per_output + biases,
        per_input=np.zeros_like(product),
        constant=totals,
        added=biases @ out,
        layers=tuple(names.values()),
        gradient=gradient,
        hessian=hessian,
    )


def _uses(model: nn.Module, sites: Sequence[Site]) -> Iterator[_Use]:
    """Site, role, name and layer, for every layer that loses channels with a site."""
    roles: dict[Narrowable, set[bool]] = {}
    for s, site in enumerate(sites):
        for role in ROLES if site.pinned is None else ():
            for name in getattr(site, role):
                layer = find_member(model, name)
                check_kind(name, layer, role)
                roles.setdefault(layer, set()).add(role == "passed")
                if isinstance(layer, nn.Module) and plain(layer) in WEIGHTED and len(roles[layer]) > 1:
                    raise PysolveError(
                        f"{name} passes on the channels of one site and writes or reads those of another, "
                        "which the cost model does not cover: leave out one of the two sites."
                    )
                yield s, role, name, layer, channels_of(site, role, name, layer).shape[1]


def _of_experts(uses: list[_Use]) -> tuple[list[_Use], dict[tuple[str, Narrowable], int]]:
    """Uses with each tensor once, and how wide tensors are that count experts, by role.

    A cost is a product of two sizes: experts are in the place of outputs or inputs, whichever stay whole.
    """
    stacks = [layer for _, _, _, layer, _ in uses if isinstance(layer, Stack)]
    counted = {(one.owner, one.leaf): one for one in stacks if one.order == EXPERTS}
    matrices = {(one.owner, one.leaf): one for one in stacks if one.order != EXPERTS}
    cut = {(role, layer) for _, role, _, layer, _ in uses}
    found, extents = list[_Use](), dict[tuple[str, Narrowable], int]()
    for s, role, name, layer, each in uses:
        key = None if isinstance(layer, nn.Module | Listed) else (layer.owner, layer.leaf)
        if isinstance(layer, Listed):
            extents["writers", layer] = 1
        if isinstance(layer, Bare) and key in counted:
            # Single entries of each expert.
            role, layer = "writers", counted[key]
            extents[role, layer] = layer.values.numel()
        elif isinstance(layer, Stack) and layer.order == EXPERTS:
            if other := matrices.get((layer.owner, layer.leaf)):
                whole = [side for side in ("readers", "writers") if (side, other) not in cut]
                if not whole:
                    raise PysolveError(
                        f"{name} loses experts, inputs and outputs, and the cost model has products of two "
                        "sizes: leave out one of the sites."
                    )
                role = whole[0]
                extents[role, other] = len(layer.values)
                name, layer = f"{name.rpartition(':')[0]}:{other.order}", other
            else:
                extents.setdefault(("readers" if role == "writers" else "writers", layer), 1)
        found.append((s, role, name, layer, each))
    return found, extents


def _tables(sites: Sequence[Site], uses: Sequence[_Use], layers: Sequence[Narrowable]) -> tuple[Array, Array]:
    """(L, S) outputs, and inputs of each group, that belong to one channel of a site."""
    rows, columns = np.zeros((2, len(layers), len(sites)))
    for s, role, _, layer, each in uses:
        if role == "readers":
            columns[layers.index(layer), s] = each / _groups(layer)
        else:
            rows[layers.index(layer), s] = each
    return rows, columns


def _coefficients(
    layers: Sequence[Narrowable], counts: Mapping[Narrowable, float], widths: Array, depths: Array
) -> tuple[Array, Array]:
    """(3, L) costs for each pair of an output and an input of its group, and for each output alone."""
    product, per_output = np.zeros((2, len(layers), 3))
    # What a layer holds beside its weight may be counted by itself.
    shared = {id(layer.values) for layer in layers if isinstance(layer, Bare | Stack)}
    for layer, pair, single, out, into in zip(layers, product, per_output, widths, depths, strict=True):
        if isinstance(layer, Bare):
            single += layer.costs / out
            continue
        if isinstance(layer, Listed):
            pair += layer.costs / (out * into)
            continue
        if isinstance(layer, Stack):
            entries = float(layer.values.numel() * isinstance(layer.values, nn.Parameter))
            macs = counts[layer] if _multiplying(layer) is not layer else 0.0
            pair += np.array([entries, macs, layer.values.nbytes]) / (out * into)
            continue
        for name, tensor in layer.state_dict(keep_vars=True).items():
            # What layers share is there, and goes, once.
            once = float(id(tensor) not in shared)
            shared.add(id(tensor))
            entries = once * tensor.numel() if isinstance(tensor, nn.Parameter) else 0.0
            if name == "weight" and out * into:
                pair += np.array([entries, counts[layer], once * tensor.nbytes]) / (out * into)
            elif tensor.ndim and out and tensor.shape[-1] == out:
                single += np.array([entries, 0.0, once * tensor.nbytes]) / out
    return product.T, per_output.T


def _multiplying(layer: Narrowable) -> object:
    """The module whose MACs are those of a layer, or of a router's own weight."""
    router = isinstance(layer, Stack) and layer.order == EXPERTS and layer.values.ndim == 2
    return layer.owner if router and isinstance(layer, Stack) and layer.leaf == "weight" else layer


def _new_bias(layer: nn.Module) -> Array:
    """(3,) costs for each output of the bias that a layer does not have."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return np.array([1.0, 0.0, weight.itemsize]) * (bias is None)


def _inputs(layer: Narrowable) -> int:
    """Inputs of one group of a Linear or a convolution; 0 of other layers."""
    return inputs(layer) // _groups(layer)


def _groups(layer: Narrowable) -> int:
    convolves = isinstance(layer, nn.Module) and plain(layer) in CONVOLUTIONS
    return cast(nn.Conv2d, layer).groups if convolves else 1
