"""Whole experts that are removed: which order, and what the mixture's outputs lose with each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.correlations import Array, Indices, all_but
from pysolve.methods.menu import FLOOR
from pysolve.methods.study import Study
from pysolve.nn.batches.samples import samples_in
from pysolve.nn.cut.routers import choosing, chosen_by_routers
from pysolve.nn.graph.experts import block_of
from pysolve.nn.outputs import tensors_of
from pysolve.nn.overrides import Args, Kwargs
from pysolve.nn.running import Batch, Output, evaluating, find_layer, forward, hooked
from pysolve.plan import Site

# Rows of outputs that tell what experts do: each run of a mixture without some takes as long as the mixture
# does. And samples that tell how many rows are in one.
_ROWS, _FEW = 4096, 4


def expert_path(study: Study, site: Site, scores: Array | None = None) -> tuple[Indices, Array]:
    """Experts in the order of removal, and the error of every size.

    Greedy: at each size that expert goes without which the mixture's outputs are nearest to the original's,
    E‖y − ŷ‖² / E‖y‖², the router choosing among those that are left. What a removal adds seldom falls as
    others go, so experts are tried again in the order of what they added last, until one stays in front.

    Parameters
    ----------
    study : Study
    site : Site
        Of whole experts.
    scores : (channels,) array, optional
        The order instead: those of the largest scores stay.
    """
    block, few = find_layer(study.model, block_of(site)), study.first_kept(_FEW)
    rows = sum(output[..., 0].numel() for _, _, output in _calls(study.model, block, few))
    count = max(_FEW, _ROWS * sum(map(samples_in, few)) // max(1, rows))
    calls = [*_calls(study.model, block, study.first_kept(count))]
    energy = sum(float(output.double().square().sum()) for _, _, output in calls) or 1.0

    def lost(gone: list[int]) -> float:
        kept = all_but(site.channels, gone)
        total = 0.0
        with evaluating(study.model), choosing(study.model, chosen_by_routers(study.model, {site: kept})):
            for args, kwargs, output in calls:
                own, named = _copied(args, kwargs)
                other = tensors_of(block(*own, **named))[0]
                total += float((other.double() - output.double()).square().sum())
        return total / energy

    gone, error = list[int](), np.full(site.channels + 1, FLOOR)
    waiting = {e: 0.0 for e in range(site.channels)}
    if scores is not None:
        gone = np.argsort(scores, kind="stable")[: site.channels - site.least].tolist()
        for k in range(1, len(gone) + 1):
            error[site.channels - k] = lost(gone[:k])
    while len(gone) < site.channels - site.least:
        now, tried = error[site.channels - len(gone)], set[int]()
        while (best := min(waiting, key=waiting.__getitem__)) not in tried:
            waiting[best] = lost([*gone, best]) - (now if gone else 0.0)
            tried.add(best)
        gone.append(best)
        error[site.channels - len(gone)] = now * (len(gone) > 1) + waiting.pop(best)
    error[: site.least] = error[site.least]
    error = np.maximum.accumulate(np.maximum(error, FLOOR)[::-1])[::-1]
    error[-1] = FLOOR
    return np.array([*gone, *all_but(site.channels, gone)], dtype=np.intp), error


def _calls(model: nn.Module, block: nn.Module, batches: list[Batch]) -> Iterator[tuple[Args, Kwargs, Tensor]]:
    """Arguments and first output of every call of a module."""
    given: list[tuple[Args, Kwargs]] = []
    made: list[Tensor] = []

    def before(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        given.append(_copied(args, kwargs))

    def after(module: nn.Module, args: Args, output: Output) -> None:
        made.append(tensors_of(output)[0].clone())

    hooks = (
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(after),
    )
    with hooked(hooks), evaluating(model):
        for batch in batches:
            forward(model, batch)
    return ((args, kwargs, output) for (args, kwargs), output in zip(given, made, strict=True))


def _copied(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Arguments with copies of all tensors: code may write into them."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    return args, kwargs
