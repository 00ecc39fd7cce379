"""Trial of sites: remove random channels, and compare the network with the masked one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.errors import CollapseError
from pysolve.nn.apply import apply, masked
from pysolve.nn.graph.export import code_line
from pysolve.nn.running import Batch, evaluating, forward
from pysolve.nn.verify import mismatch
from pysolve.plan import Collapse, Plan, Site


def prove(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[Site]:
    """Pin sites whose removal breaks the network, with the reason.

    A random half of the channels of every free site is removed twice: in the network itself, and in a copy
    with random weights of unit gain, in which no effect is too small to be measured.

    Parameters
    ----------
    model : nn.Module
    sites : sequence of Site
    batch : one batch

    Returns
    -------
    list of Site
        The same sites; those that cannot shrink are pinned.
    """
    rng = np.random.default_rng(0)
    proven = list(sites)
    for network in (model, _randomized(model, batch)):
        steps = {i: _half(site, rng) for i, site in enumerate(proven) if site.pinned is None}
        if not steps or _problem(network, [*steps.values()], batch) is None:
            continue
        if mismatch(copy.deepcopy(model), copy.deepcopy(model), batch):
            problems = dict.fromkeys(steps, "the network's outputs are random, so nothing can be tried out")
        else:
            problems = _faults(network, steps, {}, batch)[1]
        for i, problem in problems.items():
            proven[i] = replace(proven[i], pinned=problem)
    return proven


def _half(site: Site, rng: np.random.Generator) -> Collapse:
    keep = rng.choice(site.channels, max(1, site.channels // 2), replace=False)
    return Collapse(site, np.sort(keep))


def _faults(
    model: nn.Module, steps: Mapping[int, Collapse], sound: Mapping[int, Collapse], batch: Batch
) -> tuple[dict[int, Collapse], dict[int, str]]:
    """Steps that work together with sound ones, and the problems of the others, by bisection."""
    problem = _problem(model, [*sound.values(), *steps.values()], batch) if steps else None
    if problem is None:
        return dict(steps), {}
    if len(steps) == 1:
        return {}, dict.fromkeys(steps, problem)
    items = list(steps.items())
    middle = len(items) // 2
    left, wrong = _faults(model, dict(items[:middle]), sound, batch)
    right, more = _faults(model, dict(items[middle:]), {**sound, **left}, batch)
    return {**left, **right}, {**wrong, **more}


def _problem(model: nn.Module, steps: Sequence[Collapse], batch: Batch) -> str | None:
    """Problem when these channels are removed; None if there is none."""
    plan = Plan(tuple(steps))
    try:
        smaller = apply(model, plan)
    except CollapseError as error:
        return str(error)
    difference = mismatch(masked(model, plan), smaller, batch)
    if difference is None:
        return None
    try:
        with evaluating(smaller):
            forward(smaller, batch)
    # Whatever the network's own code raises when its layers are narrower.
    except Exception as error:
        message = next(iter(str(error).splitlines()), repr(error))
        return f"a width is written into the code{code_line(error)}: {message}"
    return f"a width is written into the code: without some of these channels {difference}"


def _randomized(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy with random weights of unit gain; the model itself where that gives no finite output."""
    network = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            values = torch.rand(parameter.shape, generator=generator) + 0.5
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator)
                values *= (len(parameter) / parameter.numel()) ** 0.5
            parameter.data.copy_(values)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    try:
        with evaluating(network):
            outputs = pytree.tree_leaves(forward(network, batch))
    except Exception:
        return model
    finite = all(bool(o.isfinite().all()) for o in outputs if isinstance(o, Tensor))
    return network if finite else model
