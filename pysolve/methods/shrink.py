"""A studied network, really made smaller: refit, cut, check, report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from pysolve.compressed import Compressed
from pysolve.correlations import Array, Correlations, group_columns
from pysolve.methods.account import account, after, harm_done, scored
from pysolve.methods.offline import cuts_of, reader_values, refit_readers
from pysolve.methods.sizes import Sizes
from pysolve.methods.study import Clock, Study, harm
from pysolve.nn.apply import apply
from pysolve.nn.calibration import samples_in, take, usable
from pysolve.nn.graph.branches import Cut
from pysolve.nn.layer_matrix import matrix, taps
from pysolve.nn.lockstep import Fit, Sampling
from pysolve.nn.lockstep import refit as refit_in_lockstep
from pysolve.nn.running import as_array
from pysolve.plan import Collapse, Indices, Plan
from pysolve.report.report import Report
from pysolve.report.rows import SiteReport
from pysolve.report.warnings import few_samples, pinned
from pysolve.solve.least_squares import refit as least_squares_near
from pysolve.training.distill import distill as teach

# A bias that a layer did not have must lower its error by this share to earn its parameters.
BIAS_GAIN = 0.01
# Sizes at which the report tells a site's error.
CURVE_POINTS = 33


def shrink(
    found: Study,
    sizes: Sizes,
    *,
    target: Mapping[str, float] | None = None,
    refit: str = "sequential",
    distill: float | Mapping[str, float] = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Refit a studied network with only some channels kept, cut them, check, and report."""
    clock = Clock()
    values, used, notes = _refitted(found, sizes.kept, refit, seed, progress)
    clock.stage("refit")
    steps = tuple(
        Collapse(site, keep)
        for site, keep in zip(found.free, sizes.kept, strict=True)
        if len(keep) < site.channels
    )
    plan = Plan(steps, {name: as_array(value) for name, value in values.items()})
    probe = take(found.calibration.held[0], 0, 16)
    smaller = apply(found.model, plan, probe=probe)
    clock.stage("apply")
    if distill:
        smaller, more = _distilled(found, smaller, distill, seed, progress)
        notes += more
        clock.stage("distill")
    report = _report(found, sizes, smaller, seed)
    clock.stage("report")
    if evaluate is not None:
        report = scored(report, found.model, smaller, evaluate)
        clock.stage("evaluate")
    report = replace(
        report,
        target=None if target is None else {measure: _number(value) for measure, value in target.items()},
        samples=used,
        notes=(*sizes.notes, *notes),
        seconds={**found.seconds, **clock.seconds},
    )
    return after(found.model, Compressed(smaller, plan, report))


def _number(value: float) -> float:
    """NumPy's numbers as plain ones."""
    return float(value) if value <= 1 else int(value)


def _distilled(
    found: Study, smaller: nn.Module, distill: float | Mapping[str, float], seed: int, progress: bool
) -> tuple[nn.Module, list[str]]:
    """Train the network to give the original's outputs; undone where samples held back say it harmed."""
    student = copy.deepcopy(smaller)
    how: Any = {"loss": "mse", "batch_size": 32, "mix": 0.5, "frozen": True, **_length(distill)}
    teach(student, found.model, found.calibration.kept, **how, seed=seed, progress=progress)
    rise = harm_done(found.model, smaller, student, found.calibration.held, found.divergence)
    return (smaller, [f"distillation was undone: {rise}"]) if rise else (student, [])


def _length(distill: float | Mapping[str, float]) -> dict[str, Any]:
    """How long to train: a plain number means seconds."""
    if not isinstance(distill, Mapping):
        return {"seconds": float(distill)}
    if len(distill) != 1 or not set(distill) <= {"seconds", "epochs"}:
        raise ValueError(f"distill must name seconds or epochs, one of them, got {dict(distill)}.")
    return dict(distill)


def _refitted(
    found: Study, kept: Sequence[Indices], refit: str, seed: int, progress: bool
) -> tuple[dict[str, Tensor], int, list[str]]:
    """New values of every layer, how many samples they were fitted on, and what to say about them."""
    if refit == "none":
        return {}, 0, ["nothing was refitted; errors and divergences of single sites are those with refits"]
    cuts = cuts_of(found.free, kept, found.layers)
    fits = refit_readers(found.free, kept, found.layers, found.correlations)
    state = found.model.state_dict()
    used, why = _usable(found)
    if refit == "independent" or not used:
        note = f"{why}, so its readers were refitted independently"
        values = reader_values(state, cuts, found.layers, fits)
        return values, found.calibration.seen, [note] * (refit == "sequential")
    assert found.graph is not None
    shared = {name: fit for name, fit in fits.items() if found.layers[name].calls != 1}
    values = refit_in_lockstep(
        found.graph,
        found.model,
        used,
        cuts,
        _fitting(found, cuts, fits),
        values=reader_values(state, cuts, found.layers, shared),
        new_biases=found.new_biases,
        sampling=Sampling(seed=seed),
        progress=progress,
    )
    count, seen = sum(map(samples_in, used)), found.calibration.seen
    return values, count, [f"the refit used {count} of {seen} samples: {why}"] * (count < seen)


def _usable(found: Study) -> tuple[list[Any], str]:
    """Batches for the refit, and why they are not all that were seen."""
    graph, kept = found.graph, found.calibration.kept
    if graph is None:
        return [], "the network cannot be exported"
    batches = usable(graph, kept)
    if batches is kept:
        return kept, "more would not fit in memory"
    return batches, "the network's code takes batches of one size alone"


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
        gained = correlations.error(M, bias) < (1 - BIAS_GAIN) * correlations.error(plain)
        return (M, bias) if gained else (plain, None)

    return fit


def _report(found: Study, sizes: Sizes, smaller: nn.Module, seed: int) -> Report:
    held, divergence = found.calibration.held, found.divergence
    report = account(found.model, smaller, held, divergence=divergence, seed=seed)
    few = few_samples(found.calibration.seen + report.held, found.correlations)
    cautions = (*few, *pinned(report.mass, found.sites), *report.warnings)
    sites = tuple(_site_reports(found, sizes))
    return replace(report, sites=sites, solves=sizes.solves, warnings=cautions)


def _site_reports(found: Study, sizes: Sizes) -> Iterator[SiteReport]:
    numbers = iter(range(len(found.free)))
    for site in found.sites:
        if site.pinned is not None:
            yield SiteReport(site.name, site.channels, site.channels, pinned=site.pinned)
            continue
        s = next(numbers)
        k, error = len(sizes.kept[s]), found.choices[s].error
        changed = k < site.channels
        shown = np.unique(np.geomspace(1, site.channels, CURVE_POINTS).round().astype(int))
        yield SiteReport(
            site.name,
            site.channels,
            k,
            error=float(error[k]) * changed,
            predicted=sizes.predicted[s],
            measured=harm(found, s, sizes.kept[s]) if changed else 0.0,
            seconds=found.spent[s],
            curve=tuple((int(n), float(f"{error[n]:.4g}")) for n in shown),
        )
