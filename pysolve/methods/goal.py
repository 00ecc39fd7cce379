"""Arguments of ``compress`` and ``sweep``, checked before any of the work begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from pysolve.compressed import Compressed
from pysolve.errors import PysolveError
from pysolve.forms import Sparse
from pysolve.nn.layers.dense import without_sparse
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.plan import Plan, Site
from pysolve.solve.budget import check_targets
from pysolve.solve.selection import select_channels

REFITS = ("sequential", "independent", "none")


def check_model(model: Any) -> None:
    """TypeError unless this is a network; PysolveError where layers of it are whole numbers."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, or what compress returned, got {kind}.")
    whole = [name for name, layer in model.named_modules() if isinstance(layer, QuantWeight)]
    if whole:
        raise PysolveError(
            f"{whole[0] or 'the network'} is a layer of whole numbers, whose weights cannot be changed: call "
            "pysolve.nn.layers.dense.to_dense on the network first."
        )


def checked(model: Any) -> tuple[nn.Module | Compressed, nn.Module]:
    """What is given and its network, after ``check_model``; dense layers with zeros for sparse ones."""
    if not isinstance(model, Compressed):
        check_model(model)
        network = without_sparse(model)
        return network, network
    check_model(model.model)
    plans = [_with_values(plan) for plan in (*model.earlier, model.plan)]
    before = replace(model, model=without_sparse(model.model), plan=plans[-1], earlier=tuple(plans[:-1]))
    return before, before.model


def _with_values(plan: Plan) -> Plan:
    """The plan with dense weights instead of sparse forms."""
    sparse = {name: form for name, form in plan.forms.items() if isinstance(form, Sparse)}
    dense = {name: form.dense() for name, form in sparse.items()}
    forms = {name: form for name, form in plan.forms.items() if name not in sparse}
    return replace(plan, values={**plan.values, **dense}, forms=forms)


def check_goal(target: Any, keep: Any, lam: Any) -> None:
    """One of three ways, or none, to say how small the network shall be."""
    given = [name for name, value in (("target", target), ("keep", keep), ("lam", lam)) if value is not None]
    if len(given) > 1:
        raise ValueError(f"give one of target, keep and lam, got {' and '.join(given)}.")
    if target is not None:
        check_targets(target)
    for name, values in (("keep", keep), ("lam", lam)):
        each = values if isinstance(values, Mapping) else {"": values}
        for writer, value in each.items() if values is not None else ():
            what = f"{name} of {writer}" if writer else name
            _check_positive(what, value)
            if name == "keep" and value > 1 and value != int(value):
                raise ValueError(f"{what} must be a share in (0, 1] or a whole number, got {value}.")


def check_options(
    model: nn.Module,
    select: Any,
    refit: Any,
    distill: Any,
    ignore: Any,
    sites: Any,
    round_to: Any,
    memory: Any,
) -> None:
    """What else can be told to be wrong without running the network."""
    if not isinstance(select, Mapping):
        # A problem of one channel: whether the method exists is checked where it is known.
        select_channels(np.eye(1), np.eye(1), 1, method=select)
    if refit not in REFITS:
        raise ValueError(f"unknown refit {refit!r}; choose one of {', '.join(REFITS)}.")
    _check_distill(model, distill)
    if sites is not None:
        _check_sites(sites, ignore)
    if isinstance(round_to, bool) or not isinstance(round_to, int | np.integer) or round_to < 1:
        raise ValueError(f"round_to must be a whole number of at least 1, got {round_to!r}.")
    if memory is not None:
        _check_positive("memory", memory)


def _check_distill(model: nn.Module, distill: Any) -> None:
    lengths = distill if isinstance(distill, Mapping) else {"seconds": distill}
    if len(lengths) != 1 or not set(lengths) <= {"seconds", "epochs"}:
        raise ValueError(f"distill must name seconds or epochs, one of them, got {dict(lengths)}.")
    ((unit, value),) = lengths.items()
    if not isinstance(distill, Mapping) and value == 0 and not isinstance(value, bool):
        return
    _check_positive(f"distill in {unit}", value)
    if unit == "epochs" and value != int(value):
        raise ValueError(f"distill must be a whole number of epochs, got {value}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "distill trains the parameters that require a gradient, but none does: call "
            "model.requires_grad_(), or leave distill out."
        )


def _check_sites(sites: Any, ignore: Any) -> None:
    strangers = [type(site).__name__ for site in sites if not isinstance(site, Site)]
    if strangers:
        raise TypeError(f"sites must be a list of Site, got a {strangers[0]} in it.")
    if len(ignore):
        raise ValueError("ignore is for sites that are looked for: take what must stay out of sites instead.")


def _check_positive(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{what} must be a number, got {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive and finite, got {value}.")
