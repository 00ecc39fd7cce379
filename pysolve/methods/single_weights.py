"""Pruning single weights: which stay, what the others become, and how layers run then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pysolve.compressed import Compressed
from pysolve.errors import PysolveError
from pysolve.layer.masks import METHODS as SCORES
from pysolve.layer.masks import count_left
from pysolve.methods.account import after
from pysolve.methods.layerwise import weighted_layers
from pysolve.methods.selected import Job, Weights, by_data, by_scores
from pysolve.methods.sparse_layout import laid_out
from pysolve.nn.evaluate import parameters
from pysolve.nn.running import as_array
from pysolve.solve.budget import check_targets

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
    layers, notes = weighted_layers(original, ignore)
    weights = {name: as_array(layer.weight) for name, layer in layers.items()}
    target = job.wanted.get("target")
    if target is not None:
        job = replace(job, wanted={"amount": _amount(original, weights, target, job.scope)})
    if batches is not None and (job.method in ("wanda", "obs") or job.refit != "none"):
        found = by_data(job, original, weights, batches)
    else:
        found = by_scores(job, weights, next(iter(batches), None) if batches is not None else None)
    result = laid_out(original, found, layout, evaluate=evaluate, seed=job.seed)
    asked = None if target is None else dict(target)
    report = replace(result.report, target=asked, notes=(*notes, *result.report.notes))
    return after(model, replace(result, report=report))


def _amount(model: nn.Module, weights: Weights, target: Mapping[str, float], scope: str) -> float:
    """The share of the weights that must go for so many parameters to be left."""
    check_targets(target)
    if set(target) != {"params"}:
        raise ValueError(f"single weights are pruned to a target of params alone, got {', '.join(target)}.")
    total, sizes = parameters(model), [weight.size for weight in weights.values()]
    wanted = target["params"] if target["params"] > 1 else target["params"] * total
    left = int(wanted) - (total - sum(sizes))
    if left < 0:
        raise PysolveError(
            f"{total - sum(sizes):,} of the {total:,} parameters are no weights that can be pruned: a target "
            f"of {wanted:,.0f} cannot be reached."
        )
    parts = sizes if scope == "local" else [sum(sizes)]
    gone = max(0, sum(sizes) - left)
    # Every layer rounds on its own: a little more must go.
    while gone < sum(sizes) and sum(count_left(gone / sum(sizes), part) for part in parts) > left:
        gone += 1
    return gone / max(1, sum(sizes))
