"""Training of weights that share few values, to give the original network's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pysolve.methods.quantized import Quantized, plan_of, weight_name
from pysolve.nn.apply import apply
from pysolve.nn.layers.sharing import (
    TRAINED,
    Snapped,
    codebooks_of,
    remove_sharing,
    share_weights,
    shared_of,
    ternary_weights,
)
from pysolve.nn.running import as_array, find_layer
from pysolve.training.distill import distill

# Options of ``distill`` unless others are given: for values alone; for weights that may change them, which
# needs batch norms that follow: ternary ResNet-20, 782 steps, 87.4 against 85.9 %.
DEFAULTS: dict[str, Any] = {"loss": "mse", "mix": 0.5, "batch_size": 32, "frozen": True}
FREE: dict[str, Any] = {"loss": "mse", "mix": 0.3, "batch_size": 64}
# Share of a layer's largest weight below which it is zero. 0.1 was better than 0.05, as published, and 0.15.
_THRESHOLD = 0.1
WAYS = (*TRAINED, "ternary")

Length = float | Mapping[str, Any]


def retrained(
    model: nn.Module,
    found: Quantized,
    teacher: nn.Module,
    batches: Any,
    retrain: Length,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Quantized:
    """The network's new values after training while its weights share theirs.

    Parameters
    ----------
    model : nn.Module
        Whose new values they are.
    found : Quantized
        With codebooks.
    teacher : nn.Module
        Whose outputs it is to give.
    batches : as ``distill`` takes them
    retrain : number of seconds, or options of ``distill`` and ``trained``
    seed : int
    progress : bool
    """
    trained, options = options_of(retrain)
    books: Any = found.forms
    ternary = [name for name, book in books.items() if trained == "ternary" and len(book.centroids) <= 3]
    free = {name: book for name, book in books.items() if name not in ternary}
    # Three values are found anew while they are trained, from the weights as they were.
    start = found if not ternary else replace(found, forms=free, values={})
    student = apply(model, plan_of(start))
    share_weights(student, free, trained="both" if ternary else trained)
    ternary_weights(student, ternary, threshold=_THRESHOLD)
    _hold_zeros(student, model)
    distill(student, teacher, batches, **{"seed": seed, "progress": progress, **options})
    books = codebooks_of(student)
    remove_sharing(student)
    own = {weight_name(name) for name in books}
    old, new = model.state_dict(), student.state_dict()
    values = {
        name: as_array(value)
        for name, value in new.items()
        if name not in own and (name not in old or not torch.equal(value, old[name]))
    }
    return Quantized(books, values, found.errors, found.samples)


def _hold_zeros(student: nn.Module, model: nn.Module) -> None:
    """Keep what is zero in the model, which may have been pruned, zero while codes change."""
    for name, sharing in shared_of(student).items():
        pruned: Any = find_layer(model, name).weight == 0
        if isinstance(sharing, Snapped) and sharing.zero and pruned.any():
            sharing.fixed = pruned


def options_of(retrain: Length) -> tuple[str, dict[str, Any]]:
    """What is trained, and options of ``distill``: seconds alone, or those that are given."""
    given = dict(retrain) if isinstance(retrain, Mapping) else {"seconds": float(retrain)}
    trained = given.pop("trained", "values")
    if trained not in WAYS:
        raise ValueError(f"trained must be one of {', '.join(WAYS)}, got {trained!r}.")
    if len({"seconds", "epochs"} & given.keys()) != 1:
        raise ValueError(f"retrain must name seconds or epochs, one of them, got {given}.")
    return trained, {**(DEFAULTS if trained == "values" else FREE), **given}
