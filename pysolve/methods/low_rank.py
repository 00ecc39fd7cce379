"""``low_rank``: layers that become two smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

from torch import nn

from pysolve.compressed import Compressed
from pysolve.methods.account import after, scored
from pysolve.methods.candidates import STRUCTURES, study_ranks
from pysolve.methods.choose_ranks import Extent, as_chosen, choose_ranks, share_out
from pysolve.methods.factoring import factored
from pysolve.methods.goal import check_model
from pysolve.methods.shrink import shrink
from pysolve.methods.study import study
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.solve.budget import check_targets

METHODS = ("activation", "svd")
LAYOUTS = ("auto", "factored")


def low_rank(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    target: Mapping[str, float] | None = None,
    method: str | None = None,
    structure: str = "auto",
    prune: bool = False,
    layout: str = "auto",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Factor layers of a network: each becomes two smaller ones, without labels and without training.

    Exactly one of ``rank``, ``energy`` and ``target`` says how far.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Linear layers and convolutions without groups can be factored.
    batches : iterable of batches, optional
        As ``compress`` takes them, unlabelled; needed for "activation" and for a target.
    rank : int or {layer: int}
        Of every layer for which it pays, or of those that are named.
    energy : float
        Share of E‖M x‖² around its mean ("svd": of ‖W‖²) that each layer keeps.
    target : {"params", "macs" or "bytes": number}
        What the network may cost, as ``compress`` has it. Ranks are shared out by what they do to the
        network's outputs on samples held back; layers may stay as they are.
    method : "activation" or "svd"
        "svd": the nearest weights, min ‖W − U V‖. "activation" (default, if there are batches): the nearest
        outputs, min E‖y − U V x − b‖² in the metric of what they mean to the network's, from the correlations
        of what a layer reads: solved exactly but for spatial factors, which are refitted in turn; layer after
        layer on the factored network's own inputs, the layers between refitted too.
    structure : "auto", "channel" or "spatial"
        Of 2-d convolutions: the kernel to r channels and 1 × 1 behind, or k × 1 and 1 × k; by default
        whichever loses less at half the cost.
    prune : bool
        With a target: channels may go as well, as ``compress`` removes them. Each layer is pruned, factored,
        both, or left alone, whichever does the least harm.
    layout : "auto" or "factored"
        "auto": layers that take longer as two, measured on a batch held back, stay as they are.
        "factored": the time does not matter.
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    evaluate : callable, optional
        From a network to a score, for the report.
    divergence : callable
        As in ``compress``.
    seed : int
        Of the choice of rows.
    progress : bool
        Show progress bars, with the time left, when on a terminal.

    Returns
    -------
    Compressed
        Factored layers are ``pysolve.nn.Factored``: two ordinary layers. The report says for each layer what
        became of it, and why.

    Raises
    ------
    PysolveError
        When a layer named by ``rank`` cannot be factored, or would not be smaller; a target out of reach.
    """
    original = model.model if isinstance(model, Compressed) else model
    check_model(original)
    method = method or ("svd" if batches is None else "activation")
    extent = Extent(rank, energy, target)
    _check(extent, method, structure, layout, batches is None, prune)
    if batches is not None and iter(batches) is batches:
        # Several passes are made.
        batches = list(batches)
    options: dict[str, Any] = {"ignore": ignore, "divergence": divergence, "progress": progress}
    look: Any = partial(study_ranks, plain=method == "svd", structure=structure, **options)
    found, timed = look(original, batches), layout == "auto"
    finish = partial(factored, seed=seed, progress=progress)
    if target is None:
        result = after(model, finish(found, choose_ranks(found, extent, timed=timed)))
    elif prune and batches is not None:
        channels = study(original, batches, **options)
        sizes, ranks = share_out(found, target, channels, timed=timed)
        smaller = after(model, shrink(channels, sizes, seed=seed, progress=progress))
        result = finish(as_chosen(found, look(smaller.model, batches), ranks), ranks, original=original)
        result = after(smaller, replace(result, report=replace(result.report, sites=smaller.report.sites)))
    else:
        _, ranks = share_out(found, target, None, timed=timed)
        result = after(model, finish(found, ranks))
    report = replace(result.report, target=None if target is None else dict(target))
    return replace(result, report=scored(report, original, result.model, evaluate))


def _check(extent: Extent, method: str, structure: str, layout: str, blind: bool, prune: bool) -> None:
    """What can be told to be wrong before any work."""
    for what, given, known in (
        ("method", method, METHODS),
        ("structure", structure, STRUCTURES),
        ("layout", layout, LAYOUTS),
    ):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}.")
    wanted = [name for name, value in vars(extent).items() if value is not None]
    if len(wanted) != 1:
        raise ValueError(
            f"give exactly one of rank, energy and target; got {' and '.join(wanted) or 'none'}."
        )
    if extent.target is not None:
        check_targets(extent.target)
    elif prune:
        raise ValueError("prune=True needs a target, within which channels and ranks compete.")
    for name, value in extent.named_ranks:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if extent.energy is not None and not 0 < extent.energy <= 1:
        raise ValueError(f"energy must be a share in (0, 1], got {extent.energy}.")
    if blind and (method == "activation" or extent.target is not None):
        what = "a target" if extent.target is not None else 'method="activation"'
        raise ValueError(f"{what} needs batches: unlabelled inputs.")
