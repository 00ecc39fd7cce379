"""New parameters and buffers that a plan brings: checked against a network, and put into a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Array
from pysolve.errors import CollapseError
from pysolve.nn.cut.slicing import channels_of, inputs, outputs
from pysolve.nn.layer_kinds import WEIGHTED, inputs_first, plain
from pysolve.nn.layers.base import weight_of
from pysolve.nn.running import closest, find_layer
from pysolve.plan import Collapse, Plan, tensor_name, weight_name


def new_values(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """All new values of a plan by state-dict name, in the shapes and data types of the network's own.

    Those of its steps are among them, with zeros in the weights for the removed channels. CollapseError when
    the network has no such value, or one of another shape; when a value is not finite in its data type; when
    two values are given for one parameter.
    """
    state = model.state_dict(keep_vars=True)
    values: dict[str, Tensor] = {}
    places: dict[tuple[nn.Module, str], str] = {}
    for name, value in _given(model, plan):
        shape, dtype = _expected(model, state, name)
        owner, _, leaf = name.rpartition(".")
        tensor = checked(f"new value of {name}", value, shape, dtype)
        first = places.setdefault((find_layer(model, owner), leaf), name)
        if first in values and not torch.equal(values[first], tensor):
            both = name if first == name else f"{first} and {name}, which are one tensor"
            raise CollapseError(f"the plan gives two different values for {both}: give one.")
        values[name] = tensor
    return values


def load(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put new values in place; a bias that a layer does not have yet trains as its weight does."""
    state = model.state_dict(keep_vars=True)
    for name, value in values.items():
        if name in state:
            state[name].data.copy_(value)
        else:
            layer = find_layer(model, name.rpartition(".")[0])
            weight = weight_of(layer)
            bias = value.to(device=weight.device, copy=True)
            layer.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _given(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor | AnyArray]]:
    """Names and new values, those of the steps in the shapes of the original network."""
    yield from plan.values.items()
    for step in plan.steps:
        for name, matrix in step.weights.items():
            yield weight_name(name), _full_weight(name, find_layer(model, name), step, matrix)
        for name, bias in step.biases.items():
            layer = find_layer(model, name)
            new = checked(f"new biases of {name}", bias, (outputs(layer),), weight_of(layer).dtype)
            yield tensor_name(name, "bias"), new


def _full_weight(name: str, layer: nn.Module, step: Collapse, matrix: Array) -> Tensor:
    """A step's new weight of a reader in its original shape, with zeros for the removed channels."""
    columns = channels_of(step.site, "readers", name, layer)
    if columns.size < inputs(layer) or inputs_first(layer) or getattr(layer, "groups", 1) > 1:
        raise CollapseError(
            f"new weights of {name} cannot be given in a step, as it has groups, is transposed or reads "
            f"other channels too: give {name}.weight in the plan's values."
        )
    kept, old = columns[step.keep].ravel(), weight_of(layer).detach()
    shape = (len(old), len(kept) * old[0, 0].numel())
    given = checked(f"new weights of {name}", matrix, shape, old.dtype)
    full = torch.zeros(old.shape, dtype=old.dtype)
    full[:, torch.from_numpy(kept)] = given.reshape(len(old), len(kept), *old.shape[2:])
    return full


def _expected(
    model: nn.Module, state: Mapping[str, object], name: str
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and data type that a new value must have."""
    own = state.get(name)
    if isinstance(own, Tensor):
        return tuple(own.shape), own.dtype
    owner, _, leaf = name.rpartition(".")
    layer = dict(model.named_modules(remove_duplicate=False)).get(owner)
    if leaf == "bias" and isinstance(layer, WEIGHTED) and plain(layer) in WEIGHTED and layer.bias is None:
        return (outputs(layer),), layer.weight.dtype
    meant = closest(name, state, "see model.state_dict().")
    raise CollapseError(f"{type(model).__name__} has no {name!r} that could get new values: {meant}")


def checked(what: str, value: Tensor | npt.ArrayLike, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new value in the wanted data type; CollapseError where shape or numbers do not fit."""
    given = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if given.shape != shape:
        raise CollapseError(f"the {what} must have shape {shape}, got {tuple(given.shape)}.")
    rounded = given.to(dtype)
    # The two extremes are NaN where any number is; they need no second array as large as the weight.
    numbers = rounded if dtype.is_floating_point else given
    if numbers.numel() and not bool(torch.stack(numbers.aminmax()).isfinite().all()):
        raise CollapseError(f"the {what} are not finite in {dtype}.")
    return rounded
