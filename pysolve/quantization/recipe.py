"""A network quantised as asked: studied, rounded, trained on, laid out and measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from pysolve.account import harm_done
from pysolve.compressed import Compressed, after
from pysolve.correlations import Array, Correlations
from pysolve.errors import PysolveError
from pysolve.layerwise import Material, study_layers, weighted_layers
from pysolve.nn.checkpoint import file_bytes
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.slicing import EMBEDDINGS, WEIGHTED
from pysolve.nn.surgery import apply
from pysolve.quantization.forms import Int8
from pysolve.quantization.layout import laid_out
from pysolve.quantization.network import Quantized, plan_of, quantized, shortened
from pysolve.quantization.retraining import Length, retrained
from pysolve.quantization.single import QuantizedLayer, quantize_layer
from pysolve.quantization.within import beside, within
from pysolve.quantization.worth import Worth, coded_bytes, worth_of
from pysolve.report import Report

SCHEMES = {"int8-dynamic": "int", "int8": "int", "codebook": "codebook", "ternary": "ternary"}
# Bits of a code, unless others are asked for.
BITS = {"int8-dynamic": 8, "int8": 8}
# Share of a target, and least bytes, left for what layouts, training and the report change; how often it is
# tried to hold it.
_SPARE, _FEWEST, _TRIES = 0.01, 24, 4


def _as_it_is(report: Report) -> Report:
    return report


@dataclass(frozen=True)
class Job:
    """What is asked for, in the words of ``quantize``.

    Parameters
    ----------
    scheme : str
    target : int, optional
        Bytes of the file.
    bits, group, method, retrain, layout, ignore, divergence, seed, progress
    told : callable
        From a report to one as long as that which the file will have.
    """

    scheme: str
    bits: int | None = None
    target: int | None = None
    group: int | None = None
    method: str = "feedback"
    retrain: Length = 0
    layout: str = "dense"
    ignore: tuple[str, ...] = ()
    divergence: Divergence = kl_divergence
    seed: int = 0
    progress: bool = True
    told: Callable[[Report], Report] = _as_it_is

    @property
    def run(self) -> dict[str, Any]:
        """Options of what runs through the data."""
        return {"seed": self.seed, "progress": self.progress}

    def fit(self, edges: Collection[str], name: str, W: Array, known: Correlations | None) -> QuantizedLayer:
        """One layer's weights where there is no target; those that are pruned stay zero."""
        keep = W != 0
        found = quantize_layer(
            W,
            known,
            bits=self.bits or BITS.get(self.scheme, 4),
            scheme="codebook" if name in edges else SCHEMES[self.scheme],
            mask=None if keep.all() or not keep.any() else keep,
            group=self.group,
            method=self.method,
        )
        if self.scheme == "int8-dynamic":
            assert isinstance(found.form, Int8)
            return replace(found, form=replace(found.form, dynamic=True))
        return found


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to quantise, and what is known of it.

    Parameters
    ----------
    before : nn.Module or Compressed
        What was given.
    layers : {name: layer}
        To quantise.
    material : Material, optional
        Where there are data.
    notes : tuple of str
    worth : Worth, optional
        Where there is a target.
    begun : Quantized, optional
        What came near the target.
    """

    before: nn.Module | Compressed
    layers: Mapping[str, nn.Module]
    material: Material | None
    notes: tuple[str, ...]
    worth: Worth | None
    begun: Quantized | None = None

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.before.model if isinstance(self.before, Compressed) else self.before


def studied(before: nn.Module | Compressed, batches: Iterable[Any] | None, job: Job) -> Subject:
    """What must be known of a network to quantise it as asked."""
    model = before.model if isinstance(before, Compressed) else before
    # Rows of whole numbers would have no place in a file: each row has its own values.
    kinds = WEIGHTED if SCHEMES[job.scheme] == "int" else (*WEIGHTED, *EMBEDDINGS)
    layers, notes = weighted_layers(model, job.ignore, kinds)
    if job.scheme == "int8-dynamic":
        layers = {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}
    if not layers:
        raise PysolveError(f"there is nothing to quantise: no layer for {job.scheme} has its own weight.")
    material = worth = None
    if batches is not None:
        gathered = job.target is not None
        material = study_layers(model, batches, [*layers], gathered=gathered, progress=job.progress)
        notes += material.notes
    if job.target is not None:
        worth = worth_of(model, layers, material, bits=job.bits or 8, divergence=job.divergence)
    return Subject(before, layers, material, tuple(notes), worth)


def drafted(subject: Subject, job: Job) -> Subject:
    """Quantised to about as many bytes as the file may have, to compare the network with others."""
    assert job.target is not None
    assert subject.worth is not None

    def measure(done: Quantized) -> int:
        return int(sum(map(coded_bytes, done.forms.values())) + beside(subject.model, subject.layers))

    begun = within(subject.model, subject.worth, job.target, measure, rough=True, **job.run)
    return replace(subject, begun=begun)


def carried_out(subject: Subject, job: Job, *, teacher: nn.Module | None = None) -> Compressed:
    """Quantise a network.

    Parameters
    ----------
    subject : Subject
    job : Job
    teacher : nn.Module, optional
        Whose outputs it is trained to give; by default the network's.
    """
    model, material = subject.model, subject.material
    more: tuple[str, ...] = ()
    aim = 0.0 if job.target is None else job.target - _spare(job.target)
    for _ in range(_TRIES):
        done = _rounded(subject, job, aim)
        subject = replace(subject, begun=done)
        if job.retrain and material is not None:
            done, more = _trained(model, done, teacher or model, material, job)
        result = _noted(_finished(subject, job, done), more)
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
    model: nn.Module, done: Quantized, teacher: nn.Module, material: Material, job: Job
) -> tuple[Quantized, tuple[str, ...]]:
    """The network's values after training, and a note where that did harm and was undone."""
    how = job.retrain
    if job.scheme == "ternary":
        how = {"trained": "ternary", **(how if isinstance(how, Mapping) else {"seconds": float(how)})}
    held, kept = material.calibration.held, material.calibration.kept
    new = shortened(model, retrained(model, done, teacher, kept, how, **job.run))
    old, trained = (apply(model, plan_of(one)) for one in (done, new))
    rise = harm_done(teacher, old, trained, held, job.divergence)
    return (done, (f"training was undone, give it more time: {rise}",)) if rise else (new, ())


