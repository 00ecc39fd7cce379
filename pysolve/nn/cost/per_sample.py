"""Multiply-accumulates of one sample, from runs on a few samples of each shape that the data have."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.errors import DataError
from pysolve.nn.cost.counting import Call, by_layer, calls, shape_of
from pysolve.nn.running import Batch, Inputs, arguments, sample_leaves, with_leaves

# Samples of each shape that a network is counted on, and shapes that are counted: others count as the next
# longer one.
SAMPLES, SHAPES = 2, 8
# A few samples and the calls that they take.
Run: TypeAlias = tuple[Batch, list[Call]]


@dataclass(frozen=True, eq=False)
class Workload:
    """What a network is counted on: a few samples of each shape that the data have.

    Parameters
    ----------
    batches : sequence of batches
    shares : sequence of float
        Of all samples those that each batch stands for; they add up to one.
    """

    batches: Sequence[Batch]
    shares: Sequence[float]


def workload(batches: Sequence[Batch]) -> Workload:
    """The first samples of each shape; where there are many shapes, of some of them."""
    found: dict[tuple[tuple[int, ...] | None, ...], tuple[Batch, int]] = {}
    for batch in batches:
        n, divided = _samples(batch), sample_leaves(batch)
        leaves = enumerate(pytree.tree_leaves(arguments(batch)))
        key = tuple(
            shape_of(leaf)[i in divided :] if isinstance(leaf, Tensor) else None for i, leaf in leaves
        )
        first, known = found.get(key, (batch, 0))
        found[key] = (first, known + n)
    parts = sorted(found.items(), key=lambda one: sum(prod(size) for size in one[0] if size is not None))
    step = -(-len(parts) // SHAPES)
    groups = [[part for _, part in parts[i : i + step]] for i in range(0, len(parts), step)]
    total = sum(n for _, n in found.values())
    return Workload(
        [group[-1][0] for group in groups], [sum(n for _, n in group) / total for group in groups]
    )


def as_workload(example: Batch | Workload) -> Workload:
    """One batch as a workload."""
    return example if isinstance(example, Workload) else workload([example])


def sample_macs(model: nn.Module, example: Batch | Workload) -> dict[str, int]:
    """MACs that one sample takes when it is alone in its batch, by the module that multiplies.

    What runs once a batch, such as a table of positions, counts whole. Of samples of several shapes the mean.
    """
    found, _ = sample_calls_and_weights(model, as_workload(example))
    return {name: round(count) for name, count in by_layer(found).items()}


def sample_calls(model: nn.Module, work: Workload, weights: Sequence[dict[str, float]]) -> list[Call]:
    """All calls for the mean sample, one part of the work after the other."""
    return _mean(work, _runs(model, work), weights)


def sample_calls_and_weights(model: nn.Module, work: Workload) -> tuple[list[Call], list[dict[str, float]]]:
    """All calls for the mean sample, and the weights that say what they take of those of the samples run.

    Weights are, for each part of the work and each module, what to multiply its MACs with to have those of
    one sample. With b MACs a sample and a a batch, n samples take c(n) = a + b n; so a + b is
    c(n) − (n − 1) / n (c(2n) − c(n)) .
    """
    runs = _runs(model, work)
    weights = [_weights(model, *one) for one in runs]
    return _mean(work, runs, weights), weights


def _weights(model: nn.Module, few: Batch, run: Sequence[Call]) -> dict[str, float]:
    """Weights of one part of the work, from its run."""
    n, once = _samples(few), by_layer(run)
    twice = by_layer(_doubled_calls(model, few)) if n > 1 else once
    more = {name: max(0.0, twice.get(name, 2 * count) - count) for name, count in once.items()}
    shares = {name: 1 - (n - 1) / n * more[name] / count for name, count in once.items() if count}
    return {name: min(1.0, max(1 / n, share)) for name, share in shares.items()}


def _mean(work: Workload, runs: Sequence[Run], weights: Sequence[dict[str, float]]) -> list[Call]:
    """Calls for the mean sample, from one run of each part of the work."""
    return [
        call.times(share * weight.get(call.layer, 1 / _samples(few)))
        for (few, run), share, weight in zip(runs, work.shares, weights, strict=True)
        for call in run
    ]


def _runs(model: nn.Module, work: Workload) -> list[Run]:
    return [_run(model, batch) for batch in work.batches]


def _run(model: nn.Module, batch: Batch) -> Run:
    """The first samples and their calls; all samples where the network's code takes no fewer."""
    few = _first(batch)
    if few is not batch:
        # Whatever the network's own code raises.
        with suppress(Exception):
            return few, calls(model, few)
    return batch, calls(model, batch)


def _doubled_calls(model: nn.Module, batch: Batch) -> list[Call]:
    """Calls for every sample twice; none where the network's code takes batches of one size alone."""
    n, leaves = _samples(batch), sample_leaves(batch).items()
    try:
        return calls(model, with_leaves(batch, {i: torch.cat([x, x]) for i, x in leaves if len(x) == n}))
    # Whatever the network's own code raises.
    except Exception:
        return []


def _first(batch: Batch) -> Batch:
    """The first samples of a batch, or the batch where its tensors do not share their samples."""
    n, leaves = _samples(batch), sample_leaves(batch)
    if n <= SAMPLES or any(len(leaf) != n for leaf in leaves.values()):
        return batch
    return with_leaves(batch, {i: leaf[:SAMPLES] for i, leaf in leaves.items()})


def _samples(batch: Batch) -> int:
    """How many samples a batch has: the length of the first tensor that holds them; a graph is one."""
    sizes = [len(leaf) for leaf in sample_leaves(batch).values()]
    if isinstance(batch, Inputs) and not sizes:
        return 1
    if not sizes or not sizes[0]:
        raise DataError("the example must begin with a tensor of at least one sample.")
    return sizes[0]
