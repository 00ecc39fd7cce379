"""Training of weights that share few values, to give the original network's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pysolve.nn.network import as_array
from pysolve.nn.sharing import TRAINED, codebooks_of, remove_sharing, share_weights
from pysolve.nn.surgery import apply
from pysolve.quantization.network import Quantized, plan_of, weight_name
from pysolve.training.distill import distill

# Options of ``distill`` unless others are given.
DEFAULTS: dict[str, Any] = {"loss": "mse", "mix": 0.5, "batch_size": 32, "frozen": True}

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
    student = apply(model, plan_of(found))
    books: Any = found.forms
    share_weights(student, books, trained=trained)
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


def options_of(retrain: Length, trained: str = "values") -> tuple[str, dict[str, Any]]:
    """What is trained, and options of ``distill``: seconds alone, or those that are given."""
    if not isinstance(retrain, Mapping):
        return trained, {**DEFAULTS, "seconds": float(retrain)}
    given = {**DEFAULTS, **retrain}
    trained = given.pop("trained", trained)
    if trained not in TRAINED:
        raise ValueError(f"trained must be one of {', '.join(TRAINED)}, got {trained!r}.")
    if len({"seconds", "epochs"} & given.keys()) != 1:
        raise ValueError(f"retrain must name seconds or epochs, one of them, got {dict(retrain)}.")
    return trained, given
