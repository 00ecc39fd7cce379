"""Plans to smaller networks: a copy whose layers are really narrower, checked before and after the cut."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pysolve.errors import CollapseError
from pysolve.nn.network import find_layer
from pysolve.nn.slicing import (
    TRANSPOSED,
    WEIGHTED,
    Cut,
    check_cut,
    check_kind,
    inputs,
    narrow,
    outputs,
    silence,
)
from pysolve.nn.verify import mismatch
from pysolve.plan import Collapse, Indices, Plan

_ROLES = ("writers", "passed", "readers")
# Guilty steps that an error names at most; finding each takes about 2 log2(steps) runs of the network.
_NAMED = 5


def apply(model: nn.Module, plan: Plan, *, probe: Any = None) -> nn.Module:
    """Make the smaller network that a plan describes; the original is never changed.

    Takes over the plan's new values; then readers lose the columns of the channels that go, writers and
    passed layers the rows. All steps speak of the original network: a layer may read and write several
    sites, or one site both ways.

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

    Raises
    ------
    CollapseError
        When the plan does not fit the network, or the probe tells the two networks apart.
    """
    cuts, values = _checked(model, plan)
    smaller = _loaded(model, values)
    for name, cut in cuts.items():
        narrow(find_layer(smaller, name), cut)
    if probe is not None:
        _verify(model, smaller, plan, probe)
    return smaller


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy as wide as the original that ignores the channels a plan removes: what ``apply`` must equal.

    The plan's new values are in place, and the weights of all readers are zero for the channels that go;
    writers and passed layers stay as they are.
    """
    cuts, values = _checked(model, plan)
    wide = _loaded(model, values)
    for name, cut in cuts.items():
        if not cut.columns.all():
            silence(find_layer(wide, name), cut.columns)
    return wide


