"""What a plan takes from each layer of a network, and from the integers that count its channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
from torch import Tensor, nn

from pysolve.correlations import Mask
from pysolve.errors import CollapseError
from pysolve.nn.cut.bare import find_member, forms_of_member
from pysolve.nn.cut.slicing import (
    ROLES,
    Cut,
    Narrowable,
    channels_of,
    check_cut,
    check_kind,
    inputs,
    numbered,
    outputs,
)
from pysolve.nn.layer_kinds import sides, twins
from pysolve.nn.layers.base import weight_of
from pysolve.nn.running import find_layer
from pysolve.plan import Collapse, Indices, Plan


def cuts_of_plan(model: nn.Module, plan: Plan) -> dict[str, Cut]:
    """The kept channels of each layer after all steps, under the first name of a layer that has several."""
    uses: dict[str, list[tuple[str, Collapse]]] = {}
    for step in plan.steps:
        for role in ROLES:
            for name in dict.fromkeys(getattr(step.site, role)):
                uses.setdefault(name, []).append((role, step))
    cuts: dict[str, Cut] = {}
    names: dict[Narrowable, str] = {}
    for name, steps in uses.items():
        layer = find_member(model, name)
        cut = _cut(name, layer, steps)
        check_cut(name, layer, cut)
        first = names.setdefault(layer, name)
        if cuts.setdefault(first, cut) != cut:
            raise CollapseError(
                f"{first} and {name} are one layer under two names, which would lose different channels: "
                "remove the same channels under both."
            )
    return cuts


def by_member(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[Narrowable, Cut]:
    """Cuts by the layers themselves, and by matrices in parameters of the network's own."""
    return {find_member(model, name): cut for name, cut in cuts.items()}


def numbered_in(model: nn.Module, tensor: str, cuts: Mapping[Narrowable, Cut]) -> nn.Module | None:
    """``numbered`` of what a tensor is cut with, its layer or itself; None where it stays whole."""
    owner, _, leaf = tensor.rpartition(".")
    layer = find_layer(model, owner)
    cut = next((one for one in (layer, *forms_of_member(layer, leaf)) if one in cuts), None)
    return None if cut is None else numbered(cut, cuts[cut])


def kept_entries(model: nn.Module, plan: Plan, names: Iterable[str]) -> dict[str, Tensor]:
    """Flat indices of what a plan's steps leave of tensors, in the shapes that these then have.

    Of those among ``names`` that lose anything.
    """
    members, found = by_member(model, cuts_of_plan(model, plan)), dict[str, Tensor]()
    for name in names:
        narrowed = numbered_in(model, name, members)
        if narrowed is not None:
            found[name] = getattr(narrowed, name.rpartition(".")[2]).detach().long().cpu()
    return found


def counted(model: nn.Module, plan: Plan) -> dict[str, int]:
    """New values of the integers that count channels; CollapseError where they do not count these now."""
    values: dict[str, int] = {}
    for step in plan.steps:
        for path, each in step.site.integers.items():
            owner, leaf, position = attribute(path)
            value = vars(find_layer(model, owner)).get(leaf)
            if position is not None:
                value = value[position] if type(value) is tuple and position < len(value) else None
            if path in values or type(value) is not int or value != each * step.site.channels:
                raise CollapseError(f"{path} does not count the channels of {step.site.name}.")
            values[path] = each * len(step.keep)
    return values


def attribute(path: str) -> tuple[str, str, int | None]:
    """Module, attribute, and position in it where it is a tuple."""
    *owner, leaf = path.split(".")
    position = int(leaf) if owner and leaf.isdecimal() and leaf.isascii() else None
    if position is not None:
        *owner, leaf = owner
    return ".".join(owner), leaf, position


def check_untied(
    model: nn.Module, touched: set[tuple[Narrowable, str]], cuts: Mapping[Narrowable, Cut]
) -> None:
    """Refuse to change parameters that another layer uses too, but for weights that are cut alike in all.

    ``touched`` are layers' named ones, with "" all of them.
    """
    pairs: dict[Narrowable, Sequence[nn.Module]] = {one: others for one, others in twins(model).items()}
    owners: dict[int, dict[Narrowable, str]] = {}
    for prefix, layer in model.named_modules():
        for name, tensor in chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)):
            # Pointer 0: nothing is stored, on the meta device for example.
            if tensor.data_ptr():
                forms = forms_of_member(layer, name)
                user = next((one for one in forms if (one, "") in touched), layer)
                owners.setdefault(tensor.data_ptr(), {}).setdefault(user, f"{prefix}.{name}".strip("."))
    for users in owners.values():
        changed = {u for u, name in users.items() if {(u, ""), (u, name.rpartition(".")[2])} & touched}
        alike = all(_cut_alike(layer, pairs.get(layer, ()), cuts) for layer in users)
        if len(users) > 1 and changed and not (alike and not {(u, "weight") for u in users} & touched):
            own, other = sorted(users, key=lambda layer: layer not in changed)[:2]
            raise CollapseError(
                f"{users[own].rpartition('.')[0]} shares its values with {users[other]}: untie them before "
                "changing one."
            )


def _cut(name: str, layer: Narrowable, uses: list[tuple[str, Collapse]]) -> Cut:
    """The kept channels of one layer."""
    for role, _ in uses:
        check_kind(name, layer, role)
    kept = {role: np.ones(inputs(layer) if role == "readers" else outputs(layer), bool) for role in ROLES}
    tables: dict[str, list[Indices]] = {"rows": [], "columns": []}
    for role, step in uses:
        table = channels_of(step.site, role, name, layer)
        tables["columns" if role == "readers" else "rows"].append(table.ravel())
        kept[role][table[step.removed]] = False
    for what, parts in tables.items():
        if parts and len(np.unique(np.concatenate(parts))) < sum(map(len, parts)):
            raise CollapseError(
                f"several steps cut the same channels of {name}: say in the sites' {what} which are "
                "whose, or apply one plan after the other."
            )
    return Cut(kept["writers"], kept["passed"], kept["readers"])


def _cut_alike(layer: Narrowable, others: Sequence[nn.Module], cuts: Mapping[Narrowable, Cut]) -> bool:
    """Whether a layer keeps the same of its weight as others that share it."""
    if not isinstance(layer, nn.Module) or not others or not all(one in cuts for one in (layer, *others)):
        return False
    first, *rest = (_kept(one, cuts[one]) for one in (layer, *others))
    return all(np.array_equal(a, b) for one in rest for a, b in zip(one, first, strict=True))


def _kept(layer: nn.Module, cut: Cut) -> list[Mask]:
    """Kept rows and columns of a layer's matrix, as it is stored."""
    whole = np.ones(len(weight_of(layer)), bool)
    of = {"writers": cut.rows, "readers": cut.columns, "": whole}
    return [of[role] for role in sides(layer) or ()]
