"""The user's batches in one pass: samples to fit, samples held out to choose sizes and to report on, sums."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import length_hint
from pathlib import Path

from torch import nn
from torch.fx import Node

from pysolve.correlations import Correlations
from pysolve.errors import DataError
from pysolve.nn.batches.samples import (
    first_samples,
    joined_within,
    later_samples,
    moved,
    samples_in,
    take,
)
from pysolve.nn.batches.sound import sound
from pysolve.nn.gathering.memory import Bound, room_for, sample_bytes
from pysolve.nn.gathering.passes import gathered, passes_for
from pysolve.nn.graph.branches import Layer
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.sizes import hint, traced_samples
from pysolve.nn.layer_matrix import channels, taps
from pysolve.nn.ranks import ALONE, Ranks
from pysolve.nn.running import Batch, Device, device_of

# One sample of so many is held out, up to so many to choose sizes by and so many for the report.
HELD_OF, HELD_SAMPLES, APART_SAMPLES = 8, 256, 128
# Fewer samples than these tell too little to set them apart for the report.
LEAST_APART = 16
# Rows (samples × positions) to gather for a layer, as a multiple of its inputs.
ROWS_PER_INPUT = 60
# Bytes of results that samples of one batch that is held out may have, and their share of a bound.
RESULTS, SHARE = 2**29, 8


@dataclass(eq=False)
class Calibration:
    """Samples kept at hand while any amount of data streams by.

    Parameters
    ----------
    limit : int
        Samples that may be kept for the refit.
    held : list of batches
        Held out from every fit: the selection set, on which sizes are chosen.
    apart : list of batches
        Held out from every fit and every choice, for the report: a third of what is held out; ``held`` where
        that is too few.
    kept : list of batches
        For the refit.
    seen : int
        Samples that were given on to be gathered.
    out : int
        Samples that were held out. Of fewer than eight samples none are: ``held`` are then some of ``kept``.
    """

    limit: int
    held: list[Batch] = field(default_factory=list)
    apart: list[Batch] = field(default_factory=list)
    kept: list[Batch] = field(default_factory=list)
    seen: int = 0
    out: int = 0

    def stream(
        self, batches: Iterable[Batch], ranks: Ranks = ALONE, together: int = sys.maxsize
    ) -> Iterator[Batch]:
        """The batches without what is held out, keeping what may be kept; each process its own.

        Batches of what is held out have at most so many samples ``together``.
        """
        room, out = self.limit, list[tuple[int, Batch]]()
        for number, batch, held in self._divided(batches, ranks):
            n = samples_in(batch)
            out += [(number, take(batch, 0, held))] if held else []
            if held == n:
                continue
            rest = take(batch, held, n) if held else batch
            if room > 0:
                self.kept.append(take(rest, 0, min(room, n - held)))
                room -= n - held
            yield rest
        every = sorted((one for own in ranks.all(out) for one in own), key=lambda one: one[0])
        kept = [] if every else ranks.first(first_samples(self.kept, HELD_SAMPLES))
        self._set_apart([batch for _, batch in every], kept, together)

    def _set_apart(self, out: list[Batch], kept: list[Batch], together: int) -> None:
        """Share what is held out between choices and the report; of too few samples, some of those kept."""
        apart = min(APART_SAMPLES, self.out // 3)
        chosen_on = self.out - (apart if apart >= LEAST_APART else 0)
        self.held = joined_within(first_samples(out or kept, chosen_on or HELD_SAMPLES), together)
        self.apart = joined_within(later_samples(out, chosen_on), together) or self.held

    def again(self, batches: Iterable[Batch], ranks: Ranks = ALONE) -> Iterator[Batch]:
        """What ``stream`` has given on, of the same batches once more."""
        for _, batch, held in Calibration(0)._divided(batches, ranks):
            n = samples_in(batch)
            if held < n:
                yield take(batch, held, n) if held else batch

    def _divided(self, batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[int, Batch, int]]:
        """This process's batches, their numbers among all, and how many samples of each are held out."""
        number = 0
        for batch, counts in ranks.together(batches, samples_in):
            for rank, count in enumerate(counts):
                held = _held_of(count, self.seen, self.out)
                self.seen, self.out = self.seen + count - held, self.out + held
                if rank == ranks.rank and batch is not None:
                    yield number, batch, held
                number += 1

    def within(self, graph: Graph | None, bound: Bound | None) -> Calibration:
        """The same, with no more samples for the refit than a bound has room for."""
        if graph is None or bound is None:
            return self
        limit = room_for(graph, bound.left() // 2)
        return replace(self, limit=limit, kept=first_samples(self.kept, limit))

    def on(self, device: Device) -> Calibration:
        """The same, with all samples on a device."""
        lists = (self.held, self.apart, self.kept)
        held, apart, kept = ([moved(batch, device) for batch in one] for one in lists)
        return replace(self, held=held, apart=apart, kept=kept)

    def __add__(self, other: Calibration) -> Calibration:
        """The samples of both."""
        both = {one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        return Calibration(**both)

    @property
    def fitted_on(self) -> bool:
        """Whether there were too few samples to hold any out."""
        return self.seen > 0 and not self.out


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    first: Batch,
    graph: Graph | None,
    nodes: Mapping[Node, Layer],
    layers: Sequence[str],
    *,
    bound: Bound | None = None,
    checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
    double: Collection[str] = (),
    progress: bool = True,
) -> tuple[Calibration, Mapping[str, Correlations], str]:
    """Share the batches out, and gather the correlations of some layers on the way.

    Parameters
    ----------
    batches, first
        What ``peek`` gave.
    graph : Graph, optional
        For how many samples there is memory; without it, a batch's are kept.
    nodes : {Node: Layer}
        Of the graph.
    layers : sequence of str
        Whose correlations to gather; without any, the network does not run. Those that no sample reaches
        have none.
    double : collection of str
        Layers whose products are float64.
    bound : Bound, optional
        Memory of the call; without, samples may take half of what is free when they walk through the graph,
        and all sums are held at once.
    checkpoint : Path, optional
        Folder for sums, from which a killed run goes on.
    ranks : Ranks
        Processes that have the other batches.

    Returns
    -------
    Calibration, {layer: Correlations}, str
        And what is to be said of the passes; "" of a single one.
    """
    if not samples_in(first):
        raise DataError("there are no samples: the first batch is empty.")
    # Of how many batches an iterator has, ten is as good a guess as any.
    total = sum(ranks.counts(samples_in(first) * length_hint(batches, 10)))
    shares = _shares(graph, nodes, layers, total) if graph else dict.fromkeys(layers, 1.0)
    count = samples_in(first)
    example = take(first, _held_of(count, 0, 0), count)
    once = isinstance(batches, Iterator)
    plan = passes_for(model, first, graph, nodes, layers, bound, once=once, folder=checkpoint, ranks=ranks)
    calibration = Calibration(plan.samples)
    most = RESULTS if bound is None else min(RESULTS, min(ranks.all(bound.left())) // SHARE)
    together = max(count, 2, most // max(1, sample_bytes(graph))) if graph else sys.maxsize
    together = max(ranks.counts(together))

    def stream(number: int) -> Iterator[Batch]:
        if number:
            return calibration.again(batches, ranks)
        given = sound(model, batches, first, graph, run=not layers)
        return calibration.stream(given, ranks, together)

    found = gathered(model, stream, plan, shares, double, checkpoint, ranks, progress, example=example)
    # What other processes have sent is on the CPU.
    return calibration if ranks.size == 1 else calibration.on(device_of(model)), found, plan.said


def _held_of(count: int, seen: int, out: int) -> int:
    """How many of a batch's samples are held out, after so many that were and were not."""
    due = (seen + out + count) // HELD_OF - out
    return max(0, min(count, due, HELD_SAMPLES + APART_SAMPLES - out))


def _shares(
    graph: Graph, nodes: Mapping[Node, Layer], readers: Sequence[str], samples: int
) -> dict[str, float]:
    """Which part of its positions each layer is to be gathered over."""
    shares, traced = dict.fromkeys(readers, 1.0), traced_samples(graph)
    for node, layer in nodes.items():
        if layer.name in shares:
            inputs, outputs = channels(layer.module)
            rows = hint(node.meta["val"].numel()) / max(1, outputs) / traced * samples
            shares[layer.name] = min(1.0, ROWS_PER_INPUT * inputs * taps(layer.module) / max(1.0, rows))
    return shares
