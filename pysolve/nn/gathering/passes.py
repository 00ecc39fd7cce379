"""Sums of many layers in as many passes over the data as memory asks for, held in memory or on disk."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.fx import Node

from pysolve.correlations import Correlations
from pysolve.errors import PysolveError
from pysolve.nn import layer_matrix as rows
from pysolve.nn.batches.samples import samples_in
from pysolve.nn.files.sums_folder import SumsFolder, network_checksums
from pysolve.nn.gathering.gather import gathered_layer
from pysolve.nn.gathering.gathered import Gathered, own_outputs
from pysolve.nn.gathering.memory import Bound, free_memory, in_bytes, room_for, sample_bytes, windows
from pysolve.nn.gathering.sums import room
from pysolve.nn.graph.branches import Layer, Read, read_as
from pysolve.nn.graph.export import Graph
from pysolve.nn.progress import part, steps
from pysolve.nn.ranks import ALONE, Ranks, merged
from pysolve.nn.running import Batch, evaluating, same_draws

LOGGER = logging.getLogger("pysolve")
# Matrices of inputs × inputs that are alive at once where a layer's channels are chosen or it is refitted.
MATRICES = 4


@dataclass(frozen=True, eq=False)
class Passes:
    """What is summed, in which passes, and where it is held.

    Parameters
    ----------
    layers : {name: layer}
        All whose correlations are wanted.
    sharing : {name: sequence of str}
        Of the layers whose inputs are summed, all that read the same.
    each : sequence of sequences of str
        The layers whose inputs are summed in each pass.
    on_disk : bool
    samples : int
        That a walk through the graph has memory for.
    said : str
        "" where all is held in memory after one pass.
    """

    layers: Mapping[str, rows.Layer]
    sharing: Mapping[str, Sequence[str]]
    each: Sequence[Sequence[str]]
    on_disk: bool = False
    samples: int = 0
    said: str = ""


def passes_for(
    model: nn.Module,
    first: Batch,
    graph: Graph | None,
    nodes: Mapping[Node, Layer],
    names: Sequence[str],
    bound: Bound | None,
    *,
    once: bool,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Passes:
    """Passes for the correlations of some layers within a bound.

    Parameters
    ----------
    first : batch
        As large as the others are.
    names : sequence of str
    once : bool
        Whether the batches can be gone through only once.
    folder : Path, optional
        For sums that memory has no room for, by default the system's for temporary files.

    Raises
    ------
    PysolveError
        The bound is too small, with the least that would do; or the batches would be needed more than once.
    """
    layers = {name: gathered_layer(model, name) for name in names}
    sharing = _sharing(nodes, names)
    if bound is None:
        samples = room_for(graph, free_memory()) if graph else samples_in(first)
        return Passes(layers, sharing, [[*sharing]], samples=samples)
    inputs = {name: rows.channels(layers[name])[0] * rows.taps(layers[name]) for name in sharing}
    outputs = {name: sum(int(rows.channels(layers[one])[1]) for one in own) for name, own in sharing.items()}
    summed = {name: 8 * d * d for name, d in inputs.items()}
    held = {name: 8 * d * (d + outputs[name]) for name, d in inputs.items()}
    # While a pass ends: one layer's sums become its correlations.
    ending = max(held.values(), default=0)
    working = MATRICES * max(summed.values(), default=0) + max(held.values(), default=0)
    sample = sample_bytes(graph) if graph else 0
    running = sample * samples_in(first) + 12 * max(map(room, inputs.values()), default=0)
    left = min(ranks.all(bound.left() - running))
    if left < working + 2 * sample:
        worst = max(held, key=held.__getitem__, default="the network")
        least = bound.total - left + working + 2 * sample
        raise PysolveError(
            f"memory={bound.words} is too little: the correlations of {worst} and what is made of "
            f"them take {in_bytes(working)}, and a batch of {samples_in(first)} samples {in_bytes(running)}. "
            f"Give at least memory='{-(-least // 2**20)}MiB', or smaller batches."
        )
    everything = sum(held.values())
    samples = room_for(graph, left - working) if graph else samples_in(first)
    if everything <= left // 4:
        samples = room_for(graph, left - working - everything) if graph else samples
        return Passes(layers, sharing, [[*sharing]], samples=samples)
    passes = windows(summed, left - ending)
    if once and len(passes) > 1:
        raise PysolveError(
            f"within memory={bound.words} the sums take {len(passes)} passes over the batches, but "
            "these can be gone through only once: give a list or a loader, or more memory."
        )
    place = Path(tempfile.gettempdir()) if folder is None else folder
    free = shutil.disk_usage(next(one for one in (place, *place.absolute().parents) if one.exists())).free
    if everything > free:
        raise PysolveError(
            f"the sums of {len(held)} layers take {in_bytes(everything)}, more than memory={bound.words} "
            f"leaves, and than the {in_bytes(free)} free in {place}: make room, or give checkpoint= or "
            "TMPDIR another place."
        )
    many = f"{len(passes)} passes" if len(passes) > 1 else "one pass"
    said = f"the sums of {len(held)} layers, {in_bytes(everything)}, were gathered in {many} and kept on disk"
    return Passes(layers, sharing, passes, True, samples, said)


def gathered(
    model: nn.Module,
    stream: Callable[[int], Iterator[Batch]],
    plan: Passes,
    shares: Mapping[str, float],
    double: Collection[str],
    checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
    progress: bool = True,
    *,
    example: Batch | None = None,
) -> Mapping[str, Correlations]:
    """Correlations of the layers that any sample reaches, in their order.

    Parameters
    ----------
    stream : callable
        From the number of a pass to its batches, always the same.
    shares : {layer: share}
        Of the positions.
    double : collection of str
        Layers whose products are float64.
    checkpoint : Path, optional
        Folder where sums are put away; a later call with the same goes on from there.
    ranks : Ranks
        Processes whose sums belong to them.
    example : batch, optional
        The first that the first process gathers.
    """
    first_of = {name: one for one, own in plan.sharing.items() for name in own}
    exact = sorted({first_of[name] for name in double if name in first_of})
    folder = None
    if plan.on_disk or checkpoint is not None:
        layers = {"layers": plan.sharing, "share of positions": shares, "precision": exact}
        identity = {"network": network_checksums(model), **layers} if checkpoint is not None else {}
        own = checkpoint if checkpoint is None or ranks.size == 1 else checkpoint / f"rank-{ranks.rank}"
        folder = SumsFolder(own, identity)
    if plan.said:
        LOGGER.info("%s", plan.said)
    found = dict[str, Correlations]()
    # What any process lacks is gathered by all.
    here = ranks.all({name for name in plan.sharing if folder is not None and folder.has(name)})
    done = set.intersection(*here)
    passes = [[name for name in names if name not in done] for names in plan.each]
    passes = [names for names in passes if names] or [[]]
    for number, names in enumerate(passes):
        sums = Gathered({name: plan.layers[name] for name in names}, shares, exact)
        if ranks.size > 1 and example is not None:
            # Products are rounded as in one process: around the values of the first batch of all.
            sums.start_as(model, example)
        begun = folder.resume(sums) if folder is not None else 0
        batches = stream(number) if folder is None else folder.verified(stream(number))
        with evaluating(model), part(number + 1, len(passes), "passes"):
            for index, batch in enumerate(steps(batches, "gather", unit="batch", shown=progress)):
                if names and index >= begun:
                    # Other draws for every batch, the same in every pass.
                    with same_draws(model, index):
                        sums.run(model, batch)
                    if folder is not None:
                        folder.put_away(sums, index + 1)
        for name, known in _merged(sums, names, ranks):
            made = {} if known is None else {name: known}
            others = [one for one in plan.sharing[name] if one != name]
            for other in others if made else ():
                made[other] = own_outputs(made[name], plan.layers[other])
            if folder is None:
                found |= made
            else:
                folder.add(name, made)
    if folder is not None:
        return folder.correlations(plan.layers)
    return {name: found[name] for name in plan.layers if name in found}


def _merged(sums: Gathered, names: Sequence[str], ranks: Ranks) -> Iterator[tuple[str, Correlations | None]]:
    """Correlations of layer after layer, over all processes; None where no sample has reached any."""
    reached = set().union(*ranks.all({*sums.sums}))
    for name in names:
        layer = sums.layers[name]
        (inputs, outputs), taps = rows.channels(layer), rows.taps(layer)
        own = sums.pop(name, taps) if name in sums.sums else None
        yield name, merged(own, inputs * taps, outputs, taps, ranks) if name in reached else None


def _sharing(nodes: Mapping[Node, Layer], names: Sequence[str]) -> dict[str, list[str]]:
    """Layers that read the same tensor, by the one that is first in the graph."""
    first: dict[Read, str] = {}
    reads = {
        one.name: first.setdefault(read_as(one, node), one.name)
        for node, one in nodes.items()
        if one.calls == 1 and one.name in names
    }
    sharing: dict[str, list[str]] = {}
    for name in names:
        sharing.setdefault(reads.get(name, name), []).append(name)
    return sharing
