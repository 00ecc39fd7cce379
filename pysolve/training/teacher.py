"""Training a student on its teacher's outputs, which are cached where that pays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pysolve.errors import DataError
from pysolve.nn.calibration import free_memory
from pysolve.nn.running import Batch, Output, device_of, evaluating, find_layer, forward
from pysolve.training.batches import BatchSource, Key, Keyed, cached
from pysolve.training.features import channel_dim, maps_between, unexplained
from pysolve.training.loop import (
    Extras,
    computing,
    in_float32,
    nonfinite_batch,
    nonfinite_sample,
    optimise,
)
from pysolve.training.loss import DistillationLoss, floating, output_loss
from pysolve.training.options import Run

# With a limit in seconds, computing the teacher's outputs beforehand may take this share of them.
_SHARE = 0.25


@dataclass(frozen=True)
class Tapped:
    """A network, and the features of its matched layers in the last pass."""

    model: nn.Module
    features: Callable[[], list[Tensor]]

    def outputs(self, batch: Batch, run: Run) -> tuple[Output, list[Tensor], list[Tensor]]:
        """The output, its compared tensors and the features, the latter two in float32 at least."""
        device = device_of(self.model)
        with computing(run, device):
            output = forward(self.model, batch, device)
        return output, in_float32(floating(output)), in_float32(self.features())


def train_student(
    student: Tapped,
    teacher: Tapped,
    terms: DistillationLoss,
    run: Run,
    source: BatchSource,
    *,
    cache: bool | None,
    settings: Mapping[str, object],
) -> list[float]:
    """Train a student, in the modes that the networks are in."""
    maps, dims = _maps(student, teacher, terms, run, source)
    known: Callable[[Key], list[Tensor]] | None = None

    def ask(key: Key, batch: Batch) -> list[Tensor]:
        """The teacher's outputs, then its features."""
        with torch.no_grad():
            _, outputs, features = teacher.outputs(batch, run)
        return _finite([*outputs, *features], key)

    def fill_cache() -> None:
        nonlocal known
        if source.stored is not None and cache is not False and not terms.mix:
            known = cached(source, ask, math.inf if cache else _cache_limit(source, run, ask))

    def loss_of(item: Keyed) -> Tensor:
        key, batch = item
        given = ask(key, batch) if known is None else known(key)
        output, outputs, features = student.outputs(batch, run)
        wanted = [one.to(outputs[0].device) for one in given] if outputs else given
        count = len(wanted) - len(features)
        value = output_loss(terms, output, outputs, wanted[:count], batch)
        together = zip(features, wanted[count:], maps, dims, strict=True)
        return value + terms.feature_weight * sum(unexplained(*one) for one in together) if dims else value

    def nonfinite(item: Keyed, number: int) -> str:
        key, batch = item
        if isinstance(key, Tensor) and source.samples is not None:
            return nonfinite_sample(source.samples, key)
        return nonfinite_batch(batch, number)

    extras = Extras[Keyed](
        auxiliary=maps if any(True for _ in maps.parameters()) else None,
        generators=source.generators,
        prepare=fill_cache,
        settings={**settings, **terms.settings()},
        nonfinite=nonfinite,
    )
    return optimise(student.model, loss_of, run, source.passes, extras)


def _cache_limit(source: BatchSource, run: Run, ask: Callable[[Key, Batch], list[Tensor]]) -> float:
    """Bytes of the teacher's outputs that may be cached by default."""
    if run.epochs == 1 or source.stored is None:
        return 0
    if run.seconds is not None:
        start = time.perf_counter()
        ask(0, source.stored[0])
        if (time.perf_counter() - start) * len(source.stored) > _SHARE * run.seconds:
            return 0
    return free_memory()


def _maps(
    student: Tapped, teacher: Tapped, terms: DistillationLoss, run: Run, source: BatchSource
) -> tuple[nn.ModuleList, list[int]]:
    """Maps between the channels of the matched layers, and the dimensions of these channels."""
    if not terms.pairs:
        return nn.ModuleList(), []
    batch = source.first()
    with evaluating(student.model, teacher.model):
        (_, _, own), (_, _, hints) = (one.outputs(batch, run) for one in (student, teacher))
    layers = [find_layer(student.model, name) for name in terms.pairs]
    dims = [channel_dim(layer, feature) for layer, feature in zip(layers, own, strict=True)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(run.seed))
        return maps_between(terms.pairs, dims, own, hints), dims


def _finite(outputs: list[Tensor], key: Key) -> list[Tensor]:
    """The teacher's outputs, checked to be finite."""
    for output in outputs:
        if not bool(output.isfinite().all()):
            where = f"batch {key + 1}" if isinstance(key, int) else _nonfinite_rows(output, key)
            raise DataError(
                f"the teacher's outputs hold NaN or infinity in {where}: check the batches and its weights."
            )
    return outputs


def _nonfinite_rows(output: Tensor, rows: Tensor) -> str:
    if len(output) != len(rows):
        return f"samples {rows.tolist()}"
    finite = output.reshape(len(output), -1).isfinite().all(1).cpu()
    return f"sample {int(rows[~finite][0])}"
