"""The end of every verb: matching the original's outputs where asked for, and the report."""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy
import torch
from torch import nn

import pysolve
from pysolve.compressed import Compressed
from pysolve.errors import PysolveWarning
from pysolve.methods.goal import Options, Target, at_home, plain_target
from pysolve.methods.layout import LaidOut
from pysolve.methods.study import Clock, Study
from pysolve.nn.batches.samples import samples_in, take
from pysolve.nn.cost.nonzeros import nonzeros
from pysolve.nn.cost.per_sample import Workload, sample_macs, workload
from pysolve.nn.cost.profile import FEWEST, TOGETHER, latencies, masses
from pysolve.nn.cut.attention import closed
from pysolve.nn.cut.bare import is_stack
from pysolve.nn.divergence import (
    Divergence,
    has_classes,
    kl_divergence,
    mean_divergence,
    rows_of,
    run,
)
from pysolve.nn.evaluate import nbytes, parameters, score_of
from pysolve.nn.files.architecture import fingerprint
from pysolve.nn.files.checkpoint import file_bytes
from pysolve.nn.gathering.calibration import HELD_OF, LEAST_APART
from pysolve.nn.layers.attention import has_opened
from pysolve.nn.layers.masking import mask_weights, remove_masks
from pysolve.nn.running import Batch, as_array, find_layer
from pysolve.nn.state import copy_of
from pysolve.plan import Plan
from pysolve.report.report import Report
from pysolve.report.rows import Expected, Latency, LayerReport, SiteReport, Solve, Stage
from pysolve.report.warnings import few_samples, lean, not_finite, pinned, slower
from pysolve.training.batches import mixable
from pysolve.training.distill import distill as teach

LOGGER = logging.getLogger("pysolve")
# Parts of a batch that are compared by themselves.
PARTS = 16
# The share of a call's seconds that timing may add, or so many seconds.
TIMING, LEAST_TIMING = 0.04, 1.0
CHOSEN_ON = (
    "the divergence is that of the samples that sizes were chosen on; of "
    f"{HELD_OF * 3 * LEAST_APART} samples or more, others are set apart for it"
)
FITTED_ON = (
    "the divergence is that of samples that layers were fitted on; of "
    f"{HELD_OF} samples or more, some are held out"
)
# Of what is not measured yet.
NO_REPORT = Report(before={}, after={}, sites=(), divergence=float("nan"), samples=0, held=0)
# Options of matching the original's outputs, unless others are given: of samples that can be mixed, and of
# tokens, so many of which make a step. A decoder at half of its MACs, nats above the original after one pass
# over 1,024 texts of 128 tokens (+0.0303 before): 0.0162 in steps of 512, 0.0174 of 1,024, there 0.0199 at
# half of the rate, and at ten times the rate more than before. Two passes over 2,048 texts: 0.0140.
MATCHING: Mapping[str, object] = {"loss": "mse", "batch_size": 32, "mix": 0.5, "frozen": True}
OF_TOKENS: Mapping[str, object] = {"lr": 1e-4, "frozen": True}
TOKENS = 512


