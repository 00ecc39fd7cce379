"""Pruning single weights: which stay, what the others become, and how layers run then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pysolve.budget import check_targets
from pysolve.compressed import Compressed, after
from pysolve.errors import PysolveError
from pysolve.layout import laid_out
from pysolve.masks import METHODS as SCORES
from pysolve.nn.evaluate import parameters
from pysolve.nn.network import as_array, find_matching
from pysolve.nn.slicing import WEIGHTED
from pysolve.selected import Job, Weights, by_data, by_scores

METHODS = (*SCORES, "obs")


def prune_weights(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None,
    job: Job,
    *,
    layout: str = "auto",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Compressed:
    """Set single weights to zero, make up for them, and run layers sparse where that is faster and smaller.

    Parameters
    ----------
    job : Job
        ``wanted`` may also be a target.
    model, batches, layout, ignore, evaluate
        As ``pysolve.prune`` has them.
    """
    original = model.model if isinstance(model, Compressed) else model
    weights = {name: as_array(layer.weight) for name, layer in _layers(original, ignore)}
    target = job.wanted.get("target")
    if target is not None:
        job = replace(job, wanted={"amount": _amount(original, weights, target)})
    if batches is not None and (job.method in ("wanda", "obs") or job.refit != "none"):
        found = by_data(job, original, weights, batches)
    else:
        found = by_scores(job, weights, next(iter(batches), None) if batches is not None else None)
    result = laid_out(original, found, layout, evaluate=evaluate, seed=job.seed)
    asked = None if target is None else dict(target)
    return after(model, replace(result, report=replace(result.report, target=asked)))


def _layers(model: nn.Module, ignore: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Layers whose weights can be pruned, by name."""
    ignored = find_matching(model, ignore)
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and name not in ignored:
            yield name, module


def _amount(model: nn.Module, weights: Weights, target: Mapping[str, float]) -> float:
    """The share of the weights that must go for so many parameters to be left."""
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
