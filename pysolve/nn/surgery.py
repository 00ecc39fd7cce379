"""Plans to smaller networks: a copy whose layers are really narrower, checked before and after the cut."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pysolve.errors import CollapseError
from pysolve.nn.network import find_layer
from pysolve.nn.verify import mismatch
from pysolve.plan import Collapse, Plan


def apply(model: nn.Module, plan: Plan, *, probe: Any = None) -> nn.Module:
    """Make the smaller network that a plan describes; the original is never changed.

    Writers lose the rows of the channels that go, readers the columns; a reader with new weights or biases
    in the plan takes those. A step handles one Linear writer and one Linear reader with only elementwise
    layers between. All steps speak of the original network, so a layer may read one site and write another.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
    probe : one batch, optional
        A tensor, a tuple or list whose first item is the input, or a mapping of keyword arguments. The
        smaller network must give the same outputs on it as ``masked(model, plan)``, to 1e-4 of the largest
        output in float32 (1e-10 in float64, 0.05 in half precisions); if not, CollapseError.

    Returns
    -------
    nn.Module
        A copy with narrower layers: data types, devices, modes and ``requires_grad`` as they were.
    """
    _check_plan(model, plan)
    smaller = copy.deepcopy(model)
    # Readers first: their new weights have all the rows that they may then lose as writers.
    for step in plan.steps:
        for name in step.site.readers:
            _keep_inputs(_linear(smaller, name), step, name)
    for step in plan.steps:
        for name in step.site.writers:
            _keep_outputs(_linear(smaller, name), step)
    if probe is not None:
        _verify(model, smaller, plan, probe)
    return smaller


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy as wide as the original that ignores the channels a plan removes: what ``apply`` must equal.

    Readers get their new weights and biases, with zeros in the columns of the channels that go; writers
    stay as they are.
    """
    _check_plan(model, plan)
    wide = copy.deepcopy(model)
    for step in plan.steps:
        for name in step.site.readers:
            layer = _linear(wide, name)
            kept, bias = _new_values(layer, step, name)
            weight = torch.zeros_like(layer.weight, requires_grad=False)
            weight[:, _index(layer, step)] = kept
            _set(layer, weight, bias)
    return wide


def _keep_inputs(layer: nn.Linear, step: Collapse, name: str) -> None:
    """Narrow a reader to the kept channels."""
    _set(layer, *_new_values(layer, step, name))
    layer.in_features = len(step.keep)


def _keep_outputs(layer: nn.Linear, step: Collapse) -> None:
    """Narrow a writer to the kept channels."""
    keep = _index(layer, step)
    _set(layer, layer.weight.detach()[keep], None if layer.bias is None else layer.bias.detach()[keep])
    layer.out_features = len(step.keep)


def _new_values(layer: nn.Linear, step: Collapse, name: str) -> tuple[Tensor, Tensor | None]:
    """A reader's weight on the kept channels and its bias: the plan's where it has them."""
    weight = _like(step.weights[name], layer.weight) if name in step.weights else None
    if weight is None:
        weight = layer.weight.detach()[:, _index(layer, step)]
    if name in step.biases:
        return weight, _like(step.biases[name], layer.weight)
    return weight, None if layer.bias is None else layer.bias.detach()


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer new parameters, trainable as the old ones were."""
    if bias is not None:
        old = layer.weight if layer.bias is None else layer.bias
        layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)


def _like(values: npt.ArrayLike, parameter: Tensor) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=parameter.dtype, device=parameter.device)


def _index(layer: nn.Linear, step: Collapse) -> Tensor:
    return torch.tensor(step.keep, device=layer.weight.device)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    """A layer that can be narrowed: an ordinary Linear whose parameters are its own."""
    layer = find_layer(model, name)
    if type(layer) is not nn.Linear:
        raise CollapseError(
            f"{name} is a {type(layer).__name__}; only a plain nn.Linear can be narrowed. "
            "Remove parametrisations and wrappers first."
        )
    if not {"weight"} <= {own for own, _ in layer.named_parameters(recurse=False)} <= {"weight", "bias"}:
        raise CollapseError(
            f"the weight of {name} is computed from other parameters (weight norm or a pruning mask): "
            "make it permanent first."
        )
    return layer


def _check_plan(model: nn.Module, plan: Plan) -> None:
    """Everything that can be told without running the network."""
    for role in ("writers", "readers"):
        names = [name for step in plan.steps for name in getattr(step.site, role)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise CollapseError(
                f"{sorted(twice)} appear in several steps as {role}: apply one plan after the other."
            )
    for step in plan.steps:
        _check_step(model, step)


def _check_step(model: nn.Module, step: Collapse) -> None:
    site = step.site
    if len(site.writers) != 1 or len(site.readers) != 1 or site.writers == site.readers:
        raise CollapseError(f"expected one writer and another layer as its one reader, got {site}.")
    if not len(step.keep):
        raise CollapseError(
            f"no channel of {_title(step)} would be left: solve with lam below lam_max(r_xx, r_yx) instead."
        )
    writer, reader = _linear(model, site.writers[0]), _linear(model, site.readers[0])
    if not writer.out_features == reader.in_features == site.channels:
        raise CollapseError(
            f"{_title(step)}: the site has {site.channels} channels, but the writer makes "
            f"{writer.out_features} and the reader reads {reader.in_features}."
        )
    for name in (*site.writers, *site.readers):
        _check_unshared(model, name)
    h, k = reader.out_features, len(step.keep)
    for what, values, shape in (("weights", step.weights, (h, k)), ("biases", step.biases, (h,))):
        for name, value in values.items():
            _check_values(f"new {what} of {name}", value, shape, reader.weight.dtype)


def _check_values(what: str, values: npt.ArrayLike, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rounded = torch.tensor(np.asarray(values), dtype=dtype)
    if rounded.shape != shape:
        raise CollapseError(f"the {what} must have shape {shape}, got {tuple(rounded.shape)}.")
    if not bool(rounded.isfinite().all()):
        raise CollapseError(f"the {what} are not finite in {dtype}.")


def _check_unshared(model: nn.Module, name: str) -> None:
    """Refuse a layer that is called by another name too, or whose parameters another layer uses."""
    layer = find_layer(model, name)
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
    if len(names) > 1:
        raise CollapseError(
            f"{' and '.join(names)} are one layer under several names: it cannot be narrowed."
        )
    # Pointer 0: nothing is stored, on the meta device for example.
    own = {p.data_ptr() for p in layer.parameters()} - {0}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if other.rpartition(".")[0] != name and parameter.data_ptr() in own:
            raise CollapseError(f"{name} shares its values with {other}: untie them before narrowing it.")


def _verify(model: nn.Module, smaller: nn.Module, plan: Plan, probe: Any) -> None:
    """Refuse a result that differs from the masked network, naming the steps that differ on their own."""
    problem = mismatch(masked(model, plan), smaller, probe)
    if problem is None:
        return
    alone = [Plan((step,)) for step in plan.steps]
    guilty = [one.steps[0] for one in alone if mismatch(masked(model, one), apply(model, one), probe)]
    raise CollapseError(
        f"removing channels of {', '.join(map(_title, guilty or plan.steps))} changes more than it should: "
        f"{problem}. Does something between the two layers mix channels (a norm, a softmax), or does another "
        "layer read them?"
    )


def _title(step: Collapse) -> str:
    return f"{'+'.join(step.site.writers)} → {'+'.join(step.site.readers)}"
