"""The user's batches in one pass: samples to fit, samples held out to choose sizes and to report on, sums."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from pysolve.correlations import Correlations
from pysolve.errors import DataError
from pysolve.nn.gather import gather_reached, own_outputs
from pysolve.nn.graph.branches import Layer, read_as
from pysolve.nn.graph.export import Graph, admits
from pysolve.nn.items import Transform, batched
from pysolve.nn.layer_matrix import channels, taps
from pysolve.nn.outputs import main_output
from pysolve.nn.refusal import by_name, in_words, output_of
from pysolve.nn.running import (
    NO_BATCHES,
    Batch,
    Inputs,
    arguments,
    evaluating,
    few_samples,
    forward,
    sample_leaves,
    with_leaves,
)
from pysolve.nn.walk import last_uses

# One sample of so many is held out, up to so many to choose sizes by and so many for the report.
HELD_OF, HELD_SAMPLES, APART_SAMPLES = 8, 256, 128
# Fewer samples than these tell too little to set them apart for the report.
LEAST_APART = 16
# Rows (samples × positions) to gather for a layer, as a multiple of its inputs.
ROWS_PER_INPUT = 60


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

    def stream(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches without what is held out, keeping what may be kept."""
        room, out = self.limit, list[Batch]()
        for batch in batches:
            n = samples_in(batch)
            due = (self.seen + self.out + n) // HELD_OF - self.out
            held = max(0, min(n, due, HELD_SAMPLES + APART_SAMPLES - self.out))
            out += [take(batch, 0, held)] if held else []
            self.out += held
            if held == n:
                continue
            rest = take(batch, held, n) if held else batch
            if room > 0:
                self.kept.append(take(rest, 0, min(room, n - held)))
                room -= n - held
            self.seen += n - held
            yield rest
        apart = min(APART_SAMPLES, self.out // 3)
        chosen_on = self.out - (apart if apart >= LEAST_APART else 0)
        self.held = joined(first_samples(out or self.kept, chosen_on or HELD_SAMPLES))
        self.apart = joined(later_samples(out, chosen_on)) or self.held

    @property
    def fitted_on(self) -> bool:
        """Whether there were too few samples to hold any out."""
        return self.seen > 0 and not self.out


def samples_in(batch: Batch) -> int:
    """How many samples a batch holds: the common first dimension of its tensors."""
    if isinstance(batch, Inputs) and not sample_leaves(batch):
        return 1
    sizes = {len(leaf) for leaf in sample_leaves(batch).values()}
    if len(sizes) != 1:
        raise DataError(
            f"the tensors of a batch must share their first dimension, the samples; got {sorted(sizes)}."
        )
    return sizes.pop()


def take(batch: Batch, start: int, stop: int) -> Any:
    """Samples start … stop − 1 of a batch, in the same form; views."""
    return with_leaves(batch, {i: leaf[start:stop] for i, leaf in sample_leaves(batch).items()})


def first_samples(batches: list[Batch], count: int) -> list[Batch]:
    """The first samples of several batches, still in batches."""
    taken = []
    for batch in batches:
        if count > 0:
            taken.append(take(batch, 0, count))
            count -= samples_in(taken[-1])
    return taken


def later_samples(batches: list[Batch], count: int) -> list[Batch]:
    """The samples behind the first ones of several batches, still in batches."""
    later = []
    for batch in batches:
        n = samples_in(batch)
        later += [take(batch, count, n)] if count < n else []
        count = max(0, count - n)
    return later


def joined(batches: list[Batch]) -> list[Batch]:
    """One batch instead of several, if all have the same form and sample shapes; otherwise as they are."""
    flat = [pytree.tree_flatten(arguments(batch)) for batch in batches]
    columns = [*zip(*(leaves for leaves, _ in flat), strict=False)]
    divided = sample_leaves(batches[0]) if batches else {}
    alike = (_alike(column, i in divided) for i, column in enumerate(columns))
    if not divided or any(form != flat[0][1] for _, form in flat) or not all(alike):
        return batches
    return [with_leaves(batches[0], {i: torch.cat(columns[i]) for i in divided})]


def _alike(values: tuple[Any, ...], divided: bool) -> bool:
    """Whether values of several batches can become one."""
    first = values[0]
    if divided:
        return len({(v.shape[1:], v.dtype, v.device) if _has_samples(v) else None for v in values}) == 1
    if isinstance(first, Tensor):
        return all(isinstance(value, Tensor) and torch.equal(value, first) for value in values)
    return all(not isinstance(value, Tensor) and bool(value == first) for value in values)


def _has_samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def laid_out(model: nn.Module, first: Batch, batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """Batches that know which of their tensors hold samples, where these are not simply all.

    Of tensors with different first dimensions, or in lists, those with as many entries as the outputs are
    taken for the samples, the others for the same in all, if the network then gives the first samples alone
    what it gives them among all. Otherwise a batch is one sample: a graph, or a list of images.
    """
    args, kwargs = arguments(first)
    leaves = sample_leaves(first)
    every = range(len(pytree.tree_leaves((args, kwargs))))
    if args or (len(every) == len(kwargs) and len({len(leaf) for leaf in leaves.values()}) == 1):
        return first, batches
    with evaluating(model):
        whole = main_output(output_of(model, first))
        count = len(whole) if whole.ndim else 0
        shared = {i for i in every if i not in leaves or len(leaves[i]) != count}
        if not _divides(model, Inputs(kwargs, shared), whole):
            shared = {*every}
    return Inputs(kwargs, shared), (Inputs(arguments(batch)[1], shared) for batch in batches)


def _divides(model: nn.Module, batch: Inputs, whole: Tensor) -> bool:
    """Whether the network gives a few samples alone what it gives them among all."""
    few = few_samples(batch)
    if few is batch:
        return False
    try:
        alone = main_output(forward(model, few))
    # Whatever the network's code raises.
    except Exception:
        return False
    return alone.shape == whole[: len(alone)].shape and torch.allclose(
        alone.double(), whole[: len(alone)].double(), rtol=1e-3, atol=1e-5
    )


def traced_samples(graph: Graph) -> int:
    """How many samples the batch had that the graph was traced with."""
    values = [node.meta.get("val") for i, node in enumerate(graph.inputs) if i not in graph.shared]
    return next((hint(v.shape[0]) for v in values if isinstance(v, Tensor) and v.ndim), 1)


def fits(graph: Graph, batch: Batch) -> bool:
    """Whether a batch has the sizes that the network's code has fixed in its graph."""
    return all(
        value.ndim == len(node.meta["val"].shape) and all(map(admits, node.meta["val"].shape, value.shape))
        for node, value in graph.bind(batch).items()
        if isinstance(value, Tensor)
    )


def of_other_sizes(graph: Graph, batch: Batch) -> bool:
    """Whether a batch has other sizes than the example that was traced, beside the number of samples."""
    pairs = [(v, node.meta["val"]) for node, v in graph.bind(batch).items() if isinstance(v, Tensor)]
    return any([*value.shape[1:]] != [*map(hint, traced.shape[1:])] for value, traced in pairs)


def usable(graph: Graph, batches: list[Batch]) -> list[Batch]:
    """Batches that can walk through the graph: as they are, or whole ones of the size that its code fixes."""
    if all(fits(graph, batch) for batch in batches):
        return batches
    return [batch for batch in regrouped(batches, traced_samples(graph)) if fits(graph, batch)]


def regrouped(batches: list[Batch], size: int) -> list[Batch]:
    """The same samples in batches of one size, without what is left at the end."""
    return [
        take(batch, start, start + size)
        for batch in joined(batches)
        for start in range(0, samples_in(batch) - size + 1, size)
    ]


def room_for(graph: Graph, memory: int) -> int:
    """How many samples a walk through the graph in two networks can hold within ``memory`` bytes."""
    return max(1, memory // max(1, 2 * _live_bytes(graph) // traced_samples(graph)))


def free_memory(share: float = 0.5) -> int:
    """A share of the memory that is free now, in bytes; of 2 GiB where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        available = 2**31
    return int(share * available)


def _live_bytes(graph: Graph) -> int:
    """Most bytes of results that are alive at once for the example that was traced; views count too."""
    sizes = {node: 0 if node in graph.parameters else _bytes(node) for node in graph.module.graph.nodes}
    finished, alive, most = last_uses([*sizes]), 0, 0
    for node, size in sizes.items():
        alive += size
        most = max(most, alive)
        alive -= sum(sizes[done] for done in finished[node])
    return most


def _bytes(node: Node) -> int:
    values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sum(hint(v.numel()) * v.element_size() for v in values)


def hint(size: Any) -> int:
    """A size as the example had it; one that depends on values as if two rows had been chosen by them."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known, formula = size.node.hint, size.node.expr
    return int(formula.subs(dict.fromkeys(formula.free_symbols, 2)) if known is None else known)


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    first: Batch,
    graph: Graph | None,
    nodes: Mapping[Node, Layer],
    layers: Sequence[str],
    *,
    memory: int | None = None,
    double: Collection[str] = (),
    progress: bool = True,
) -> tuple[Calibration, dict[str, Correlations]]:
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
    memory : int, optional
        Bytes that samples may take when they walk through the graph; by default half of what is free.
    """
    if not samples_in(first):
        raise DataError("there are no samples: the first batch is empty.")
    limit = room_for(graph, free_memory() if memory is None else memory) if graph else samples_in(first)
    calibration = Calibration(limit)
    stream = calibration.stream(_sound(model, batches, first, graph, run=not layers))
    if not layers:
        for _ in stream:
            pass
        return calibration, {}
    # Of how many batches an iterator has, ten is as good a guess as any.
    total = samples_in(first) * length_hint(batches, 10)
    shares = _shares(graph, nodes, layers, total) if graph else dict.fromkeys(layers, 1.0)
    # Layers that read the same tensor share what is summed of it.
    first_of: dict[Any, str] = {}
    reads = {
        one.name: first_of.setdefault(read_as(one, node), one.name)
        for node, one in nodes.items()
        if one.calls == 1 and one.name in layers
    }
    own = [name for name in layers if reads.get(name, name) == name]
    exact = {reads.get(name, name) for name in double}
    found = gather_reached(model, stream, own, positions=shares, progress=progress, full=False, double=exact)
    seen = {name: one for name, one in found.items() if one is not None}
    modules = {one.name: one.module for one in nodes.values()}
    more = {
        name: own_outputs(seen[first], modules[name])
        for name, first in reads.items()
        if first in seen and name not in seen
    }
    return calibration, {name: seen.get(name) or more[name] for name in layers if name in {**seen, **more}}


def _sound(
    model: nn.Module, batches: Iterable[Batch], first: Batch, graph: Graph | None, *, run: bool
) -> Iterator[Batch]:
    """The batches, each looked at before anything is fitted to it; odd ones run if nothing else runs them."""
    for index, batch in enumerate(batches):
        if graph is not None:
            _check_plain_values(index, batch, first)
            if run and not fits(graph, batch):
                with evaluating(model):
                    output_of(model, batch)
        _check_finite(model, index, batch)
        yield batch


def _check_plain_values(index: int, batch: Batch, traced: Batch) -> None:
    """Refuse a batch that the graph does not stand for: what is no tensor is a constant in it."""
    given, known = _plain_values(batch), _plain_values(traced)
    pairs = {name: (given.get(name, ...), known.get(name, ...)) for name in {**known, **given}}
    others = [f"{name} is {_said(a)}, not {_said(b)}" for name, (a, b) in pairs.items() if not _equal(a, b)]
    if others:
        raise DataError(
            f"batch {index} has other values than the first, which the network is traced with once for all: "
            f"{'; '.join(others)}. Give numbers as tensors, and all else (None, flags, words, which inputs "
            "there are) the same in every batch."
        )


def _plain_values(batch: Batch) -> dict[str, Any]:
    """What is no tensor, and of tensors the type."""
    return {name: v.dtype if isinstance(v, Tensor) else v for name, v in by_name(batch).items()}


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one is other or bool(np.all(one == other)))


def _said(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return f"a tensor of {str(value).removeprefix('torch.')}"
    return "left out" if value is ... else in_words(value)


def _check_finite(model: nn.Module, index: int, batch: Batch) -> None:
    """Refuse NaN and infinity that reach the outputs; masks of −∞, and gaps that a network fills, do not."""
    tensors = {name: v for name, v in by_name(batch).items() if isinstance(v, Tensor)}
    bad = {name: v for name, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())}
    if not bad:
        return
    with evaluating(model):
        output = main_output(output_of(model, batch))
    # Masked classes are −∞ by design; behind a mask of −∞ they prove nothing.
    masks = not any(bool((value.isnan() | value.isposinf()).any()) for value in bad.values())
    if bool((output.isnan() | output.isposinf() if masks else ~output.isfinite()).any()):
        places = "; ".join(f"{name} in {_samples_with(~value.isfinite())}" for name, value in bad.items())
        raise DataError(
            f"samples of batch {index} hold NaN or infinity, and so do the network's outputs: {places}. "
            "Leave these samples out, or mend how they are read and scaled."
        )


def _samples_with(found: Tensor, shown: int = 5) -> str:
    """Numbers of the samples in which anything was found."""
    rows = found.reshape(len(found), -1).any(1).nonzero().flatten().tolist() if found.ndim else [0]
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return f"sample{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:shown]))}{more}"


def peek(batches: Iterable[Any], transform: Transform | None = None) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them."""
    batches = batched(batches, transform)
    iterator = iter(batches)
    for first in iterator:
        # An iterator is used up by looking at it; a loader begins again.
        return first, chain([first], iterator) if iterator is batches else batches
    raise DataError(NO_BATCHES)


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
