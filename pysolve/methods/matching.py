"""Training of weights that share few values, to give the original network's outputs, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pysolve.errors import one_of
from pysolve.forms import Codebook
from pysolve.methods.layout import plan_of
from pysolve.methods.rate import Subject
from pysolve.methods.rebuild import Rebuilt, forms_of
from pysolve.methods.result import increase
from pysolve.methods.weights import weight_name
from pysolve.nn.cut.apply import apply
from pysolve.nn.layer_kinds import inputs_first
from pysolve.nn.layers.sharing import (
    TRAINED,
    Snapped,
    codebooks_of,
    remove_sharing,
    share_weights,
    shared_of,
    ternary_weights,
)
from pysolve.nn.running import find_layer
from pysolve.training.distill import distill as teach

# Options of ``distill`` unless others are given: for values alone; for weights that may change them, which
# needs batch norms that follow: ternary ResNet-20, 782 steps, 87.4 against 85.9 %.
DEFAULTS: Mapping[str, object] = {"loss": "mse", "mix": 0.5, "batch_size": 32, "frozen": True}
FREE: Mapping[str, object] = {"loss": "mse", "mix": 0.3, "batch_size": 64}
# Share of a layer's largest weight below which it is zero. 0.1 was better than 0.05, as published, and 0.15.
_THRESHOLD = 0.1
WAYS = (*TRAINED, "ternary")


def check_trained(distill: Mapping[str, object]) -> str:
    """What is trained of weights that share values."""
    return one_of("trained", distill.get("trained", "values"), WAYS)


def matched_codes(
    subject: Subject, rebuilt: Rebuilt, teacher: nn.Module, distill: Mapping[str, object]
) -> Rebuilt:
    """The network's new values after training while its weights share theirs; as they were where that harmed.

    Parameters
    ----------
    subject : Subject
    rebuilt : Rebuilt
        With codebooks.
    teacher : nn.Module
        Whose outputs it is to give.
    distill : {option: value}
        Of ``distill``, and "trained".
    """
    study, ternary = subject.study, subject.kind.scheme == "ternary"
    assert study.calibration is not None
    trained = "ternary" if ternary else check_trained(distill)
    given = {name: value for name, value in distill.items() if name != "trained"}
    run = {"seed": study.options.seed, "progress": study.options.progress}
    options = {**run, **(DEFAULTS if trained == "values" else FREE), **given}
    new = _trained(subject, rebuilt, teacher, trained, options)
    old, after = (apply(study.model, plan_of(study, one)) for one in (rebuilt, new))
    rise = increase(teacher, old, after, study.held, study.options.divergence)
    if rise:
        return replace(rebuilt, notes=(*rebuilt.notes, f"training was undone, give it more time: {rise}"))
    return new


def _trained(
    subject: Subject, rebuilt: Rebuilt, teacher: nn.Module, trained: str, options: Mapping[str, object]
) -> Rebuilt:
    study = subject.study
    model, forms = study.model, forms_of(study, rebuilt)
    tensors = {name: weight_name(model, name) for name in rebuilt.chosen.fits}
    tensors = {name: tensor for name, tensor in tensors.items() if name != tensor}
    books = {
        name: book for name, tensor in tensors.items() if isinstance(book := forms.get(tensor), Codebook)
    }
    ternary = [name for name, book in books.items() if trained == "ternary" and len(book.centroids) <= 3]
    free = {name: book for name, book in books.items() if name not in ternary}
    # Three values are found anew while they are trained, from the weights as they were.
    kept = {tensors[name]: book for name, book in free.items()}
    others = {} if ternary else {n: v for n, v in rebuilt.values.items() if n not in kept}
    plan = replace(plan_of(study, replace(rebuilt, values=others), kept))
    student = apply(model, plan)
    share_weights(student, free, trained="both" if ternary else trained)
    ternary_weights(student, ternary, threshold=_THRESHOLD)
    _hold_zeros(student, model)
    teach(student, teacher, study.calibration.kept, **options)  # type: ignore[arg-type, union-attr]
    books = codebooks_of(student)
    remove_sharing(student)
    own = {tensors[name] for name in books}
    before, state = model.state_dict(), student.state_dict()
    values = {n: v for n, v in state.items() if n in own or n not in before or not torch.equal(v, before[n])}
    fits = dict(rebuilt.fits)
    for name, book in books.items():
        layer = find_layer(model, name)
        codes = book.codes.swapaxes(0, 1) if inputs_first(layer) and name in study.layers else book.codes
        flat = book.with_codes(codes.reshape(len(codes), -1))
        fits[name] = replace(fits[name], weight=flat.dense(), form=flat)
    return replace(rebuilt, values={**rebuilt.values, **values}, fits=fits)


def _hold_zeros(student: nn.Module, model: nn.Module) -> None:
    """Keep what is zero in the model, which may have been pruned, zero while codes change."""
    for name, sharing in shared_of(student).items():
        weight = find_layer(model, name).weight
        assert isinstance(weight, Tensor)
        pruned = weight == 0
        if isinstance(sharing, Snapped) and sharing.zero and pruned.any():
            sharing.fixed = pruned
