"""``quantize``: the weights of a network in few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

from torch import nn

from pysolve.compressed import Compressed
from pysolve.layer.quantize_layer import METHODS
from pysolve.methods.account import scored
from pysolve.methods.coded_layout import LAYOUTS, as_long, in_bytes, with_file
from pysolve.methods.goal import checked
from pysolve.methods.quantizing import carried_out
from pysolve.methods.retraining import Length, options_of
from pysolve.methods.subject import SCHEMES, Job, studied
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.solve.budget import check_targets


def quantize(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None = None,
    *,
    scheme: str = "int8-dynamic",
    bits: int | None = None,
    target: Mapping[str, float] | None = None,
    group: int | None = None,
    method: str = "feedback",
    retrain: Length = 0,
    layout: str = "dense",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Store the weights of a network in few bits.

    With batches, every layer is rounded in the metric of what it reads, errors making up for each other,
    layer after layer on the quantised network's own inputs; without, weight by weight.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Weights of its Linear layers and convolutions are quantised, with shared values those of
        embeddings as well. What is zero stays so; sparse layers become dense ones first.
    batches : iterable of batches, optional
        As ``compress`` takes them, unlabelled; needed to retrain.
    scheme : "int8-dynamic", "int8", "codebook" or "ternary"
        "int8": whole numbers times a scale for every output. "int8-dynamic": of Linear layers, whose inputs
        are rounded to 8 bits as well when they run; other layers are left alone. "codebook": few values that
        a layer shares. "ternary": two values and zero, but 16 values in the first layer and the last. With
        these two, large parameters that are no layer's weight (positions, recurrent weights) take 256 values;
        the rest, biases and the statistics of norms are rounded to bfloat16.
    bits : int, optional
        Of a code: by default 8 for "int8", 4 for "codebook". With a target, the most.
    target : {"bytes": number}, optional
        "codebook": what the file that ``save`` writes may take, as a number or a share of the original's
        tensors. Sizes of codebooks, zeros and how often each value is taken follow from that: layer by layer,
        the error and what entropy coding takes are minimised together, at one price of a bit for all layers,
        by what errors do to the network's outputs.
    group : int, optional
        "int8": so many consecutive inputs share a scale; all of an output by default.
    method : "feedback" or "nearest"
        "nearest": every weight by itself, as a baseline.
    retrain : number of seconds, or options of ``distill``
        Afterwards, train to give the original's outputs on the batches, without labels. "codebook": the
        shared values, biases and norms; with ``trained="both"`` among the options, weights may change to
        other values, too. "ternary": both, from the weights as they were, which become zero below a tenth of
        their layer's largest, as in trained ternary quantisation.
    layout : "dense", "auto", "csr" or "shared"
        How layers of a codebook run: decoded once; sparse where that is faster and smaller, or in any case,
        as ``prune`` has it; or with their values as parameters that can be trained, decoded in every call.
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    evaluate : callable, optional
        From a network to a score, for the report.
    divergence : callable
        As in ``compress``.
    seed : int
        Of the choice of rows, and of training.
    progress : bool
        Show progress bars, with the time left, when on a terminal.

    Returns
    -------
    Compressed
        Its report gives the bits of every layer, and under ``file`` what ``save`` writes.

    Raises
    ------
    PysolveError
        A target out of reach.

    References
    ----------
    E. Frantar et al., GPTQ, 2023. S. Han et al., Deep compression, 2016. C. Zhu et al., Trained ternary
    quantization, 2017.
    """
    before, original = checked(model)
    _check(scheme, bits, target, group, method, retrain, layout, batches is None)
    job = Job(
        scheme,
        bits,
        None if target is None else _bytes(original, target),
        group,
        method,
        retrain,
        layout,
        tuple(ignore),
        divergence,
        seed,
        progress,
        partial(as_long, scores=evaluate is not None),
    )
    if batches is not None and iter(batches) is batches:
        batches = list(batches)
    result = carried_out(studied(before, batches, job), job)
    report = scored(result.report, original, result.model, evaluate)
    return with_file(replace(result, report=report), original)


def _bytes(model: nn.Module, target: Mapping[str, float]) -> int:
    """Bytes that a target names."""
    check_targets(target)
    if set(target) != {"bytes"}:
        raise ValueError(f"weights are quantised to a target of bytes alone, got {', '.join(target)}.")
    return in_bytes(target["bytes"], model)


def _check(
    scheme: str,
    bits: Any,
    target: Any,
    group: Any,
    method: str,
    retrain: Any,
    layout: str,
    blind: bool,
) -> None:
    """What can be told to be wrong before any work."""
    for what, given, known in (
        ("scheme", scheme, SCHEMES),
        ("method", method, METHODS),
        ("layout", layout, LAYOUTS),
    ):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}.")
    whole = SCHEMES[scheme] == "int"
    if scheme in ("int8-dynamic", "ternary") and bits is not None and not (whole and bits == 8):
        raise ValueError(f"bits are for int8 and codebook, got {bits} for {scheme}.")
    for what, given, least, top in (("bits", bits, 1 + whole, 8), ("group", group, 1, None)):
        number = isinstance(given, Integral) and not isinstance(given, bool)
        if given is not None and not (number and least <= given <= (top or given)):
            span = f"{least} … {top}" if top else f"at least {least}"
            raise ValueError(f"{what} must be a whole number of {span} for {scheme}, got {given!r}.")
    if target is not None and scheme != "codebook":
        raise ValueError(f'a target is for scheme="codebook", got {scheme!r}.')
    if target is not None and method != "feedback":
        raise ValueError('a target needs method="feedback".')
    if group is not None and scheme != "int8":
        raise ValueError(f"groups of inputs are for int8, got {scheme!r}.")
    if whole and (retrain or layout != "dense"):
        raise ValueError(f"layout and retrain are for codebook and ternary, got {scheme!r}.")
    if retrain:
        options_of(retrain)
        if blind:
            raise ValueError("retrain needs batches: unlabelled inputs.")
