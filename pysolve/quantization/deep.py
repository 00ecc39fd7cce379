"""``deep_compress``: channels, zeros and bits under one number of bytes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from pysolve.account import Evaluate, account, distance, scored
from pysolve.checks import check_model
from pysolve.compressed import Compressed, after
from pysolve.entries import Stage
from pysolve.errors import PysolveError
from pysolve.layerwise import study_layers
from pysolve.nn.checkpoint import file_bytes
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.pruning.selected import Job as Pruning
from pysolve.pruning.weights import prune_weights
from pysolve.quantization.forms import Codebook
from pysolve.quantization.layout import LAYOUTS, with_file
from pysolve.quantization.network import weight_name
from pysolve.quantization.recipe import Job, carried_out
from pysolve.quantization.retraining import Length, options_of
from pysolve.shrink import shrink
from pysolve.sizes import channels_to_keep
from pysolve.study import Study, study
from pysolve.training.distill import distill

# Bits a weight at which the search for a width begins, the factor between widths, and how many are tried.
_BITS, _WIDER, _WIDTHS = 2.0, 1.6, 5
# Share of the parameters from which on all channels stay; of the training, before weights share values.
_WHOLE, _BEFORE = 0.9, 0.6


def deep_compress(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    target_bytes: float | None = None,
    target_params: float | None = None,
    zeros: float | None = None,
    bits: int | None = None,
    retrain: Length = 0,
    layout: str = "dense",
    ignore: Sequence[str] = (),
    evaluate: Evaluate | None = None,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make the file of a network as small as asked: fewer channels, zeros, few shared values, entropy coding.

    Each stage is left out where nothing asks for it, and all of them compete where only bytes are given.

    1. *Collapse*: channels go, and what is left is refitted, as ``compress`` does it.
    2. *Sparse*: a share of the weights becomes zero, as ``prune`` does it by "obs".
    3. *Shared*: the others take few values, as ``quantize`` does it with a codebook.
    4. *Retrained*: the values, biases and norms, to give the original's outputs, without labels.
    5. *Coded*: in the file that ``save`` writes.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed.
    batches : iterable of batches
        As ``compress`` takes them, unlabelled.
    target_bytes : float, optional
        What the file may take: a number, or a share of the original's tensors. Zeros and values follow from
        one price of a bit for all layers; of several widths that one is taken whose outputs on samples held
        back are closest to the original's.
    target_params : float, optional
        Parameters after the collapse, a number or a share; 1 leaves all channels. By default searched for
        with ``target_bytes``, and otherwise 1.
    zeros : float, optional
        Share of the weights that is pruned before the rest is quantised; by default none by itself.
    bits : int, optional
        At most 2^bits values a layer; without ``target_bytes``, as many in every layer, by default 16.
    retrain : number of seconds, or options of ``distill``
        Three fifths of the time before weights share values, the rest afterwards.
    layout, ignore, evaluate, divergence, seed, progress
        As ``quantize`` has them.

    Returns
    -------
    Compressed
        Its report has a table of the stages, and under ``file`` what ``save`` writes, to the byte.

    Raises
    ------
    PysolveError
        A target out of reach.

    References
    ----------
    S. Han, H. Mao, W. J. Dally, Deep compression, 2016.
    """
    original = model.model if isinstance(model, Compressed) else model
    check_model(original)
    _check(target_bytes, target_params, zeros, bits, retrain, layout)
    if iter(batches) is batches:
        batches = list(batches)
    whole = nbytes(original)
    size = None if target_bytes is None else int(target_bytes if target_bytes > 1 else target_bytes * whole)
    job = Job(
        "codebook",
        bits,
        size,
        layout=layout,
        ignore=tuple(ignore),
        divergence=divergence,
        seed=seed,
        progress=progress,
    )
    pool = study_layers(original, batches, [], gathered=False, progress=False).calibration.held
    line = _Line(model, original, batches, job, zeros, evaluate, pool)
    line.note("original", original, nbytes(original))
    share = _share(target_params, parameters(original))
    found = line.studied(share)
    smaller = line.collapsed(found, line.width(found) if share is None else share)
    smaller = line.taught(smaller, retrain)
    smaller = line.pruned(smaller)
    result = line.shared(smaller, retrain)
    asked = {"bytes": target_bytes, "params": target_params}
    report = replace(
        account(original, result.model, line.held, divergence=divergence, seed=seed),
        target={what: value for what, value in asked.items() if value is not None} or None,
        sites=smaller.report.sites if isinstance(smaller, Compressed) and smaller is not model else (),
        layers=result.report.layers,
        samples=result.report.samples,
        notes=(*line.notes, *result.report.notes),
    )
    report = scored(report, original, result.model, evaluate)
    result = with_file(replace(result, report=report), original)
    line.note("coded", result.model, result.report.after["file"])
    return replace(result, report=replace(result.report, stages=tuple(line.stages)))