def _loaded(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with new values, in their original shapes."""
    loaded = copy.deepcopy(model)
    state = loaded.state_dict(keep_vars=True)
    for name, value in values.items():
        if name in state:
            state[name].data.copy_(value)
        else:
            layer: Any = find_layer(loaded, name.rpartition(".")[0])
            bias = value.to(device=layer.weight.device, copy=True)
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    return loaded


def _checked(model: nn.Module, plan: Plan) -> tuple[dict[str, Cut], dict[str, Tensor]]:
    """Everything that can be told without running the network: the cuts of all layers, the new values."""
    uses: dict[str, list[tuple[str, Collapse]]] = {}
    for step in plan.steps:
        _check_step(step)
        for role in _ROLES:
            for name in dict.fromkeys(getattr(step.site, role)):
                uses.setdefault(name, []).append((role, step))
    cuts: dict[str, Cut] = {}
    names: dict[nn.Module, str] = {}
    for name, steps in uses.items():
        layer = find_layer(model, name)
        cut = _cut(name, layer, steps)
        first = names.setdefault(layer, name)
        if cuts.setdefault(first, cut) != cut:
            raise CollapseError(
                f"{first} and {name} are one layer under two names, which would lose different channels: "
                "remove the same channels under both."
            )
        check_cut(name, layer, cut)
    values = _values(model, plan)
    _check_untied(model, {*names, *(find_layer(model, name.rpartition(".")[0]) for name in values)})
    return cuts, values


def _check_step(step: Collapse) -> None:
    if step.site.pinned is not None:
        raise CollapseError(f"the channels of {step.site.name} cannot be removed: {step.site.pinned}.")
    if not len(step.keep):
        raise CollapseError(
            f"no channel of {step.site.name} would be left: solve with lam below lam_max(r_xx, r_yx) instead."
        )


def _cut(name: str, layer: nn.Module, uses: list[tuple[str, Collapse]]) -> Cut:
    """What all steps together leave of one layer."""
    for role, _ in uses:
        check_kind(name, layer, role)
    kept = {role: np.ones(inputs(layer) if role == "readers" else outputs(layer), bool) for role in _ROLES}
    named: dict[bool, list[Indices]] = {True: [], False: []}
    for role, step in uses:
        table = _table(step, role, name, len(kept[role]))
        named[role == "readers"].append(table.ravel())
        kept[role][table[step.removed]] = False
    for reads, tables in named.items():
        rows = np.concatenate(tables) if tables else np.zeros(0)
        if len(np.unique(rows)) < len(rows):
            raise CollapseError(
                f"several steps speak of the same {'inputs' if reads else 'outputs'} of {name}: say in the "
                f"sites' {'columns' if reads else 'rows'} which are whose, or apply one plan after the other."
            )
    return Cut(kept["writers"], kept["passed"], kept["readers"])


def _table(step: Collapse, role: str, name: str, width: int) -> Indices:
    """(channels, r) rows or columns of one layer."""
    site = step.site
    try:
        table = site.columns_of(name, width) if role == "readers" else site.rows_of(name, width)
    except ValueError:
        does = {
            "writers": "the writer makes",
            "readers": "the reader reads",
            "passed": "what lies between has",
        }
        raise CollapseError(
            f"{site.name}: the site has {site.channels} channels, but {does[role]} {width} ({name}), "
            f"no multiple: say in the site's {'columns' if role == 'readers' else 'rows'} which are its own."
        ) from None
    if table.size and not 0 <= table.min() <= table.max() < width:
        raise CollapseError(
            f"{site.name}: the site names channels {table.min()} … {table.max()} of {name}, "
            f"which has {width}."
        )
    return table


def _values(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """All new values of a plan, in the shapes and data types that they have in the network."""
    state = model.state_dict(keep_vars=True)
    values: dict[str, Tensor] = {}
    for name, value in _named_values(model, plan):
        if name in values:
            raise CollapseError(f"the plan gives {name} twice, in a step and in its values: give it once.")
        values[name] = _as(f"new value of {name}", value, *_expected(model, state, name))
    return values


def _named_values(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Any]]:
    yield from plan.values.items()
    for step in plan.steps:
        for name, matrix in step.weights.items():
            yield f"{name}.weight", _full_weight(name, find_layer(model, name), step, matrix)
        for name, bias in step.biases.items():
            layer: Any = find_layer(model, name)
            yield f"{name}.bias", _as(f"new biases of {name}", bias, (outputs(layer),), layer.weight.dtype)


def _full_weight(name: str, layer: Any, step: Collapse, matrix: npt.ArrayLike) -> Tensor:
    """A step's new weight of a reader in its original shape, with zeros for the channels that go."""
    columns = _table(step, "readers", name, inputs(layer))
    if columns.size < inputs(layer) or type(layer) in TRANSPOSED or getattr(layer, "groups", 1) > 1:
        raise CollapseError(
            f"new weights of {name} cannot be given in a step, as it has groups, is transposed or reads "
            f"others too: give them as {name}.weight in the plan's values."
        )
    kept, old = columns[step.keep].ravel(), layer.weight.detach()
    given = _as(f"new weights of {name}", matrix, (len(old), len(kept) * old[0, 0].numel()), old.dtype)
    full = torch.zeros(old.shape, dtype=old.dtype)
    full[:, torch.from_numpy(kept)] = given.reshape(len(old), len(kept), *old.shape[2:])
    return full


def _expected(model: nn.Module, state: Mapping[str, Any], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and data type that a new value must have."""
    if isinstance(state.get(name), Tensor):
        return tuple(state[name].shape), state[name].dtype
    layer: Any = dict(model.named_modules(remove_duplicate=False)).get(name.rpartition(".")[0])
    if name.endswith("bias") and type(layer) in WEIGHTED and layer.bias is None:
        return (outputs(layer),), layer.weight.dtype
    close = difflib.get_close_matches(name, state, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.state_dict()."
    raise CollapseError(f"the plan has a new value of {name!r}, which {type(model).__name__} has not: {hint}")


def _as(what: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new value as a tensor, checked."""
    given = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if given.shape != shape:
        raise CollapseError(f"the {what} must have shape {shape}, got {tuple(given.shape)}.")
    rounded = given.to(dtype)
    if not bool((rounded if dtype.is_floating_point else given).isfinite().all()):
        raise CollapseError(f"the {what} are not finite in {dtype}.")
    return rounded


def _check_untied(model: nn.Module, touched: set[nn.Module]) -> None:
    """Refuse to change parameters that another layer uses too."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for prefix, layer in model.named_modules():
        tensors = chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
        for name, tensor in tensors:
            both = (
                owners.setdefault(tensor.data_ptr(), (layer, f"{prefix}.{name}")),
                (layer, f"{prefix}.{name}"),
            )
            # Pointer 0: nothing is stored, on the meta device for example.
            if tensor.data_ptr() and both[0][0] is not layer and not touched.isdisjoint({both[0][0], layer}):
                (_, other), (_, own) = sorted(both, key=lambda owner: owner[0] in touched)
                raise CollapseError(
                    f"{own.rpartition('.')[0]} shares its values with {other}: untie them before changing it."
                )


def _verify(model: nn.Module, smaller: nn.Module, plan: Plan, probe: Any) -> None:
    """Refuse a result that differs from the masked network, naming the steps that make the difference."""
    problem = mismatch(masked(model, plan), smaller, probe)
    if problem is None:
        return
    guilty = [step.site.name for step in islice(_guilty(model, plan, probe), _NAMED + 1)]
    raise CollapseError(
        f"removing channels of {', '.join(guilty[:_NAMED])}{' and others' * (len(guilty) > _NAMED)} changes "
        f"more than it should: {problem}. Does something between the two layers mix channels (a norm, a "
        "softmax), or does another layer read them?"
    )


def _guilty(model: nn.Module, plan: Plan, probe: Any) -> Iterator[Collapse]:
    """The steps of a failing plan that fail without the others, by bisection; all, when only together."""
    middle = len(plan.steps) // 2
    halves = [replace(plan, steps=steps) for steps in (plan.steps[:middle], plan.steps[middle:]) if steps]
    failing = [half for half in halves if len(halves) > 1 and _fails(model, half, probe)]
    if not failing:
        yield from plan.steps
    for half in failing:
        yield from _guilty(model, half, probe)


def _fails(model: nn.Module, plan: Plan, probe: Any) -> bool:
    try:
        return mismatch(masked(model, plan), apply(model, plan), probe) is not None
    except CollapseError:
        # Groups may lose equally many channels only in the whole plan.
        return False