def finish(
    before: nn.Module | Compressed,
    study: Study,
    laid: LaidOut,
    clock: Clock,
    *,
    against: nn.Module | None = None,
    target: Target | None = None,
    samples: int = 0,
    sites: Sequence[SiteReport] = (),
    lines: Sequence[LayerReport] | None = None,
    solves: Sequence[Solve] = (),
    stages: Sequence[Stage] = (),
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    distill: Mapping[str, object] | None = None,
    zeros: Sequence[str] = (),
    selected: bool = False,
    file: bool = False,
    together: int | None = None,
    expected: Sequence[Expected] = (),
) -> Compressed:
    """Match the original's outputs where asked for, measure, and report.

    Parameters
    ----------
    before : nn.Module or Compressed
        What was given.
    study : Study
    laid : LaidOut
    clock : Clock
    against : nn.Module, optional
        What the report compares with, by default the network that was studied.
    target, samples, sites, lines, solves, stages, notes, warnings, expected
        For the report.
    distill : {option: value}, optional
        Of ``check_distill``; undone where it harmed on held-out samples.
    zeros : sequence of str
        Dense layers whose zeros stay zero meanwhile.
    selected : bool
        Whether sizes were chosen on the selection set.
    file : bool
        Whether the report gives the bytes of the file that ``save`` writes.
    together : int, optional
        Samples to time together; by default as many as a share of the call's seconds allows.
    """
    given = before.model if isinstance(before, Compressed) else before
    original, model = against or study.original, laid.model
    if distill:
        model, more = matched(study, original, model, distill, zeros)
        notes = (*notes, *more)
        clock.stage("distill")
    spent = sum({**study.seconds, **clock.seconds}.values())
    final, plan = closed(model, given, study.model, whole_plan(study, laid.plan))
    used = as_given(given, original, study.options), final
    report = account(original, model, study, used=used, spent=spent, together=together)
    if study.calibration is not None and study.calibration.fitted_on:
        notes = (*notes, FITTED_ON)
    elif selected and study.apart is study.held:
        notes = (*notes, CHOSEN_ON)
    if not distill and study.options.divergence is kl_divergence:
        notes = (*notes, *lean(report.divergence))
    model = at_home(final, study.options)
    lines = laid.lines if lines is None else lines
    # A turned study makes correlations anew, and has as many samples.
    known = study.correlations if study.turn is None else study.turn.before.correlations
    few = few_samples(_given(study), (name for name in known if not is_stack(name)), known)
    stuck = pinned(report.mass, study.sites) if any(site.pinned is None for site in study.sites) else []
    lost = not_finite(report.divergence) if study.apart else []
    report = replace(
        report,
        target=plain_target(target),
        samples=samples,
        sites=tuple(sites),
        layers=tuple(lines),
        solves=tuple(solves),
        expected=tuple(expected),
        warnings=(*lost, *warnings, *few, *stuck, *slower(report.latencies, lines)),
        notes=tuple(dict.fromkeys((*_left_alone(study), *study.notes, *notes, *report.notes))),
    )
    result = following(before, Compressed(model, plan, report))
    if file:
        result = with_file(result, original)
    clock.stage("report")
    score, failed = later_score(study.options, model)
    if study.options.evaluate is not None:
        clock.stage("evaluate")
    report = replace(
        result.report,
        score_before=study.options.score,
        score_after=score,
        notes=(*result.report.notes, *failed),
        seconds={**study.seconds, **clock.seconds},
        stages=tuple(stages),
    )
    tell(report)
    return replace(result, report=report)


def as_given(given: nn.Module, original: nn.Module, options: Options) -> nn.Module:
    """The network as people run it, where that is computed which was studied."""
    if not has_opened(original):
        return original
    return given if options.device in (None, options.home) else copy_of(given).to(options.device)


def whole_plan(study: Study, plan: Plan) -> Plan:
    """The plan for the user's network of a plan for the one that was studied."""
    if study.turn is None:
        return plan
    values = {name: one for name, one in study.turn.values.items() if name not in plan.forms}
    return replace(plan, values={**values, **plan.values}, untied=study.turn.untied)


def following(before: nn.Module | Compressed, result: Compressed) -> Compressed:
    """The result of a compression that remembers where what it was given came from."""
    if not isinstance(before, Compressed):
        return replace(result, fingerprint=fingerprint(before))
    return replace(result, earlier=(*before.earlier, before.plan), fingerprint=before.fingerprint)


def assembled(before: nn.Module | Compressed, plan: Plan, model: nn.Module) -> Compressed:
    """A network and its plan as ``save`` takes them, without a report."""
    return following(before, Compressed(model, plan, NO_REPORT))


