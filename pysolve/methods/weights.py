"""Weights that may take another form, and those that are left alone, with the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from pysolve.errors import PysolveError
from pysolve.nn.evaluate import parameters
from pysolve.nn.gathering.recurrent import recurrent_weights
from pysolve.nn.layer_kinds import EMBEDDINGS, WEIGHTED, tied_tables
from pysolve.nn.layers.masking import masks_of, permanent_by
from pysolve.nn.layers.sparse import SparseWeight
from pysolve.nn.running import Ignored, find_matching


@dataclass(frozen=True)
class Skipped:
    """A weight that is left alone: its name, why, and its number of parameters."""

    name: str
    why: str
    params: int


def weight_name(model: nn.Module, name: str) -> str:
    """What the state dict calls the weight of a layer, or a bare parameter."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name
    return f"{name}.weight".lstrip(".")


def weights_of(
    model: nn.Module,
    ignore: Sequence[Ignored] = (),
    kinds: tuple[type[nn.Module], ...] = WEIGHTED,
    *,
    tied: bool = False,
    recurrent: bool = False,
) -> tuple[dict[str, Tensor], list[Skipped]]:
    """Weights of layers of some kinds, by the layers' names, and all other matrices, which are left alone.

    A weight that several layers share is left alone; ``tied``: but not those that heads share with an
    embedding, by whose name they go. ``recurrent``: with those of recurrent layers, by their own names.

    Raises
    ------
    PysolveError
        When weights are masked.
    """
    if masks_of(model):
        raise PysolveError("the network's weights are masked: call remove_masks on it first.")
    ignored, modules = find_matching(model, ignore), dict(model.named_modules())
    owned = [p for module in modules.values() for _, p in module.named_parameters(recurse=False)]
    owners = Counter(map(id, owned))
    pairs = tied_tables(model) if tied else {}
    kept_out = {modules[name] for name in ignored}
    tables = {one: others for one, others in pairs.items() if not kept_out & {one, *others}}
    served = {other for others in tables.values() for other in others}
    gates = recurrent_weights(model) if recurrent else {}
    found: dict[str, Tensor] = {}
    left: list[Skipped] = []
    for name, module in modules.items():
        if name in ignored or isinstance(module, ParametrizationList):
            continue
        own = module._parameters.get("weight")
        if isinstance(module, SparseWeight):
            left.append(Skipped(name, "it is sparse; nn.to_dense changes that", parameters(module)))
            continue
        if is_parametrized(module) or (isinstance(module, (*WEIGHTED, *EMBEDDINGS)) and own is None):
            why = f"its weight is computed from others: {permanent_by(module)}"
            left.append(Skipped(name, why, parameters(module)))
            continue
        for leaf, value in module.named_parameters(recurse=False):
            full = name if leaf == "weight" else f"{name}.{leaf}".lstrip(".")
            if value.ndim < 2 or not value.numel() or not value.is_floating_point():
                continue
            if value is own and module in served:
                continue
            if full in gates and owners[id(value)] == 1:
                found[full] = value
            elif value is not own or not isinstance(module, kinds):
                left.append(Skipped(full, f"a weight of {type(module).__name__}", value.numel()))
            elif owners[id(value)] > 1 and module not in tables:
                share = value.numel() // owners[id(value)]
                left.append(Skipped(full, "another layer shares its weight", share))
            else:
                found[name] = value
    return found, left


def reasons(left: Sequence[Skipped], ignore: Sequence[Ignored] = (), shown: int = 5) -> str:
    """Names of weights that are left alone, and why, to go on after a sentence; "" where there are none."""
    if not left and len(ignore):
        return " that is not to be ignored"
    names = [f"{one.name or 'the network'} ({one.why})" for one in left]
    more = [f"{len(names) - shown} more"] if len(names) > shown else []
    return f": {', '.join([*names[:shown], *more])}" if left else ""
