"""The recipe: study a network, choose sizes, refit every layer, cut, and check."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pysolve.budget import allocate
from pysolve.choice import refit as least_squares_near
from pysolve.choice import site_problem
from pysolve.correlations import Array, Correlations, group_columns
from pysolve.errors import PysolveError
from pysolve.nn.calibration import samples_in, take
from pysolve.nn.costs import cost_model
from pysolve.nn.divergence import Divergence, kl_divergence, mean_divergence, run
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.lockstep import Cut, Fit, Layer
from pysolve.nn.lockstep import refit as refit_in_lockstep
from pysolve.nn.rows import channels, matrix, taps
from pysolve.nn.surgery import apply
from pysolve.nn.train import match
from pysolve.offline import cuts_of, reader_values, refit_readers
from pysolve.plan import Collapse, Indices, Plan, Site
from pysolve.report import Report, SiteReport
from pysolve.solvers import newton
from pysolve.study import Clock, Study, harm, study

Target = Mapping[str, float]
_STUDY_DEFAULTS: dict[str, Any] = {
    "select": "elimination",
    "ignore": (),
    "sites": None,
    "divergence": kl_divergence,
    "memory": None,
    "progress": True,
}
REFITS = ("sequential", "independent")


@dataclass(frozen=True, eq=False)
class Compressed:
    """A smaller network, what was done to get there, and what that cost.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
        Applied to the original it gives ``model``, but for what distillation changed.
    report : Report
    """

    model: nn.Module
    plan: Plan
    report: Report


def compress(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    target: Target | None = None,
    keep: float | Mapping[str, float] | None = None,
    lam: float | Mapping[str, float] | None = None,
    select: str = "elimination",
    refit: str = "sequential",
    distill: float | Mapping[str, float] = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
    sites: Sequence[Site] | None = None,
    round_to: int = 1,
    divergence: Divergence = kl_divergence,
    memory: int | None = None,
) -> Compressed:
    """Make a network smaller, without labels and without training it again.

    One pass over the data gathers the correlations of every layer that reads channels which can go. Each
    site's channels are ordered by what the refitted readers miss least; the divergence of the network's
    outputs, measured on samples held back, tells what shrinking each site does; sizes are chosen to do the
    least harm within the target; then every layer is refitted front to back, on the compressed network's
    inputs and the original's outputs.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed.
    batches : iterable of batches
        What users have: tensors, tuples or lists whose first item is the input, or mappings of keyword
        arguments; labels are ignored. Any amount of them.
    target : {"params", "macs" or "bytes": number}
        What the result may cost: a share of the original up to 1, or a whole number above. Default
        {"params": 0.25}, unless ``keep`` or ``lam`` is given.
    keep : float or {writer: number}
        Instead of a target: the share (up to 1) or number of channels that each site keeps; sites without
        an entry keep all.
    lam : float or {writer: float}
        Instead of a target: the penalty of the joint group lasso  Σ_r ½ E‖y_r − M_r x‖² + lam Σ_g ‖M_g‖_F
        over each site's readers r, whose non-zero groups stay.
    select : str
        How channels are chosen: "elimination" or any method of ``select_channels``.
    refit : "sequential" or "independent"
        Every layer on the compressed network's own inputs, or the readers alone on the original's.
    distill : number of seconds, or {"seconds" or "epochs": number}
        Afterwards, train the result to give the original's outputs on the batches.
    evaluate : callable, optional
        From a network to a score, for the report.
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    seed : int
        Of the choice of rows and of distillation. The same seed gives the same network.
    progress : bool
        Show progress bars, with the time left, when on a terminal.
    sites : sequence of Site, optional
        Instead of those that ``find_sites`` finds; needed for a network that cannot be exported, whose
        readers are then refitted independently.
    round_to : int
        Sites keep multiples of this many channels, or all.
    divergence : callable
        From the original's and another output to how far they are apart, averaged over samples.
    memory : int, optional
        Bytes that the refit may hold in activations; by default half of what is free. Beyond, it uses fewer
        samples, and the report says so.

    Returns
    -------
    Compressed

    Raises
    ------
    PysolveError
        No channel can go; a target that cannot be reached (names the smallest that can); a network that
        cannot be traced.
    """
    network = model.model if isinstance(model, Compressed) else model
    _check(target, keep, lam, refit)
    options = {"select": select, "ignore": ignore, "sites": sites, "divergence": divergence}
    found = study(network, batches, **options, memory=memory, progress=progress)
    kept, notes = _kept(found, target, keep, lam, round_to)
    return shrink(
        found, kept, notes, refit=refit, distill=distill, evaluate=evaluate, seed=seed, progress=progress
    )


def sweep(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    targets: Iterable[Target],
    evaluate: Callable[[nn.Module], float] | None = None,
    retrain: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> list[Report]:
    """Compress to several targets after one pass over the data.

    Parameters
    ----------
    model, batches, evaluate
        As in ``compress``.
    targets : iterable of targets
    retrain : callable, optional
        Trains a network in place; each result is evaluated once more after it.
    options
        Further arguments of ``compress``.

    Returns
    -------
    list of Report
        In the order of the targets.
    """
    network = model.model if isinstance(model, Compressed) else model
    given = {"select", "ignore", "sites", "divergence", "memory", "progress"} & set(options)
    found = study(network, batches, **{**_STUDY_DEFAULTS, **{name: options.pop(name) for name in given}})
    round_to = options.pop("round_to", 1)
    reports = []
    for target in targets:
        kept, notes = _kept(found, target, None, None, round_to)
        result = shrink(found, kept, notes, evaluate=evaluate, **options)
        report = result.report
        if retrain is not None and evaluate is not None:
            trained = copy.deepcopy(result.model)
            retrain(trained)
            report = replace(report, retrained=float(evaluate(trained)))
        reports.append(report)
    return reports


def shrink(
    found: Study,
    kept: Sequence[Indices],
    notes: Sequence[str] = (),
    *,
    refit: str = "sequential",
    distill: float | Mapping[str, float] = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Refit a studied network with only some channels kept, cut them, check, and report."""
    clock = Clock()
    values, more = _refitted(found, kept, refit, seed, progress)
    clock.stage("refit")
    steps = tuple(
        Collapse(site, keep) for site, keep in zip(found.free, kept, strict=True) if len(keep) < site.channels
    )
    plan = Plan(steps, {name: value.cpu().numpy() for name, value in values.items()})
    probe = take(found.calibration.held[0], 0, 16)
    smaller = apply(found.model, plan, probe=probe)
    clock.stage("apply")
    if distill:
        budget = distill if isinstance(distill, Mapping) else {"seconds": distill}
        match(smaller, found.model, found.calibration.kept, **budget, seed=seed, progress=progress)
        clock.stage("distill")
    report = _report(found, kept, smaller, (*notes, *more), evaluate, {**found.seconds, **clock.seconds})
    return Compressed(smaller, plan, report)


