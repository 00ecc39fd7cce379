"""Pruning single weights: which stay, what the others become, and how layers run then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pysolve.budget import check_targets
from pysolve.checks import check_model
from pysolve.compressed import Compressed, after
from pysolve.errors import PysolveError
from pysolve.layout import LAYOUTS, laid_out
from pysolve.masks import METHODS as SCORES
from pysolve.masks import PerLayer
from pysolve.nn.evaluate import parameters
from pysolve.nn.network import as_array, find_matching
from pysolve.nn.slicing import WEIGHTED
from pysolve.selected import Job, Weights, by_data, by_scores

METHODS = (*SCORES, "obs")
REFITS = ("none", "bias", "sequential")


def prune(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "magnitude",
    amount: PerLayer | None = None,
    threshold: PerLayer | None = None,
    sensitivity: PerLayer | None = None,
    pattern: str | None = None,
    target: Mapping[str, float] | None = None,
    scope: str = "local",
    refit: str | None = None,
    layout: str = "auto",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Set single weights to zero, make up for them, and run layers sparse where that is faster and smaller.

    Exactly one of ``amount``, ``threshold``, ``sensitivity``, ``pattern`` and ``target`` says how many.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Weights of its Linear layers and convolutions are pruned; biases are not.
    batches : iterable of batches, optional
        As ``compress`` takes them, unlabelled; needed for "wanda", "obs" and to refit. Some samples are held
        back: layers are timed and the report's divergence is taken on them.
    method : "magnitude", "random", "std", "wanda" or "obs"
        What a weight is judged by: |w|, nothing, |w| / std(w of the layer), |w_ij| sqrt(E[x_j²]), or what the
        layer's outputs lose without it when the others make up for it (optimal brain surgeon: ``obs_prune``).
    amount : float or {layer: float}
        Share of the weights that goes; with a mapping, layers without an entry keep all.
    threshold : float or {layer: float}
        |w| below it goes; for "magnitude".
    sensitivity : float or {layer: float}
        |w| below this many standard deviations of the layer's weights goes; for "std".
    pattern : str
        As "2:4": of every 4 consecutive inputs of an output 2 stay.
    target : {"params": float or int}
        Parameters that are not zero, biases and all, in the whole network: a share or a number.
    scope : "local" or "global"
        The share of each layer, or of all together, which for "obs" is shared out by each layer's curve of
        error against weights.
    refit : "none", "bias" or "sequential"
        What becomes of the other weights: nothing; biases that restore each output's mean; or least squares,
        layer after layer from the front, on the pruned network's inputs and the original's outputs. Default:
        "sequential" for "obs", otherwise "none".
    layout : "auto", "dense", "csr" or "mask"
        "dense": zeros are stored and multiplied. "csr": each Linear and Conv2d becomes a ``SparseLinear``
        or ``SparseConv2d``. "auto": only where that takes fewer bytes and at most nine tenths of the dense
        layer's time; without batches none does. "mask": dense layers whose zeros stay zero in training
        (``remove_masks`` makes them ordinary ones).
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    evaluate : callable, optional
        From a network to a score, for the report.
    seed : int
        Of random scores and of the choice of rows.
    progress : bool
        Show progress bars, with the time left, when on a terminal.

    Returns
    -------
    Compressed
        Its report says for each layer how it runs, and why.
    """
    original = model.model if isinstance(model, Compressed) else model
    check_model(original)
    refit = refit or ("sequential" if method == "obs" else "none")
    needs_data = method in ("wanda", "obs") or refit != "none"
    _check(method, refit, layout, needs_data and batches is None)
    weights = {name: as_array(layer.weight) for name, layer in _layers(original, ignore)}
    given = {"amount": amount, "threshold": threshold, "sensitivity": sensitivity, "pattern": pattern}
    wanted = {name: value for name, value in given.items() if value is not None}
    if target is not None:
        wanted["amount"] = _amount(original, weights, target, [*wanted])
    job = Job(method, wanted, scope, refit, seed, progress)
    if needs_data and batches is not None:
        found = by_data(job, original, weights, batches)
    else:
        found = by_scores(job, weights, next(iter(batches), None) if batches is not None else None)
    result = laid_out(original, found, layout, evaluate=evaluate, seed=seed)
    asked = None if target is None else dict(target)
    return after(model, replace(result, report=replace(result.report, target=asked)))


def _layers(model: nn.Module, ignore: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Layers whose weights can be pruned, by name."""
    ignored = find_matching(model, ignore)
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and name not in ignored:
            yield name, module


def _amount(model: nn.Module, weights: Weights, target: Mapping[str, float], others: Sequence[str]) -> float:
    """The share of the weights that must go for so many parameters to be left."""
    if others:
        raise ValueError(f"give target or {others[0]}, not both.")
    check_targets(target)
    if set(target) != {"params"}:
        raise ValueError(f"single weights are pruned to a target of params alone, got {', '.join(target)}.")
    total, most = parameters(model), sum(weight.size for weight in weights.values())
    left = target["params"] if target["params"] > 1 else target["params"] * total
    amount = 1 - (left - (total - most)) / most if most else 1.0
    if amount >= 1:
        raise PysolveError(
            f"{total - most:,} of the {total:,} parameters are no weights that can be pruned: a target of "
            f"{left:,.0f} cannot be reached."
        )
    return max(0.0, amount)


def _check(method: str, refit: str, layout: str, blind: bool) -> None:
    for what, given, known in (
        ("method", method, METHODS),
        ("refit", refit, REFITS),
        ("layout", layout, LAYOUTS),
    ):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(known)}.")
    if method == "obs" and refit != "sequential":
        raise ValueError(f'method="obs" refits the weights by itself: leave refit out, got {refit!r}.')
    if blind:
        raise ValueError(f"method={method!r} with refit={refit!r} needs batches: unlabelled inputs.")