@dataclass(frozen=True, eq=False)
class _Line:
    """The stages of a network on its way, and what each of them left."""

    before: nn.Module | Compressed
    original: nn.Module
    batches: Iterable[Any]
    job: Job
    zeros: float | None
    evaluate: Evaluate | None
    held: Sequence[Any]
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, name: str, network: nn.Module, size: int, start: float | None = None) -> None:
        """Write down what a stage that began at ``start`` left."""
        seconds = 0.0 if start is None else time.perf_counter() - start
        score = None if self.evaluate is None else float(self.evaluate(network))
        self.stages.append(Stage(name, size, parameters(self.original), self.lost(network), seconds, score))

    def lost(self, network: nn.Module) -> float:
        """Divergence of a network's outputs from the original's."""
        return distance(self.original, network, self.held, self.job.divergence)

    def studied(self, share: float | None) -> Study | None:
        """What is known of the channels, if some may go."""
        if share == 1 or (share is None and self.job.target is None):
            return None
        options: Any = {"ignore": self.job.ignore, "divergence": self.job.divergence}
        try:
            return study(self.original, self.batches, **options, progress=self.job.progress)
        except PysolveError as error:
            if share is not None:
                raise
            self.notes.append(f"all channels stay: {error}")
            return None

    def width(self, found: Study | None) -> float:
        """The share of the parameters that leaves the least divergence within the bytes."""
        if found is None or self.job.target is None:
            return 1.0
        return _least(
            partial(self.harm, found), min(1.0, 8 * self.job.target / _BITS / parameters(self.original))
        )

    def harm(self, found: Study, share: float) -> float:
        """Divergence within the bytes with channels for a share of the parameters."""
        try:
            result = carried_out(self.kept(found, share), self.batches, replace(self.job, layout="dense"))
        except PysolveError:
            # The least that such a width takes is too much.
            return float("inf")
        return self.lost(result.model)

    def kept(self, found: Study, share: float) -> nn.Module | Compressed:
        """The network with channels for a share of its parameters."""
        if share >= _WHOLE:
            return self.before
        fresh = replace(found, harms=[dict(known) for known in found.harms])
        sizes = channels_to_keep(fresh, {"params": share}, None, None, 1)
        return after(self.before, shrink(fresh, sizes, seed=self.job.seed, progress=self.job.progress))

    def collapsed(self, found: Study | None, share: float) -> nn.Module | Compressed:
        """With fewer channels."""
        start = time.perf_counter()
        if found is None or share >= _WHOLE:
            return self.before
        result = self.kept(found, share)
        assert isinstance(result, Compressed)
        self.note("collapsed", result.model, nbytes(result.model), start)
        return result

    def taught(self, smaller: nn.Module | Compressed, retrain: Length) -> nn.Module | Compressed:
        """Trained to give the original's outputs, where channels went."""
        if not retrain or not isinstance(smaller, Compressed) or smaller is self.before:
            return smaller
        start = time.perf_counter()
        student = copy.deepcopy(smaller.model)
        _, options = options_of(_part(retrain, _BEFORE))
        distill(student, self.original, list(self.batches), **{**self.job.run, **options})
        self.note("retrained", student, nbytes(student), start)
        return replace(smaller, model=student)

    def pruned(self, smaller: nn.Module | Compressed) -> nn.Module | Compressed:
        """With zeros."""
        if not self.zeros:
            return smaller
        start = time.perf_counter()
        how = Pruning("obs", {"amount": self.zeros}, "global", "sequential", **self.job.run)
        result = prune_weights(smaller, self.batches, how, layout="dense", ignore=self.job.ignore)
        self.note("sparse", result.model, file_bytes(result, coding="none"), start)
        return result

    def shared(self, smaller: nn.Module | Compressed, retrain: Length) -> Compressed:
        """With few values, trained on."""
        start = time.perf_counter()
        part = _part(retrain, 1 - _BEFORE if len(self.stages) > 1 else 1.0) if retrain else 0
        result = carried_out(smaller, self.batches, replace(self.job, retrain=part), teacher=self.original)
        network = smaller.model if isinstance(smaller, Compressed) else smaller
        name = "shared, retrained" if retrain else "shared"
        self.note(name, result.model, _packed(network, result), start)
        return result


def _least(harm: Callable[[float], float], start: float) -> float:
    """The share of least harm: up, or else down, as long as that gains."""
    tried = {start: harm(start)}
    for factor in (_WIDER, 1 / _WIDER):
        share = start
        while len(tried) < _WIDTHS and min(tried, key=lambda one: tried[one]) == share:
            share = min(1.0, share * factor)
            if share in tried:
                break
            tried[share] = harm(share)
    return min(tried, key=lambda one: tried[one])


def _packed(smaller: nn.Module, result: Compressed) -> int:
    """Bytes with codes of equal length and their values, and all else in full."""
    total = nbytes(smaller)
    for line in result.report.layers:
        form = result.plan.forms.get(line.name)
        weight = result.plan.values[weight_name(line.name)] if form is None else form.dense()
        values, codes = np.unique(weight, return_inverse=True)
        total += Codebook(codes.astype(np.uint8), values).nbytes - weight.nbytes
    return total


def _part(retrain: Length, share: float) -> Length:
    """Some of the training."""
    if not isinstance(retrain, Mapping):
        return share * retrain
    whole = {name: share * retrain[name] for name in ("seconds", "epochs") if name in retrain}
    return {**retrain, **{name: max(1, round(v)) if name == "epochs" else v for name, v in whole.items()}}


def _share(number: float | None, whole: int) -> float | None:
    """A number above 1 as a share of the whole."""
    return number if number is None or number <= 1 else number / whole


def _check(
    target_bytes: Any, target_params: Any, zeros: Any, bits: Any, retrain: Length, layout: str
) -> None:
    """What can be told to be wrong before any work."""
    given = {"target_bytes": target_bytes, "target_params": target_params, "zeros": zeros}
    if all(value is None for value in (*given.values(), bits)):
        raise ValueError(
            f"give one of {', '.join(given)} and bits: nothing says how small the file is to be."
        )
    for name, value in given.items():
        if value is not None and not (isinstance(value, Real) and 0 < float(value) < np.inf):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    if zeros is not None and zeros >= 1:
        raise ValueError(f"zeros must be a share below 1, got {zeros}.")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if retrain:
        options_of(retrain)