def _kept(
    found: Study,
    target: Target | None,
    keep: float | Mapping[str, float] | None,
    lam: float | Mapping[str, float] | None,
    round_to: int,
) -> tuple[list[Indices], list[str]]:
    """Channels that stay of every free site, and what to say about them."""
    if not found.free:
        reasons = sorted({site.pinned for site in found.sites if site.pinned})
        raise PysolveError(f"no channel of this network can go: {'; '.join(reasons) or 'it has no sites'}.")
    if lam is not None:
        return _kept_by_lasso(found, lam)
    if keep is not None:
        sizes = [_size(site, _entry(site, keep), round_to) for site in found.free]
    else:
        costs = cost_model(
            found.model, found.free, found.calibration.held[0], extra_biases=_new_biases(found)
        )
        wanted = {"params": 0.25} if target is None else target
        sizes = allocate(costs, found.curves, wanted, round_to=round_to).tolist()
    return [choice.keep(k) for choice, k in zip(found.choices, sizes, strict=True)], []


def _kept_by_lasso(found: Study, lam: float | Mapping[str, float]) -> tuple[list[Indices], list[str]]:
    kept, notes = [], []
    for site, choice in zip(found.free, found.choices, strict=True):
        penalty = _entry(site, lam)
        widths = {name: channels(found.layers[name].module)[0] for name in site.readers}
        keep = np.arange(site.channels)
        if penalty is not None:
            keep = newton(site_problem(site, found.correlations, widths, normalised=False), penalty).keep
        if not len(keep):
            notes.append(f"lam = {penalty:.3g} leaves no channel of {site.name}: the most useful one stays.")
            keep = choice.keep(1)
        kept.append(keep)
    return kept, notes


def _entry(site: Site, values: float | Mapping[str, float]) -> float | None:
    """What a setting says for a site: by any of its writers' names, or the same for all."""
    if not isinstance(values, Mapping):
        return values
    return next((values[name] for name in site.writers if name in values), None)


