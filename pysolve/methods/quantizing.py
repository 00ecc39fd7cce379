"""A network quantised as asked: studied, rounded, trained on, laid out and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from pysolve.compressed import Compressed
from pysolve.errors import PysolveError
from pysolve.methods.account import after, harm_done
from pysolve.methods.coded_layout import laid_out
from pysolve.methods.quantized import Quantized, plan_of, quantized
from pysolve.methods.retraining import retrained
from pysolve.methods.subject import SCHEMES, Job, Subject
from pysolve.methods.within import beside, within
from pysolve.methods.worth import coded_bytes
from pysolve.nn.apply import apply
from pysolve.nn.files.checkpoint import file_bytes

# Share of a target, and least bytes, left for what layouts, training and the report change; how often it is
# tried to hold it.
_SPARE, _FEWEST, _TRIES = 0.01, 24, 4


def drafted(subject: Subject, job: Job) -> Subject:
    """Quantised to about as many bytes as the file may have, to compare the network with others."""
    assert job.target is not None

    def measure(done: Quantized) -> int:
        return int(sum(map(coded_bytes, done.forms.values())) + beside(subject))

    begun = within(subject, job.target, measure, rough=True, **job.run)
    return replace(subject, begun=begun)


def carried_out(subject: Subject, job: Job, *, teacher: nn.Module | None = None) -> Compressed:
    """Quantise a network.

    Parameters
    ----------
    subject : Subject
    job : Job
    teacher : nn.Module, optional
        What it is trained towards and compared with; by default the network.
    """
    teacher = teacher or subject.model
    more: tuple[str, ...] = ()
    aim = 0.0 if job.target is None else job.target - _spare(job.target)
    for _ in range(_TRIES):
        done = _rounded(subject, job, aim, teacher)
        subject, aim = replace(subject, begun=done), done.bytes or aim
        if job.retrain and subject.material is not None:
            done, more = _trained(subject, done, teacher, job)
        result = _noted(_finished(subject, job, done, teacher), more)
        if job.target is None:
            return result
        size = _size(result, job)
        if size <= job.target - _spare(job.target) / 2:
            return result
        # Layouts and training may have made it larger.
        aim -= size - job.target + _spare(job.target)
    raise PysolveError(
        f"the file has {size:,} bytes where {job.target:,} are wanted, as its layers run or after training: "
        'give a larger target, layout="dense", or no trained="both".'
    )


def _trained(
    subject: Subject, done: Quantized, teacher: nn.Module, job: Job
) -> tuple[Quantized, tuple[str, ...]]:
    """The network's values after training, and a note where that did harm and was undone."""
    how = job.retrain
    if job.scheme == "ternary":
        how = {"trained": "ternary", **(how if isinstance(how, Mapping) else {"seconds": float(how)})}
    assert subject.material is not None
    model, data = subject.model, subject.material.calibration
    new = subject.shortened(retrained(model, done, teacher, data.kept, how, **job.run))
    old, trained = (apply(model, plan_of(one)) for one in (done, new))
    rise = harm_done(teacher, old, trained, data.held, job.divergence)
    return (done, (f"training was undone, give it more time: {rise}",)) if rise else (new, ())


def _size(result: Compressed, job: Job) -> int:
    """Bytes of the file, with the report as it will be."""
    return file_bytes(replace(result, report=job.told(result.report)))


def _spare(target: int) -> float:
    return max(_SPARE * target, _FEWEST)


def _rounded(subject: Subject, job: Job, aim: float, teacher: nn.Module) -> Quantized:
    model, layers = subject.model, subject.layers
    if subject.worth is None:
        names = [*layers]
        # Small, and what matters most.
        edges = {names[0], names[-1]} if job.scheme == "ternary" and len(names) > 2 else set()
        done = quantized(layers, subject.material, partial(job.fit, edges), **job.run)
        return done if SCHEMES[job.scheme] == "int" else subject.shortened(done)
    drafts: list[Compressed] = []

    def measure(done: Quantized) -> int:
        # The report alone takes seconds, and its size hardly changes.
        drafts[:] = drafts or [_finished(subject, job, done, teacher)]
        return _size(replace(drafts[0], model=apply(model, plan_of(done))), job)

    assert job.target is not None
    return within(subject, job.target, measure, spare=job.target - aim, **job.run)


def _noted(result: Compressed, notes: tuple[str, ...]) -> Compressed:
    return replace(result, report=replace(result.report, notes=(*result.report.notes, *notes)))


def _finished(subject: Subject, job: Job, done: Quantized, teacher: nn.Module) -> Compressed:
    material = subject.material
    batch = None if material is None else material.calibration.held[0]
    how: Any = {"against": teacher, "batch": batch, "divergence": job.divergence, "seed": job.seed}
    result = laid_out(subject.model, done, job.layout, **how)
    target = None if job.target is None else {"bytes": job.target}
    report = replace(result.report, target=target, notes=(*subject.notes, *result.report.notes))
    return after(subject.before, replace(result, report=report))