def matched(
    study: Study,
    teacher: nn.Module,
    model: nn.Module,
    options: Mapping[str, object],
    zeros: Sequence[str] = (),
) -> tuple[nn.Module, list[str]]:
    """Train a network to give the original's outputs, without labels; undone where it clearly harmed."""
    assert study.calibration is not None
    student, run_options = copy_of(model), study.options
    mask_weights(student, {name: as_array(find_layer(student, name).weight) != 0 for name in zeros})  # type: ignore[arg-type]
    common = {"seed": run_options.seed, "progress": run_options.progress}
    batches, suited = _matching(study, teacher)
    teach(student, teacher, batches, **{**common, **suited, **options})  # type: ignore[arg-type]
    if zeros:
        remove_masks(student)
    if run_options.ranks.size > 1:
        student.load_state_dict(run_options.ranks.first(student.state_dict()))
    rise = increase(teacher, model, student, study.held, run_options.divergence)
    return (model, [f"distillation was undone: {rise}"]) if rise else (student, [])


def _matching(study: Study, teacher: nn.Module) -> tuple[Sequence[Batch], Mapping[str, object]]:
    """Batches and options of matching that suit a network and its samples."""
    assert study.calibration is not None
    kept, held, divergence = study.calibration.kept, study.held, study.options.divergence
    if mixable(held[0]):
        return kept, MATCHING
    answer = next(run(teacher, held[:1]))
    size = max(1, TOKENS * samples_in(held[0]) // rows_of(answer))
    parts = [take(one, i, i + size) for one in kept for i in range(0, samples_in(one), size)]
    loss = "kl" if has_classes(answer) else "mse"
    # Nothing mixed, the same few texts again and again fit too well in the end.
    best = {"evaluate": lambda student: -distance(teacher, student, held, divergence)}
    return parts, {**OF_TOKENS, "batch_size": size, "loss": loss, **best}


def account(
    original: nn.Module,
    smaller: nn.Module,
    study: Study,
    *,
    used: tuple[nn.Module, nn.Module] | None = None,
    spent: float = 0.0,
    together: int | None = None,
) -> Report:
    """Compare a network with its original; what was done to it is for the caller to add.

    Costs and times are taken on a batch of the selection set, the divergence on samples that nothing was
    chosen on; without data, neither divergence nor MACs nor times. Times take a small share of the seconds
    that were ``spent`` already: of large networks, those of smaller batches. ``used``: equal networks, as
    they are run, to be timed.
    """
    first = study.held[0] if study.held else None
    work = None if first is None else workload(study.held)
    timed = first if study.options.latency else None
    seconds = max(LEAST_TIMING, TIMING * spent)
    times, together = _latencies(*(used or (original, smaller)), timed, seconds, together)
    macs = [] if work is None else [sample_macs(model, work) for model in (original, smaller)]
    counts = [{"macs": sum(one.values())} for one in macs] or [{}, {}]
    timed = None if timed is None else take(timed, 0, together)
    mass = () if first is None else masses(original, smaller, timed, macs)
    return Report(
        before={**costs(original), **counts[0]},
        after={**costs(smaller), **counts[1]},
        sites=(),
        divergence=distance(original, smaller, study.apart, study.options.divergence)
        if study.apart
        else float("nan"),
        samples=0,
        held=0 if study.calibration and study.calibration.fitted_on else sum(map(samples_in, study.apart)),
        mass=mass,
        latencies=times,
        made_with=made_with(study.options.seed),
    )


def later_score(options: Options, network: nn.Module) -> tuple[float | None, tuple[str, ...]]:
    """The score of a result, if there is a function for it; where that fails, a note: work is not lost."""
    if options.evaluate is None:
        return None, ()
    try:
        return score_of(options.evaluate, at_home(network, options)), ()
    except Exception as error:
        return None, (f"evaluate failed on the smaller network: {type(error).__name__}: {error}",)


def tell(report: Report) -> None:
    """Pass warnings on to Python's, as from the user's own line, and notes to the logger ``pysolve``."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pysolve."):
        frame, level = frame.f_back, level + 1
    for text in report.warnings:
        warnings.warn(text, PysolveWarning, stacklevel=level)
    for text in report.notes:
        LOGGER.info(text)


def with_file(result: Compressed, original: nn.Module) -> Compressed:
    """The result with the sizes of the original's tensors and of the file that ``save`` writes."""
    before = {**result.report.before, "file": nbytes(original)}
    after = {**result.report.after, "file": file_bytes(result)}
    return replace(result, report=replace(result.report, before=before, after=after))


def costs(model: nn.Module, batch: Batch | Workload = None) -> dict[str, int]:
    """Parameters, those that are not zero, bytes, and with a batch MACs for one sample."""
    found = {"params": parameters(model), "nonzeros": nonzeros(model).nonzeros, "bytes": nbytes(model)}
    if batch is not None:
        found["macs"] = sum(sample_macs(model, batch).values())
    return found


def distance(
    original: nn.Module, other: nn.Module, batches: Sequence[Batch], divergence: Divergence = kl_divergence
) -> float:
    """Mean divergence over samples of a network's outputs from the original's."""
    return mean_divergence(run(original, batches), run(other, batches), batches, divergence)


def increase(
    original: nn.Module,
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Batch],
    divergence: Divergence = kl_divergence,
) -> str:
    """In words, by how much a network's outputs went further from the original's; "" where that is chance.

    A few samples tell little: only a rise of more than two standard errors counts.
    """
    parts = list(_parts(batches))
    old, new = (
        np.array([distance(original, one, [part], divergence) for part in parts]) for one in (before, after)
    )
    change = new - old
    error = float(change.std(ddof=1)) / len(change) ** 0.5 if len(change) > 1 else 0.0
    if change.mean() <= 2 * error:
        return ""
    return f"on held-out samples the divergence rose from {old.mean():.3g} to {new.mean():.3g}"


