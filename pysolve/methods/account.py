"""What became of a network: costs, times, divergence and scores of original and result, as a report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy
import torch
from torch import nn

import pysolve
from pysolve.compressed import Compressed
from pysolve.nn.calibration import samples_in, take
from pysolve.nn.divergence import Divergence, kl_divergence, mean_divergence, run
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.files.architecture import fingerprint
from pysolve.nn.nonzeros import nonzeros
from pysolve.nn.profile import latencies, masses
from pysolve.report.report import Report
from pysolve.report.rows import Latency
from pysolve.report.warnings import slower

Evaluate = Callable[[nn.Module], float]

# Parts of a batch that are compared by themselves.
PARTS = 16
# Samples that are timed together.
BATCHES = (1, 64)


def account(
    original: nn.Module,
    smaller: nn.Module,
    batches: Sequence[Any],
    *,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
) -> Report:
    """Compare a compressed network with its original; what was done to it is for the caller to add.

    Parameters
    ----------
    original, smaller : nn.Module
    batches : sequence of batches
        That no fit has seen; without any, neither divergence nor MACs nor times are taken.
    divergence, seed
        As in ``pysolve.compress``.
    """
    first = batches[0] if batches else None
    mass = () if first is None else masses(original, smaller, take(first, 0, BATCHES[-1]))
    times = () if first is None else _latencies(original, smaller, first)
    return Report(
        before=costs(original, first),
        after=costs(smaller, first),
        sites=(),
        divergence=distance(original, smaller, batches, divergence) if batches else float("nan"),
        samples=0,
        held=sum(map(samples_in, batches)),
        mass=mass,
        latencies=times,
        warnings=tuple(slower(mass)),
        made_with=made_with(seed),
    )


def scored(report: Report, original: nn.Module, smaller: nn.Module, evaluate: Evaluate | None) -> Report:
    """The report with what the user's function says of both networks, if there is one."""
    if evaluate is None:
        return report
    return replace(report, score_before=float(evaluate(original)), score_after=float(evaluate(smaller)))


def costs(model: nn.Module, batch: Any = None) -> dict[str, int]:
    """Parameters, those that are not zero, bytes, and with a batch MACs for one sample."""
    found = {
        "params": parameters(model),
        "nonzeros": nonzeros(model).nonzeros,
        "bytes": nbytes(model),
    }
    if batch is not None:
        # Some networks take no single sample: batch norms without statistics of their own.
        example = take(batch, 0, 2)
        found["macs"] = macs(model, example) // samples_in(example)
    return found


def distance(
    original: nn.Module, other: nn.Module, batches: Sequence[Any], divergence: Divergence = kl_divergence
) -> float:
    """Mean divergence over samples of a network's outputs from the original's."""
    outputs = list(run(original, batches))
    return mean_divergence(outputs, run(other, batches), [*map(samples_in, batches)], divergence)


def harm_done(
    original: nn.Module,
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Any],
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
    return f"on samples held back the divergence rose from {old.mean():.3g} to {new.mean():.3g}"


def _parts(batches: Sequence[Any]) -> Iterator[Any]:
    """Parts of batches, whose scatter tells how sure a difference is."""
    for batch in batches:
        count = samples_in(batch)
        # Divergence as a share of the outputs' variance needs several samples.
        size = min(count, max(4, count // PARTS))
        yield from (take(batch, i, i + size) for i in range(0, count - size + 1, size))


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


def _latencies(original: nn.Module, smaller: nn.Module, batch: Any) -> tuple[tuple[Latency, Latency], ...]:
    found: dict[int, tuple[Latency, Latency]] = {}
    for size in BATCHES:
        part = take(batch, 0, size)
        try:
            before, after = latencies((original, smaller), part)
        except (RuntimeError, ValueError):
            # The network's code takes batches of one size alone, or no single sample.
            continue
        found[before.batch_size] = (before, after)
    return tuple(found.values())


def after(before: nn.Module | Compressed, result: Compressed) -> Compressed:
    """The result of a compression that remembers where what it was given came from."""
    if not isinstance(before, Compressed):
        return replace(result, fingerprint=fingerprint(before))
    return replace(result, earlier=(*before.earlier, before.plan), fingerprint=before.fingerprint)
