"""What every unit of a network does to its outputs: one unit alone at a few sizes, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TypeVar

from torch import Tensor

from pysolve.correlations import Indices
from pysolve.methods.menu import Chosen, Menu
from pysolve.methods.rebuild import changed_names, independent
from pysolve.methods.study import Study
from pysolve.nn.batches.samples import first_samples, samples_in
from pysolve.nn.changed import changed_outputs, is_repeatable
from pysolve.nn.cut.norms import kept_of_norms
from pysolve.nn.cut.routers import chosen_by_routers
from pysolve.nn.divergence import mean_divergence, or_infinite, rows_of, run
from pysolve.nn.graph.export import Graph
from pysolve.nn.graph.sizes import fits
from pysolve.nn.outputs import main_output
from pysolve.nn.progress import steps
from pysolve.nn.running import Batch, Output

# Divergences are means over rows of outputs: samples, or their positions. Work to measure them, in such rows
# through the whole network at most, and in passes over what was given: all units share it, so that it does
# not grow with the square of the depth. ResNet-20's sizes, chosen on 96 of 166 samples, cause up to a tenth
# more; fewer rows than the least tell too little.
PROBE_ROWS, PASSES, LEAST_ROWS, LEAST_SAMPLES = 32768, 4, 48, 4
# Positions of one sample are alike: of short texts and of images four are the least, of long texts so many
# words.
# (Sizes of a decoder at 70 and 50 % of its MACs, chosen on 25 texts of 128 words, cause a divergence of
# 0.0092 and 0.0465, on four of 0.0092 and 0.0459, on two of 0.0094 and 0.0451; on four, two and one text of
# 256 words, at 70 %, of 0.0167, 0.0165 and 0.0188. Those of a small transformer are up to a sixth worse on
# 512 words in short texts.)
LONG, LEAST_WORDS = 256, 512
# Samples for all codes, and for one layer's: with 250, those of one were off by factors of three to seven.
MOST_OF_CODES, LEAST_OF_CODES = 16384, 256


M = TypeVar("M", bound=Menu)


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples to measure divergences on, in batches, and a network's outputs for them.

    ``values`` are its parameters where they are not the original's.
    """

    batches: Sequence[Batch]
    outputs: Sequence[Output]
    values: Mapping[str, Tensor] = field(default_factory=dict)