def made_with(seed: int) -> dict[str, str]:
    """Versions, the machine and the seed that made a result."""
    return {
        "pysolve": pysolve.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": str(seed),
    }


def _left_alone(study: Study) -> Iterator[str]:
    """Weights that take no other form, by the reason, and their share of the parameters."""
    whole = parameters(study.original)
    for why in dict.fromkeys(one.why for one in study.left):
        own = [one for one in study.left if one.why == why]
        names = ", ".join(one.name or "the network" for one in own)
        yield f"left alone, {sum(one.params for one in own) / whole:.1%} of the parameters ({why}): {names}"


def _given(study: Study) -> int:
    """Samples that the user gave."""
    return study.calibration.seen + study.calibration.out if study.calibration else 0


def _parts(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Parts of batches, whose scatter tells how sure a difference is."""
    for batch in batches:
        count = samples_in(batch)
        # Divergence as a share of the outputs' variance needs several samples.
        size = min(count, max(4, count // PARTS))
        yield from (take(batch, i, i + size) for i in range(0, count - size + 1, size))


def _latencies(
    original: nn.Module, smaller: nn.Module, batch: Batch, seconds: float, asked: int | None = None
) -> tuple[tuple[tuple[Latency, Latency], ...], int]:
    """Times of one sample and of several together, and how many these are."""
    found: dict[int, tuple[Latency, Latency]] = {}
    together = asked or TOGETHER
    for size in (1, together) if batch is not None else ():
        part = take(batch, 0, min(size, together))
        try:
            before, after = latencies((original, smaller), part)
        except (RuntimeError, ValueError):
            # The network's code takes batches of one size alone, or no single sample.
            continue
        found[before.batch_size] = (before, after)
        # Latencies and times of layers, each of both networks; together samples take less than alone.
        calls = 2 * 2 * FEWEST
        while asked is None and size == 1 and together > 1 and calls * together * before.median > seconds:
            together //= 2
    return tuple(found.values()), together