def _size(result: Compressed, job: Job) -> int:
    """Bytes of the file, with the report as it will be."""
    return file_bytes(replace(result, report=job.told(result.report)))


def _spare(target: int) -> float:
    return max(_SPARE * target, _FEWEST)


def _rounded(subject: Subject, job: Job, aim: float) -> Quantized:
    model, layers = subject.model, subject.layers
    if subject.worth is None:
        names = [*layers]
        # Small, and what matters most.
        edges = {names[0], names[-1]} if job.scheme == "ternary" and len(names) > 2 else set()
        done = quantized(layers, subject.material, partial(job.fit, edges), **job.run)
        return done if SCHEMES[job.scheme] == "int" else shortened(model, done)
    drafts: list[Compressed] = []

    def measure(done: Quantized) -> int:
        # The report alone takes seconds, and its size hardly changes.
        drafts[:] = drafts or [_finished(subject, job, done)]
        return _size(replace(drafts[0], model=apply(model, plan_of(done))), job)

    return within(model, subject.worth, aim, measure, begun=subject.begun, **job.run)


def _noted(result: Compressed, notes: tuple[str, ...]) -> Compressed:
    return replace(result, report=replace(result.report, notes=(*result.report.notes, *notes)))


def _finished(subject: Subject, job: Job, done: Quantized) -> Compressed:
    material = subject.material
    batch = None if material is None else material.calibration.held[0]
    result = laid_out(subject.model, done, job.layout, batch=batch, divergence=job.divergence, seed=job.seed)
    target = None if job.target is None else {"bytes": job.target}
    report = replace(result.report, target=target, notes=(*subject.notes, *result.report.notes))
    return after(subject.before, replace(result, report=report))
