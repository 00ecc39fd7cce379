"""``deep_compress``: channels, zeros and bits under one number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import nn

from pysolve.compressed import Compressed
from pysolve.methods.account import Evaluate, scored
from pysolve.methods.coded_layout import LAYOUTS, as_long, in_bytes, with_file
from pysolve.methods.goal import checked
from pysolve.methods.layerwise import study_layers
from pysolve.methods.pipeline import Pipeline
from pysolve.methods.retraining import Length, options_of
from pysolve.methods.subject import Job
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.report.report import Report


def deep_compress(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    target_bytes: float | None = None,
    target_params: float | None = None,
    zeros: float | None = None,
    bits: int | None = None,
    retrain: Length = 0,
    layout: str = "dense",
    ignore: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make the file of a network as small as asked: fewer channels, zeros, few shared values, entropy coding.

    Each stage is left out where nothing asks for it, and all of them compete where only bytes are given.

    1. *Collapse*: channels go, and what is left is refitted, as ``compress`` does it.
    2. *Sparse*: a share of the weights becomes zero, as ``prune`` does it by "obs".
    3. *Shared*: the others take few values, as ``quantize`` does it with a codebook.
    4. *Retrained*: the values, biases and norms, to give the original's outputs, without labels.
    5. *Coded*: in the file that ``save`` writes.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed.
    batches : iterable of batches
        As ``compress`` takes them, unlabelled.
    target_bytes : float, optional
        What the file may take: a number, or a share of the original's tensors. Zeros and values follow from
        one price of a bit for all layers; of several widths that one is taken whose outputs are closest to
        the original's.
    target_params : float, optional
        Parameters after the collapse, a number or a share; 1 leaves all channels. By default searched for
        with ``target_bytes``, and otherwise 1.
    zeros : float, optional
        Share of the weights that is pruned before the rest is quantised; by default none by itself.
    bits : int, optional
        At most 2^bits values a layer; without ``target_bytes``, as many in every layer, by default 16.
    retrain : number of seconds, or options of ``distill``
        Three fifths of the time before weights share values, the rest afterwards.
    layout, ignore, evaluate, divergence, seed, progress
        As ``quantize`` has them.

    Returns
    -------
    Compressed
        Its report has a table of the stages, and under ``file`` what ``save`` writes, to the byte.

    Raises
    ------
    PysolveError
        A target out of reach.

    References
    ----------
    S. Han, H. Mao, W. J. Dally, Deep compression, 2016.
    """
    before, original = checked(model)
    _check(target_bytes, target_params, zeros, bits, retrain, layout)
    if iter(batches) is batches:
        batches = list(batches)
    size = None if target_bytes is None else in_bytes(target_bytes, original)
    job = Job(
        "codebook",
        bits,
        size,
        layout=layout,
        ignore=tuple(ignore),
        divergence=divergence,
        seed=seed,
        progress=progress,
    )
    shared_out = study_layers(original, batches, [], gathered=False, progress=False).calibration
    line = Pipeline(before, original, batches, job, zeros, evaluate, shared_out)
    line.note("original", original, nbytes(original))
    smaller, known = line.collapsed(_share(target_params, parameters(original)))
    asked = {"bytes": target_bytes, "params": target_params}
    told: dict[str, Any] = {
        "target": {what: value for what, value in asked.items() if value is not None} or None,
        "sites": smaller.report.sites if isinstance(smaller, Compressed) and smaller is not before else (),
    }

    def length(report: Report) -> Report:
        report = replace(report, **told, notes=(*line.notes, *report.notes))
        return as_long(report, evaluate is not None)

    smaller = line.pruned(line.taught(smaller, retrain))
    result = replace(line, job=replace(job, told=length)).shared(smaller, known, retrain)
    report = replace(result.report, **told, notes=(*line.notes, *result.report.notes))
    report = scored(report, original, result.model, evaluate)
    result = with_file(replace(result, report=report), original)
    line.note("coded", result.model, result.report.after["file"])
    return replace(result, report=replace(result.report, stages=tuple(line.stages)))


def _share(number: float | None, whole: int) -> float | None:
    """A number above 1 as a share of the whole."""
    return number if number is None or number <= 1 else number / whole


def _check(
    target_bytes: Any, target_params: Any, zeros: Any, bits: Any, retrain: Length, layout: str
) -> None:
    """What can be told to be wrong before any work."""
    given = {"target_bytes": target_bytes, "target_params": target_params, "zeros": zeros}
    if all(value is None for value in (*given.values(), bits)):
        raise ValueError(
            f"give one of {', '.join(given)} and bits: nothing says how small the file is to be."
        )
    for name, value in given.items():
        if value is not None and not (isinstance(value, Real) and 0 < float(value) < np.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    if zeros is not None and zeros >= 1:
        raise ValueError(f"zeros must be a share below 1, got {zeros}.")
    if bits is not None and (
        isinstance(bits, bool) or not isinstance(bits, Integral) or not 1 <= int(bits) <= 8
    ):
        raise ValueError(f"bits must be a whole number of 1 … 8, got {bits!r}.")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if retrain:
        options_of(retrain)