def _size(site: Site, value: float | None, round_to: int) -> int:
    if value is None:
        return site.channels
    wanted = value * site.channels if value <= 1 and not isinstance(value, int) else value
    return min(site.channels, max(1, round(wanted / round_to)) * round_to)


def _refitted(
    found: Study, kept: Sequence[Indices], refit: str, seed: int, progress: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """New values of every layer, and what to say about them."""
    cuts = cuts_of(found.free, kept, found.layers)
    fits = refit_readers(found.free, kept, found.layers, found.correlations)
    state = found.model.state_dict()
    if refit == "independent" or found.graph is None:
        why = "the network cannot be exported, so its readers were refitted independently"
        return reader_values(state, cuts, found.layers, fits), [why] * (refit == "sequential")
    used, calibration = [*found.calibration.kept, *found.calibration.held], found.calibration
    shared = {name: fit for name, fit in fits.items() if found.layers[name].calls > 1}
    values = refit_in_lockstep(
        found.graph,
        found.model,
        used,
        cuts,
        _fitting(found, cuts, fits),
        values=reader_values(state, cuts, found.layers, shared),
        new_biases=_new_biases(found),
        seed=seed,
        progress=progress,
    )
    note = f"the refit used {calibration.used} of {calibration.seen} samples: more would not fit in memory"
    return values, [note] * (calibration.used < calibration.seen)


def _fitting(found: Study, cuts: Mapping[str, Cut], fits: Mapping[str, tuple[Array, Array | None]]) -> Fit:
    """How the lockstep refits a layer: least squares, held a little to what was known before."""

    def fit(name: str, correlations: Correlations, intercept: bool) -> tuple[Array, Array | None]:
        layer = found.layers[name]
        prior = matrix(layer.module).double().cpu().numpy()
        if name in cuts:
            columns = group_columns(cuts[name].inputs, taps(layer.module))
            prior = (fits[name][0] if name in fits else prior[:, columns])[cuts[name].outputs]
        everything = np.arange(len(correlations.xx))
        M, bias = least_squares_near(correlations, everything, prior, intercept=intercept)
        if bias is None or layer.takes_bias:
            return M, bias
        plain, _ = least_squares_near(correlations, everything, prior, intercept=False)
        # A bias that the layer did not have must earn its parameters.
        return (M, bias) if correlations.error(M, bias) < 0.99 * correlations.error(plain) else (plain, None)

    return fit


def _new_biases(found: Study) -> frozenset[str]:
    """Layers without a bias that may be given one: those that lose inputs."""
    readers = {name for site in found.free for name in site.readers}
    return frozenset(name for name in readers if not found.layers[name].takes_bias)


def _report(
    found: Study,
    kept: Sequence[Indices],
    smaller: nn.Module,
    notes: Sequence[str],
    evaluate: Callable[[nn.Module], float] | None,
    seconds: Mapping[str, float],
) -> Report:
    held = found.calibration.held
    example = take(held[0], 0, 1)
    numbers = iter(range(len(found.free)))
    lines = []
    for site in found.sites:
        if site.pinned is not None:
            lines.append(SiteReport(site.name, site.channels, site.channels, pinned=site.pinned))
            continue
        s = next(numbers)
        k = len(kept[s])
        changed = k < site.channels
        lines.append(
            SiteReport(
                site.name,
                site.channels,
                k,
                error=float(found.choices[s].error[k]) * changed,
                predicted=float(found.curves[s][k]),
                measured=harm(found, s, kept[s]) if changed else 0.0,
                seconds=found.spent[s],
            )
        )
    outputs = run(smaller, held)
    return Report(
        before=_costs(found.model, example),
        after=_costs(smaller, example),
        sites=tuple(lines),
        divergence=mean_divergence(found.originals, outputs, [*map(samples_in, held)], found.divergence),
        samples=found.calibration.used,
        held=sum(map(samples_in, held)),
        score_before=None if evaluate is None else float(evaluate(found.model)),
        score_after=None if evaluate is None else float(evaluate(smaller)),
        seconds=seconds,
        notes=tuple(notes),
    )


def _costs(model: nn.Module, example: Any) -> dict[str, int]:
    return {"params": parameters(model), "macs": macs(model, example), "bytes": nbytes(model)}


def _check(target: Any, keep: Any, lam: Any, refit: str) -> None:
    given = [n for n, v in (("target", target), ("keep", keep), ("lam", lam)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"give one of target, keep and lam, got {' and '.join(given)}.")
    if refit not in REFITS:
        raise ValueError(f"unknown refit {refit!r}; choose one of {', '.join(REFITS)}.")
