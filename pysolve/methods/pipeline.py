"""The stages of deep compression, one after the other."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from pysolve.compressed import Compressed
from pysolve.errors import PysolveError
from pysolve.forms import Codebook, Sparse
from pysolve.methods.account import Evaluate, after, distance
from pysolve.methods.quantized import plan_of, weight_name
from pysolve.methods.quantizing import carried_out, drafted
from pysolve.methods.retraining import Length, options_of
from pysolve.methods.selected import Job as Pruning
from pysolve.methods.shrink import shrink
from pysolve.methods.single_weights import prune_weights
from pysolve.methods.sizes import channels_to_keep, check_free
from pysolve.methods.study import Study, study
from pysolve.methods.subject import Job, Subject, studied
from pysolve.nn.apply import apply
from pysolve.nn.calibration import Calibration, first_samples
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.files.checkpoint import file_bytes
from pysolve.report.rows import Stage
from pysolve.training.distill import distill

# Bits a weight at which the search for a width begins, the factor between widths, and how many are tried.
_BITS, _WIDER, _WIDTHS = 2.0, 1.6, 5
# Samples at most, beside those held back, that tell which one is best.
_SAMPLES = 4096
# Share of the parameters from which on all channels stay; of the training, before weights share values.
_WHOLE, _BEFORE = 0.9, 0.6


@dataclass(frozen=True, eq=False)
class Width:
    """A network with channels for a share of its parameters.

    Parameters
    ----------
    share : float
    harm : float
        Divergence of its outputs within about the bytes; infinite where no channels are so few.
    subject : Subject, optional
        What that was measured on.
    """

    share: float
    harm: float = float("inf")
    subject: Subject | None = None


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The stages of ``deep_compress``, each a method, and what they left of a network.

    Parameters
    ----------
    before : nn.Module or Compressed
        What was given.
    original : nn.Module
        Its network.
    batches : sequence of batches
    job : Job
        How weights come to share values.
    zeros : float, optional
        Share of the weights that is pruned.
    evaluate : callable, optional
    calibration : Calibration
        What is trained on, and what divergences are measured on.
    stages : list of Stage
    notes : list of str
    """

    before: nn.Module | Compressed
    original: nn.Module
    batches: Iterable[Any]
    job: Job
    zeros: float | None
    evaluate: Evaluate | None
    calibration: Calibration
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, name: str, network: nn.Module, size: int, start: float | None = None) -> None:
        """Write down what a stage that began at ``start`` left."""
        seconds = 0.0 if start is None else time.perf_counter() - start
        score = None if self.evaluate is None else float(self.evaluate(network))
        self.stages.append(Stage(name, size, parameters(self.original), self.lost(network), seconds, score))

    def lost(self, network: nn.Module) -> float:
        """Divergence of a network's outputs from the original's."""
        return distance(self.original, network, self.calibration.held, self.job.divergence)

    def channels(self, share: float | None) -> Study | None:
        """What is known of the channels, if some may go."""
        if (share is None and self.job.target is None) or (share is not None and share >= 1):
            return None
        options: Any = {"ignore": self.job.ignore, "divergence": self.job.divergence}
        try:
            found = study(self.original, self.batches, **options, progress=self.job.progress)
            check_free(found)
            return found
        except PysolveError as error:
            if share is not None:
                raise
            self.notes.append(f"all channels stay: {error}")
            return None

    def width(self, found: Study, share: float) -> Width:
        """What channels for a share of the parameters do within the bytes."""
        try:
            smaller = self.kept(found, share)
        except PysolveError:
            return Width(share)
        subject = drafted(studied(smaller, self.batches, self.job), self.job)
        assert subject.begun is not None
        network, known = apply(subject.model, plan_of(subject.begun)), self.calibration
        # Those held back alone are too few to tell widths apart.
        seen = [*first_samples(known.kept, _SAMPLES), *known.held]
        return Width(share, distance(self.original, network, seen, self.job.divergence), subject)

    def kept(self, found: Study, share: float) -> nn.Module | Compressed:
        """The network with channels for a share of its parameters."""
        if share >= 1:
            return self.before
        fresh = replace(found, harms=[dict(known) for known in found.harms])
        sizes = channels_to_keep(fresh, {"params": share}, None, None, 1)
        return after(self.before, shrink(fresh, sizes, seed=self.job.seed, progress=self.job.progress))

    def collapsed(self, share: float | None) -> tuple[nn.Module | Compressed, Subject | None]:
        """With fewer channels; without a share, as many as is best, and what that was told by."""
        start = time.perf_counter()
        found = self.channels(share)
        if found is None:
            return self.before, None
        width = Width(share) if share is not None else self.best(found)
        smaller = self.kept(found, width.share) if width.subject is None else width.subject.before
        if width.share < 1:
            assert isinstance(smaller, Compressed)
            self.note("collapsed", smaller.model, nbytes(smaller.model), start)
        return smaller, width.subject

    def best(self, found: Study) -> Width:
        """The width that leaves the least divergence within the bytes."""
        assert self.job.target is not None
        width = _least(partial(self.width, found), 8 * self.job.target / _BITS / parameters(self.original))
        # So few bytes that no width comes near: all channels will tell how many it takes.
        return width if width.subject is not None else Width(1.0)

    def taught(self, smaller: nn.Module | Compressed, retrain: Length) -> nn.Module | Compressed:
        """Trained to give the original's outputs, where channels went."""
        if not retrain or not isinstance(smaller, Compressed) or smaller is self.before:
            return smaller
        start = time.perf_counter()
        student = copy.deepcopy(smaller.model)
        _, options = options_of(_part(retrain, _BEFORE))
        distill(student, self.original, self.calibration.kept, **{**self.job.run, **options})
        self.note("retrained", student, nbytes(student), start)
        return replace(smaller, model=student)

    def pruned(self, smaller: nn.Module | Compressed) -> nn.Module | Compressed:
        """With zeros."""
        if not self.zeros:
            return smaller
        start = time.perf_counter()
        how = Pruning("obs", {"amount": self.zeros}, "global", "sequential", **self.job.run)
        result = prune_weights(smaller, self.batches, how, layout="dense", ignore=self.job.ignore)
        self.note("sparse", result.model, file_bytes(result, coding="none", report=False), start)
        return result

    def shared(self, smaller: nn.Module | Compressed, known: Subject | None, retrain: Length) -> Compressed:
        """With few values, trained on; ``known`` tells of the network as it was once collapsed."""
        start = time.perf_counter()
        subject = known if known and known.before is smaller else studied(smaller, self.batches, self.job)
        part = _part(retrain, 1 - _BEFORE if len(self.stages) > 1 else 1.0) if retrain else 0
        result = carried_out(subject, replace(self.job, retrain=part), teacher=self.original)
        name = "shared, retrained" if retrain else "shared"
        self.note(name, result.model, _packed(subject.model, result), start)
        return result


