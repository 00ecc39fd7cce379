"""Narrowing one layer: which kinds can be narrowed, how wide they are, and the cut itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.correlations import Indices, Mask
from pysolve.errors import CollapseError
from pysolve.nn.cut.bare import Bare, Listed, Stack
from pysolve.nn.layer_kinds import (
    CONVOLUTIONS,
    NORMS,
    PADS,
    WEIGHTED,
    WHOLE_NORMS,
    Turned,
    inputs_first,
    plain,
)
from pysolve.nn.layers.base import weight_of
from pysolve.nn.state import copy_of
from pysolve.plan import Site

_WIDTHS: dict[type[nn.Module], str] = {
    nn.Linear: "out_features",
    Turned: "nf",
    **dict.fromkeys(CONVOLUTIONS, "out_channels"),
    **dict.fromkeys(NORMS, "num_features"),
    nn.GroupNorm: "num_channels",
    **dict.fromkeys(WHOLE_NORMS, "normalized_shape"),
    nn.Embedding: "embedding_dim",
    nn.PReLU: "num_parameters",
}
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "writers": (*WEIGHTED, nn.Embedding),
    "readers": WEIGHTED,
    "passed": (*CONVOLUTIONS, *NORMS, nn.GroupNorm, *WHOLE_NORMS, nn.PReLU, *PADS),
}
ROLES = tuple(_KINDS)
_DOES = {"writers": "the writer makes", "readers": "the reader reads", "passed": "the layer between has"}
# What can be a member of a site.
Narrowable = nn.Module | Bare | Stack | Listed
# Where linear layers hold their numbers of outputs and inputs.
_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    Turned: ("nf", "nx"),
}
# What holds one number a channel in all other layers.
_VECTORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Cut:
    """The kept channels of one layer.

    Parameters
    ----------
    rows, passed : (outputs,) bool arrays
        Outputs that the layer writes, and that it passes on; with the others of these their inputs go, too.
    columns : (inputs,) bool array
    """

    rows: Mask
    passed: Mask
    columns: Mask

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and all(map(np.array_equal, vars(self).values(), vars(other).values()))


def outputs(layer: Narrowable) -> int:
    """Output channels of a layer that can be narrowed; of a padding layer, the channels that it adds."""
    if isinstance(layer, Bare):
        return layer.values.numel()
    if isinstance(layer, Stack):
        return layer.outputs
    if isinstance(layer, Listed):
        return 0
    if plain(layer) in PADS:
        padding, channels = _padding(layer)
        return sum(padding[channels])
    if isinstance(layer, WHOLE_NORMS):
        return int(layer.normalized_shape[-1])
    return int(getattr(layer, _WIDTHS[plain(layer)]))


def inputs(layer: Narrowable) -> int:
    """Input channels of what multiplies; of other layers 0, none that could be cut on their own."""
    if isinstance(layer, Bare):
        return 0
    if isinstance(layer, Stack):
        return layer.inputs
    if isinstance(layer, Listed):
        return len(layer.modules)
    if isinstance(layer, Turned):
        return len(layer.weight)
    name = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    return int(getattr(layer, name)) if plain(layer) in WEIGHTED else 0


def channels_of(site: Site, role: str, name: str, layer: Narrowable) -> Indices:
    """(channels, r) output channels of a layer that belong to a site; for a reader its input channels."""
    what, width = ("columns", inputs(layer)) if role == "readers" else ("rows", outputs(layer))
    try:
        table = (site.columns_of if role == "readers" else site.rows_of)(name, width)
    except ValueError:
        raise CollapseError(
            f"{site.name}: the site has {site.channels} channels, but {_DOES[role]} {width} ({name}), which "
            f"cannot be shared out evenly: say in the site's {what} which of them belong to it."
        ) from None
    if table.size and not 0 <= table.min() <= table.max() < width:
        raise CollapseError(
            f"{site.name}: {what} must lie within 0 … {width - 1} for {name}, got "
            f"{table.min()} … {table.max()}."
        )
    return table


def check_kind(name: str, layer: Narrowable, role: str) -> None:
    """Refuse a layer that cannot be narrowed in a role: ``"writers"``, ``"readers"`` or ``"passed"``."""
    if isinstance(layer, Bare):
        if role != "passed" or (plain(layer.owner) in _WIDTHS and layer.leaf in _VECTORS):
            raise CollapseError(f"{name} is one tensor, not a layer: name its layer instead.")
        return
    if isinstance(layer, Stack):
        if role == "passed":
            raise CollapseError(f"{name} are matrices, which write and read channels but pass none.")
        return
    if isinstance(layer, Listed):
        if role != "readers":
            raise CollapseError(f"{name} are experts in a list, which read what a router chooses.")
        return
    if plain(layer) not in _KINDS[role]:
        raise CollapseError(f"{name} is a {type(layer).__name__}{_remedy(layer, role)}")
    own = {key for key, _ in layer.named_parameters(recurse=False)}
    used = {key for key in ("weight", "bias") if isinstance(getattr(layer, key, None), Tensor)}
    if not used <= own or (plain(layer) in WEIGHTED and "weight" not in own):
        raise CollapseError(
            f"the weight of {name} is computed from other parameters (weight norm or a pruning mask): "
            "make it permanent first."
        )
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise CollapseError(
            f"{name} rescales its rows to max_norm={layer.max_norm}, which mixes channels: renormalise its "
            "weight once and set max_norm to None first."
        )
    padding, channels = _padding(layer) if plain(layer) in PADS else ([0], slice(1))
    if min(padding[channels]) < 0:
        raise CollapseError(f"{name} crops channels with padding {padding}: use slicing instead.")


def check_cut(name: str, layer: Narrowable, cut: Cut) -> None:
    """Refuse a cut that would leave groups of different sizes, or pieces of them."""
    if isinstance(layer, Bare):
        layer.places(cut.passed)
        return
    if isinstance(layer, Stack | Listed):
        return
    groups = getattr(layer, "num_groups", None) or getattr(layer, "groups", None)
    if groups is None:
        return
    passed = cut.passed.reshape(groups, -1)
    whole = passed.all(1)
    if not np.array_equal(whole, passed.any(1)):
        raise CollapseError(
            f"{name} normalises or mixes {passed.shape[1]} output channels at a time, and only whole "
            "groups of them can go: remove all channels of a group together, or none."
        )
    for what, kept in (("output", cut.rows), ("input", cut.columns)):
        left = kept.reshape(groups, -1)[whole].sum(1)
        if kept.size and left.size and left.min() < left.max():
            raise CollapseError(
                f"{name} has {groups} groups, which must all keep equally many {what} channels, got "
                f"{left.min()} to {left.max()}: remove as many from each."
            )


def narrow(layer: Narrowable, cut: Cut) -> None:
    """Cut a layer in place; its parameters and buffers are replaced by narrower ones."""
    if isinstance(layer, Bare):
        layer.narrow(cut.passed)
    elif isinstance(layer, Stack):
        layer.narrow(cut.rows, cut.columns)
    elif isinstance(layer, Listed):
        layer.narrow(cut.columns)
    elif plain(layer) in PADS:
        padding, channels = _padding(layer)
        front, back = np.split(cut.passed, [padding[channels.start]])
        padding[channels] = [int(front.sum()), int(back.sum())]
        layer.__dict__["padding"] = tuple(padding)
    elif plain(layer) in WEIGHTED:
        _narrow_weighted(layer, cut)
    else:
        kept: Mask = cut.rows & cut.passed
        for name in _VECTORS:
            _replace(layer, name, lambda values: values.index_select(-1, _index(kept, values)))
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = int(cut.passed.reshape(layer.num_groups, -1).all(1).sum())
        width = int(kept.sum())
        setattr(layer, _WIDTHS[plain(layer)], (width,) if isinstance(layer, WHOLE_NORMS) else width)


def numbered(layer: Narrowable, cut: Cut) -> nn.Module:
    """A narrowed copy of a layer whose tensors hold the flat indices of their entries in the original's.

    Of a tensor that is no layer's: a module that holds nothing else.
    """
    assert not isinstance(layer, Listed)
    if not isinstance(layer, nn.Module):
        holder, values = nn.Module(), layer.values
        numbers = torch.arange(values.numel(), dtype=torch.float64).reshape(values.shape)
        setattr(holder, layer.leaf, nn.Parameter(numbers, False))
        narrow(replace(layer, owner=holder), cut)
        return holder
    indices: dict[int, Tensor] = {}
    for tensor in chain(layer.parameters(recurse=False), layer.buffers(recurse=False)):
        flat = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        indices[id(tensor)] = nn.Parameter(flat, False) if isinstance(tensor, nn.Parameter) else flat
    # The memo has deepcopy take these in the place of the layer's own.
    copied = copy_of(layer, indices)
    narrow(copied, cut)
    return copied


def silence(layer: Narrowable, columns: Mask) -> None:
    """Set the weight of the removed input channels of what multiplies to zero, in place."""
    assert not isinstance(layer, Bare | Listed)
    if isinstance(layer, Stack):
        layer.values.data.copy_(layer.silenced(None, columns))
        return
    weight, groups = weight_of(layer), getattr(layer, "groups", 1)
    first = weight.detach() if inputs_first(layer) else _swapped(weight.detach(), groups)
    first = first.index_fill(0, _index(~columns, weight), 0)
    weight.data.copy_(first if inputs_first(layer) else _swapped(first, groups))


def muted(layer: Narrowable, kept: Mask) -> dict[str, Tensor]:
    """Tensors of what makes or passes channels, by their names there, with zeros for those that go."""
    assert not isinstance(layer, Listed)
    if isinstance(layer, Bare):
        flat = layer.values.detach().flatten()
        return {layer.leaf: flat.index_fill(0, _index(~kept, flat), 0).reshape(layer.values.shape)}
    if isinstance(layer, Stack):
        return {layer.leaf: layer.silenced(kept, None)}
    weighted = plain(layer) in WEIGHTED
    found = {}
    for leaf in ("weight", "bias", "running_mean"):
        values = getattr(layer, leaf, None)
        if isinstance(values, Tensor):
            # Outputs are a weight's first dimension, but for transposed layers, whose groups share it.
            last = not weighted or leaf != "weight"
            dim = -1 if last else int(inputs_first(layer) and getattr(layer, "groups", 1) == 1)
            found[leaf] = values.detach().index_fill(dim, _index(~kept, values), 0)
    return found


def _narrow_weighted(layer: nn.Module, cut: Cut) -> None:
    groups = getattr(layer, "groups", 1)
    whole = np.asarray(cut.passed.reshape(groups, -1).all(1))
    rows, columns = (
        np.where(whole[:, None], kept.reshape(groups, -1), False) for kept in (cut.rows, cut.columns)
    )
    first, second = (columns, rows) if inputs_first(layer) else (rows, columns)

    def cut_weight(weight: Tensor) -> Tensor:
        weight = weight.index_select(0, _index(first, weight))
        if second[whole].all():
            return weight
        left = int(whole.sum())
        weight = _swapped(weight, left)
        return _swapped(weight.index_select(0, _index(second[whole], weight)), left)

    # A weight and a width that disagree tell nothing of the layer's kind.
    names = _SIZES.get(plain(layer), ("out_channels", "in_channels", "groups"))
    _replace(layer, "weight", cut_weight)
    _replace(layer, "bias", lambda bias: bias.index_select(0, _index(rows, bias)))
    for name, size in zip(names, (rows.sum(), columns.sum(), whole.sum()), strict=False):
        setattr(layer, name, int(size))


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """(groups · a, b, …) to (groups · b, a, …): input channels first instead of output channels, or back."""
    return (
        weight.reshape(groups, len(weight) // max(1, groups), *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    )


def _padding(layer: nn.Module) -> tuple[list[int], slice]:
    """A padding layer's sizes, and where the channels' are: the only ones that are not zero, or the last."""
    assert isinstance(layer, PADS)
    padding = [*layer.padding]
    pairs = [slice(i, i + 2) for i in range(0, len(padding), 2)]
    used = [pair for pair in pairs if any(padding[pair])]
    return padding, used[-1] if used else pairs[-1]


def _replace(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Put a changed parameter or buffer in place of the old one, if there is one."""
    if (old := getattr(layer, name, None)) is not None:
        new = change(old.detach()).contiguous()
        setattr(layer, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _index(kept: Mask, values: Tensor) -> Tensor:
    return torch.tensor(np.flatnonzero(kept), device=values.device)


def _remedy(layer: nn.Module, role: str) -> str:
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return ", part of nn.MultiheadAttention, which must stay as wide as it is: leave its channels alone."
    kinds = ", ".join(kind.__name__ for kind in _KINDS[role])
    layers = "passed layers" if role == "passed" else role
    return (
        f"; {layers} that can be narrowed are exactly {kinds}. Remove parametrisations and wrappers first, "
        "and leave out layers that hold nothing for each channel."
    )