def probe(study: Study, menus: Sequence[Menu]) -> Probe:
    """Samples of the selection set for the probes of some units."""
    changes = max(1, sum(sum(size > 0 for size in menu.probes()) for menu in menus))
    given = study.calibration.seen + study.calibration.out if study.calibration else 0
    few = _probe(study, first_samples(study.held, LEAST_SAMPLES))
    each = max(1, sum(map(rows_of, few.outputs))) / sum(map(samples_in, few.batches))
    # Logits of every word; pixels of an image have another number of dimensions.
    long = each >= LONG and main_output(few.outputs[0]).ndim == 3
    least = ceil(LEAST_WORDS / each) if long else max(LEAST_SAMPLES, ceil(LEAST_ROWS / each))
    count = max(least, int(min(PROBE_ROWS / each, PASSES * given) // changes))
    return few if count == LEAST_SAMPLES else _probe(study, first_samples(study.held, count))


def probe_of_codes(study: Study, units: int, values: Mapping[str, Tensor]) -> Probe:
    """Samples for units in few bits: those that were fitted on serve too, for bits follow no noise.

    ``values`` are parameters of the network where they are not the original's.
    """
    assert study.calibration is not None
    count = max(LEAST_OF_CODES, MOST_OF_CODES // max(1, units))
    return _probe(study, study.first_kept(count), values)


def price(study: Study, menus: Sequence[M], where: Probe) -> list[M]:
    """Menus with the divergence of every unit alone at the sizes of its probes."""
    return measured(study, [(menu, menu.probes()) for menu in menus], where)


def measured(study: Study, wanted: Sequence[tuple[M, Sequence[int]]], where: Probe) -> list[M]:
    """Menus with the divergence of each alone at some sizes; what was measured before is not again."""
    menus = [menu for menu, _ in wanted]
    asked = [
        (i, size) for i, (menu, sizes) in enumerate(wanted) for size in sizes if size not in menu.measured
    ]
    whole = [(i, size) for i, size in asked if size == menus[i].whole]
    changed = [pair for pair in asked if pair not in whole]
    for i, size in whole:
        menus[i] = replace(menus[i], measured={**menus[i].measured, size: 0.0})
    choices = [menus[i].at(size) for i, size in changed]
    names = [[*changed_names(study, one)] for one in choices]
    found = divergences(
        study,
        names,
        lambda number: independent(study, choices[number]).values,
        where,
        norms=lambda number: kept_of_norms(choices[number].keep),
        routers=lambda number: chosen_by_routers(study.model, choices[number].keep),
    )
    shown, start = study.options.progress, time.perf_counter()
    for number, value in steps(found, "measure", len(changed), unit="size", shown=shown):
        (i, size), now = changed[number], time.perf_counter()
        known, seconds = {**menus[i].measured, size: or_infinite(value)}, menus[i].seconds + now - start
        menus[i], start = replace(menus[i], measured=known, seconds=seconds), now
    return menus


def divergences(
    study: Study,
    names: Sequence[Sequence[str]],
    values: Callable[[int], Mapping[str, Tensor]],
    where: Probe,
    norms: Callable[[int], Mapping[str, Indices]] = lambda number: {},
    routers: Callable[[int], Mapping[str, Indices]] = lambda number: {},
) -> Iterator[tuple[int, float]]:
    """The number of each of several changes, in any order, and the divergence that it causes by itself.

    Where the graph allows it, only what follows the first operator that reads a change is computed.

    Parameters
    ----------
    study : Study
    names : sequence of sequences of str
        State-dict names of what each change may be of.
    values : callable
        From the number of a change to its new values.
    where : Probe
    norms : callable
        From the number of a change to the channels that stay of layer norms; known in graphs alone.
    routers : callable
        From the number of a change to the experts that stay, by their routers' weights.
    """
    graph, batches = study.graph, where.batches
    ranks = study.options.ranks
    own = range(ranks.rank, len(names), ranks.size)
    named = [names[i] for i in own]

    def of_own(number: int) -> Mapping[str, Tensor]:
        return values(own[number])

    if graph and _walks(graph, names, where):
        found = changed_outputs(
            graph,
            study.model,
            batches,
            where.outputs,
            named,
            of_own,
            base=where.values,
            norms=lambda number: {**norms(own[number]), **routers(own[number])},
        )
    else:
        found = (
            (i, run(study.model, batches, {**where.values, **of_own(i)}, routers(own[i])))
            for i in range(len(own))
        )
    each = (
        (own[i], mean_divergence(where.outputs, outputs, batches, study.options.divergence))
        for i, outputs in found
    )
    yield from each if ranks.size == 1 else (one for part in ranks.all([*each]) for one in part)


def divergence_of(study: Study, chosen: Chosen, where: Probe) -> float:
    """Divergence of the network's outputs with this chosen, every layer fitted on the original's inputs."""
    routers = chosen_by_routers(study.model, chosen.keep)
    outputs = run(study.model, where.batches, independent(study, chosen).values, routers)
    return or_infinite(mean_divergence(where.outputs, outputs, where.batches, study.options.divergence))


def _walks(graph: Graph, names: Sequence[Sequence[str]], where: Probe) -> bool:
    """Whether the graph gives what the network does, with these parameters changed."""
    known = set(graph.parameters.values())
    fit = all(fits(graph, batch) for batch in where.batches) and is_repeatable(graph)
    return fit and all(known.issuperset(own) for own in [*names, [*where.values]])


def _probe(study: Study, batches: Sequence[Batch], values: Mapping[str, Tensor] | None = None) -> Probe:
    return Probe(batches, list(run(study.model, batches, values or None)), values or {})