def _least(width: Callable[[float], Width], start: float) -> Width:
    """The width of least harm: up, or else down, as long as that gains."""
    best = width(start if start < _WHOLE else 1.0)
    tried = {best.share: best.harm}
    for factor in (_WIDER, 1 / _WIDER):
        share = next(iter(tried))
        while len(tried) < _WIDTHS and tried[share] <= best.harm:
            share = share * factor if share * factor < _WHOLE else 1.0
            if share in tried:
                break
            new = width(share)
            tried[share] = new.harm
            best = new if new.harm < best.harm else best
    return best


def _packed(smaller: nn.Module, result: Compressed) -> int:
    """Bytes with codes of equal length and their values, of those that are not zero where this is less."""
    total = nbytes(smaller)
    for line in result.report.layers:
        form = result.plan.forms.get(weight_name(line.name))
        weight = result.plan.values[weight_name(line.name)] if form is None else form.dense()
        values, codes = np.unique(weight, return_inverse=True)
        book = Codebook(codes.astype(np.uint8), values)
        sparse = Sparse.from_dense(weight)
        entries = sparse.gaps.nbytes + len(sparse.values) * book.bits // 8 + values.nbytes
        total += min(book.nbytes, entries) - weight.nbytes
    return total


def _part(retrain: Length, share: float) -> Length:
    """Some of the training."""
    if not isinstance(retrain, Mapping):
        return share * retrain
    whole = {name: share * retrain[name] for name in ("seconds", "epochs") if name in retrain}
    return {**retrain, **{name: max(1, round(v)) if name == "epochs" else v for name, v in whole.items()}}
