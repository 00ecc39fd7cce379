"""What every unit of a network does to its outputs: one unit alone at a few sizes, measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tqdm.auto import tqdm

from pysolve.methods.menu import PROBED_ERRORS, Chosen, Menu
from pysolve.methods.rebuild import independent
from pysolve.methods.study import Study
from pysolve.nn.calibration import first_samples, samples_in
from pysolve.nn.divergence import mean_divergence, run
from pysolve.nn.running import Batch, Output

# Work for measuring divergences, in samples through the whole network; shared by all units, so that it does
# not grow with the square of the depth. Fewer samples than the least tell too little: of codes, with 250,
# those of one layer were off by factors of three to seven.
PROBE_SAMPLES, LEAST_SAMPLES, LEAST_OF_CODES = 16384, 48, 256


M = TypeVar("M", bound=Menu)


@dataclass(frozen=True, eq=False)
class Probe:
    """Samples to measure divergences on, in batches, and the original's outputs."""

    batches: Sequence[Batch]
    outputs: Sequence[Output]


def probe(study: Study, units: int, *, sizes: int = len(PROBED_ERRORS)) -> Probe:
    """Samples of the selection set for so many units, each at so many sizes."""
    count = max(LEAST_SAMPLES, PROBE_SAMPLES // max(1, units * sizes))
    return _probe(study, first_samples(study.held, count))


def probe_of_codes(study: Study, units: int) -> Probe:
    """Samples for units in few bits: those that were fitted on serve too, for bits follow no noise."""
    assert study.calibration is not None
    count = max(LEAST_OF_CODES, PROBE_SAMPLES // max(1, units))
    return _probe(study, first_samples(study.calibration.kept, count))


def price(study: Study, menus: Sequence[M], where: Probe) -> list[M]:
    """Menus with the divergence of every unit alone at the sizes of its probes.

    Parameters
    ----------
    study : Study
    menus : sequence of Menu
    where : Probe
    """
    hidden = None if study.options.progress else True
    return [
        measured(study, menu, menu.probes(), where)
        for menu in tqdm(menus, "measure", unit="unit", disable=hidden)
    ]


def measured(study: Study, menu: M, sizes: Sequence[int], where: Probe) -> M:
    """A menu with the divergence at some sizes; what was measured before is not again."""
    start, found = time.perf_counter(), dict(menu.measured)
    for size in sizes:
        if size not in found:
            found[size] = 0.0 if size == menu.whole else divergence_of(study, menu.at(size), where)
    return replace(menu, measured=found, seconds=menu.seconds + time.perf_counter() - start)


def divergence_of(study: Study, chosen: Chosen, where: Probe) -> float:
    """Divergence of the network's outputs with this chosen, every layer fitted on the original's inputs."""
    outputs = run(study.model, where.batches, independent(study, chosen).values)
    sizes = [*map(samples_in, where.batches)]
    return mean_divergence(where.outputs, outputs, sizes, study.options.divergence)


def _probe(study: Study, batches: Sequence[Batch]) -> Probe:
    return Probe(batches, list(run(study.model, batches)))
