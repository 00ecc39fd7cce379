"""Sites tried out: without some of their channels the network must give what it gives with these masked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import nn

from pysolve.errors import CollapseError
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.cut.verify import mismatch
from pysolve.nn.graph.bisection import Problem, faults
from pysolve.nn.graph.integers import choices, counting, integers_read
from pysolve.nn.outputs import tensors_of
from pysolve.nn.refusal import code_line
from pysolve.nn.running import Batch, evaluating, forward, in_training, keeping_modes
from pysolve.nn.state import copy_of, keeping_state
from pysolve.plan import Collapse, Plan, Site

# The code keeps channels: an error shows where, or nothing but other outputs.
WRITTEN, COUNTED = "a width is written into the code", "the code counts on all of these channels"


@dataclass(frozen=True)
class _Ways:
    """Whether a network runs in training mode, and with the caches that it has in use."""

    trains: bool = False
    caches: bool = False


def _ways(model: nn.Module, batch: Batch) -> _Ways:
    configs = (getattr(module, "config", None) for module in model.modules())
    caches = any(getattr(config, "use_cache", False) for config in configs)
    return _Ways(
        _trouble(copy_of(model), batch) is None, caches and _trouble_with_caches(model, batch) is None
    )


def proven_sites(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[Site]:
    """The same sites, with those pinned whose removal breaks the network.

    About half of the channels of every free site are removed twice: in the network itself, and in a copy
    with random weights of unit gain, in which no effect is too small to be measured. A network that runs in
    training mode must still do so.
    """
    rng = np.random.default_rng(0)
    proven = list(sites)
    ways = _ways(model, batch) if any(site.pinned is None for site in sites) else _Ways()
    for network in (model, _randomized(model, batch)):
        steps = _halves({i: site for i, site in enumerate(proven) if site.pinned is None}, rng)
        if not steps or _problem(network, [*steps.values()], batch, ways) is None:
            continue
        problems = faults(steps, partial(_problem, network, batch=batch, ways=ways))[1]
        if problems and mismatch(copy_of(model), copy_of(model), batch, seeds=(0, 1)):
            problems = dict.fromkeys(problems, "the network's outputs are random, and others without these")
        followed = _followed(network, proven, problems, batch, ways) if network is model else {}
        for i, problem in problems.items():
            proven[i] = followed[i] if i in followed else replace(proven[i], pinned=problem)
    return proven


def _followed(
    model: nn.Module, sites: Sequence[Site], problems: Mapping[int, str], batch: Batch, ways: _Ways
) -> dict[int, Site]:
    """Sites that work once integers of the network's own modules follow the cut, with these integers."""
    rng, found = np.random.default_rng(0), dict[int, Site]()
    written = [i for i, problem in problems.items() if problem.startswith((WRITTEN, COUNTED))]
    read = integers_read(model, batch, trains=ways.trains) if written else {}
    offers = {i: counting(sites[i], read) for i in written}
    claims = Counter(path for offer in offers.values() for path in offer)
    for names in choices({path.rpartition(".")[2] for path in claims}):
        steps = {}
        for i in offers.keys() - found.keys():
            chosen = {
                path: each
                for path, each in offers[i].items()
                if claims[path] == 1 and path.rpartition(".")[2] in names
            }
            if chosen:
                steps[i] = half(replace(sites[i], integers=chosen), rng)
        if len(steps) > 1 and _problem(model, [*steps.values()][:1], batch, ways):
            continue
        works, _ = faults(steps, partial(_problem, model, batch=batch, ways=ways))
        found |= {i: step.site for i, step in works.items()}
    return found


def _halves(sites: Mapping[int, Site], rng: np.random.Generator) -> dict[int, Collapse]:
    """Random halves of the channels, of equally many never as many: code may take one number for another."""
    before, steps = Counter[int](), {}
    for i, site in sites.items():
        steps[i] = half(site, rng, fewer=min(before[site.channels], site.channels // 4))
        before[site.channels] += 1
    return steps


def half(site: Site, rng: np.random.Generator, *, fewer: int = 0) -> Collapse:
    """A step that keeps a random half of the channels, or so many fewer."""
    keep = rng.choice(site.channels, max(1, site.channels // 2 - fewer), replace=False)
    return Collapse(site, np.sort(keep))


def _problem(model: nn.Module, steps: Sequence[Collapse], batch: Batch, ways: _Ways) -> str | None:
    """Problem when these channels are removed, also in the other ways in which it runs; None if none."""
    plan = Plan(tuple(steps))
    try:
        smaller = apply(model, plan)
    except CollapseError as error:
        return str(error)
    difference = mismatch(masked(model, plan), smaller, batch, taken=True)
    if difference is None:
        trouble = _trouble(smaller, batch) if ways.trains else None
        if trouble is not None:
            return f"training needs these channels{trouble}"
        trouble = _trouble_with_caches(smaller, batch) if ways.caches else None
        return trouble and f"{WRITTEN}{trouble}"
    try:
        with evaluating(smaller):
            forward(smaller, batch)
    # Whatever the network's own code raises when its layers are narrower.
    except Exception as error:
        return f"{WRITTEN}{_told(error)}"
    return f"{COUNTED}: without some of them {difference}"


def _trouble(model: nn.Module, batch: Batch) -> str | None:
    """What a network raises in training mode, which changes its statistics; None if it runs."""
    try:
        with in_training(model):
            forward(model, batch)
    except Exception as error:
        return _told(error)
    return None


def _trouble_with_caches(model: nn.Module, batch: Batch) -> str | None:
    """What a decoder raises that keeps what it has read for the next call; None if it runs."""
    try:
        with keeping_modes(model), keeping_state(model), torch.no_grad():
            forward(model.eval(), batch)
    except Exception as error:
        return _told(error)
    return None


def _told(error: Exception) -> str:
    """The line of the network's code that raised an error, and its first line."""
    return f"{code_line(error)}: {next(iter(str(error).splitlines()), repr(error))}"


def _randomized(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy with random weights of unit gain; the model itself where that gives no finite output."""
    network = copy_of(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            values = torch.rand(parameter.shape, generator=generator) + 0.5
            if parameter.ndim > 1:
                values = torch.randn(parameter.shape, generator=generator)
                values *= (len(parameter) / max(1, parameter.numel())) ** 0.5
            parameter.data.copy_(values)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    try:
        with evaluating(network):
            outputs = tensors_of(forward(network, batch))
    except Exception:
        return model
    finite = all(bool(output.isfinite().all()) for output in outputs)
    return network if finite else model


def trial(model: nn.Module, batch: Batch) -> Problem:
    """What is wrong with the network, and with one of random weights, when some channels are removed."""

    @cache
    def networks() -> tuple[list[nn.Module], _Ways]:
        return [model, _randomized(model, batch)], _ways(model, batch)

    def problem(steps: Sequence[Collapse]) -> str | None:
        found, ways = networks()
        problems = (_problem(network, steps, batch, ways) for network in found)
        return next((one for one in problems if one is not None), None)

    return problem
