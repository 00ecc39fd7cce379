"""Milliseconds as a measure of the budget: what sizes take on this machine, predicted and measured."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import numpy as np

from pysolve.correlations import Array, Indices, Mask
from pysolve.errors import PysolveError
from pysolve.methods.budget import Settled, settle
from pysolve.methods.goal import Target
from pysolve.methods.menu import Chosen, Menu
from pysolve.methods.price import Probe
from pysolve.methods.study import Study
from pysolve.nn.batches.samples import samples_in, take
from pysolve.nn.cost.profile import TOGETHER, times_of
from pysolve.nn.cost.width_times import WidthTimes, seen_by, width_times
from pysolve.nn.cut.apply import apply
from pysolve.nn.running import Batch, find_layer
from pysolve.plan import Collapse, Plan, Site
from pysolve.solve.budget import MEASURES, Costs, unreachable

# Seconds that one call of the samples that are timed together may take, and for which the original and a
# candidate are called by turns.
LONGEST, SECONDS = 0.25, 0.5
# Candidates that are made and timed; how near to the target, as a share of it, is near enough to stop, and
# how far above it counts as within.
ROUNDS, NEAR, WITHIN = 6, 0.02, 0.05
# Shares of the prediction that are as good as equal.
CLOSE = 1e-3
# A size that counts as at most so much less than a larger one, as a share of the whole site, is none.
SAME = 0.01
# Calls that take so much longer than the fastest one, in the median, tell of a busy machine, on which they
# are called for as long again, at most so often.
BUSY, TRIES = 0.1, 4


@dataclass(frozen=True, eq=False)
class InTime:
    """Sizes within a target that names milliseconds.

    Parameters
    ----------
    done : Settled
    costs : Costs
        Of all free sites, with a row of milliseconds.
    target : {measure: share or number}
        For these costs: milliseconds as measured, not as predicted, are those that were asked for.
    samples : int
        That were timed together.
    note : str
        What was asked for, predicted and measured.
    """

    done: Settled
    costs: Costs
    target: Target
    samples: int
    note: str


def settle_in_time(
    study: Study,
    costs: Costs,
    groups: Sequence[Sequence[int]],
    units: Sequence[Menu],
    target: Target,
    where: Probe,
) -> InTime:
    """Sizes whose network takes the milliseconds of a target, as it was timed beside the original.

    Layers are timed alone at a few widths; what they take at others, and with what stands around them, is
    predicted from that and from the times of the original and of the smallest network. The network of the
    sizes that this chooses is made and timed; times that were found correct those that are predicted, until
    one is near enough.

    Parameters
    ----------
    study : Study
    costs : Costs
        Of all free sites.
    groups : sequence of sequences of int
        Free sites that keep equally many channels.
    units : sequence of Menu
        Of each group.
    target : {measure: share or number}
    where : Probe

    Raises
    ------
    PysolveError
        The smallest network takes longer; other measures, as ``settle``.
    """
    batch = _batch(study)
    smallest = [int(np.flatnonzero(_allowed(unit))[0]) for unit in units]
    small = np.zeros(len(costs.channels))
    for group, k in zip(groups, smallest, strict=True):
        small[list(group)] = k
    least = _made(units, smallest).keep
    whole, (share, busy) = _fastest(study, batch), _share(study, least, batch)
    limit = target["ms"] * whole if target["ms"] <= 1 else float(target["ms"])
    if share * whole > (1 + WITHIN) * limit:
        raise PysolveError(unreachable("ms", limit, share * whole, whole))
    costs = timed_costs(study, costs, batch, small, (whole, share * whole))
    tied, allowed = costs.tied(groups), [unit.allowed for unit in units]
    units = liked(units, tied)
    # Predicted and measured milliseconds that belong together.
    known = {tied.cost(tied.channels)["ms"]: whole, tied.cost(smallest)["ms"]: share * whole}
    tried: list[tuple[float, float, Settled, Target]] = []
    # Shares of the prediction that were found to be within the limit, and beyond it.
    asked, low, high = _share_for(limit, known, whole), 0.0, 1.0
    for _ in range(2 * ROUNDS):
        wanted = {**target, "ms": asked}
        done = settle(study, tied, units, (), wanted, where)
        units = done.sites
        again = next((one for one in tried if one[2].sizes == done.sizes), None)
        if again is None:
            predicted = tied.cost(done.sizes)["ms"]
            share, busy = _share(study, done.chosen.keep, batch)
            if abs(share * whole / limit - 1) <= NEAR:
                # Of several times with noise, one is near by chance: what counts is seen again, for longer.
                share, busy = _share(study, done.chosen.keep, batch, 2 * SECONDS)
            known[predicted] = share * whole
            tried.append((share * whole, predicted, done, wanted))
        found = (again or tried[-1])[0]
        low, high = (low, min(high, asked)) if found > limit else (max(low, asked), high)
        if abs(found / limit - 1) <= NEAR or len(tried) == ROUNDS or high - low <= CLOSE:
            break
        asked = _share_for(limit, known, whole)
        if again is not None or not low < asked < high:
            # Times rise in steps: sizes in between are asked for.
            asked = (low + high) / 2
    # Above the target only where no other is near.
    best = min(tried, key=lambda one: (one[0] > (1 + WITHIN) * limit, abs(one[0] / limit - 1)))
    note = _note(best[0], best[1], limit, whole, samples_in(batch), busy)
    menus = [replace(unit, allowed=own) for unit, own in zip(best[2].sites, allowed, strict=True)]
    return InTime(replace(best[2], sites=menus), costs, best[3], samples_in(batch), note)


def timed_costs(study: Study, costs: Costs, batch: Batch, small: Array, ends: tuple[float, float]) -> Costs:
    """The costs with a row of milliseconds.

    A layer takes t · (share at its outputs) · (share at its inputs), each share linear in the channels that
    its sites count as; all else in proportion to the numbers in what the sites' layers read and write.

    Parameters
    ----------
    study : Study
    costs : Costs
        Of all free sites.
    batch : one batch
    small : (S,) array
        Channels that are left in the smallest network.
    ends : (float, float)
        Milliseconds of the network as it is and of the smallest.
    """
    K = costs.channels
    by_layer = _layer_times(study, costs, batch)
    # Of each layer a + b · width, which is one at the whole width.
    (a_out, b_out), (a_in, b_in) = by_layer.outputs, by_layer.inputs
    seconds = by_layer.seconds

    def layers(k: Array) -> float:
        out, into = costs.outputs - costs.rows @ (K - k), costs.inputs - costs.columns @ (K - k)
        return float(seconds @ ((a_out + b_out * out) * (a_in + b_in * into)))

    fall, own = ends[0] - ends[1], layers(K.astype(float)) - layers(small)
    if own > fall:
        # Alone in the cache, or on a machine that was busier, they took longer than in the network.
        seconds = seconds * max(0.0, fall) / own
    rest = max(0.0, fall - own) / max(1e-30, float(by_layer.numbers @ (K - small)))
    gradient = rest * by_layer.numbers
    product, per_output, per_input = seconds * [b_out * b_in, b_out * a_in, a_out * b_in]
    now = product @ (costs.outputs * costs.inputs) + per_output @ costs.outputs + per_input @ costs.inputs
    constant = np.array(ends[0] - now - gradient @ K)
    counts = [_counts_as(costs, s, by_layer.curves, seconds, gradient[s]) for s in range(len(K))]
    rows = study.options.ranks.first((product, per_output, per_input, constant, gradient, counts))
    product, per_output, per_input, constant, gradient, counts = rows
    return replace(
        costs,
        product=_joined(costs.product, product),
        per_output=_joined(costs.per_output, per_output),
        per_input=_joined(costs.per_input, per_input),
        constant=_joined(costs.constant, constant),
        added=np.append(costs.added, 0.0),
        gradient=_joined(costs.gradient, gradient),
        hessian=_joined(costs.hessian, np.zeros((len(K), len(K)))),
        measures=(*MEASURES, "ms"),
        seen=counts,
    )


@dataclass(frozen=True, eq=False)
class _LayerTimes:
    """Times of a network's layers.

    Parameters
    ----------
    seconds : (L,) array
        In milliseconds, of each alone.
    outputs, inputs : ((L,) array, (L,) array)
        a and b of its share a + b · width at fewer of them.
    curves : sequence of WidthTimes, optional
        None of layers that were not timed.
    numbers : (S,) array
        That pass through all layers for each channel of a site.
    """

    seconds: Array
    outputs: tuple[Array, Array]
    inputs: tuple[Array, Array]
    curves: Sequence[WidthTimes | None]
    numbers: Array


def _layer_times(study: Study, costs: Costs, batch: Batch) -> _LayerTimes:
    """Times of all layers that lose channels."""
    names, K = costs.layers, costs.channels
    widths = np.array([costs.outputs, costs.inputs])
    tables = np.array([costs.rows, costs.columns]).reshape(2, len(names), len(K))
    least = (widths - tables @ (K - 1)).astype(np.intp)
    seen, known = seen_by(study.model, names, batch), dict[Hashable, WidthTimes]()
    curves: list[WidthTimes | None] = []
    for i, name in enumerate(names):
        steps = _step(tables[0, i]), _step(tables[1, i])
        ends = int(least[0, i]), int(least[1, i])
        layer = find_layer(study.model, name) if name in seen else None
        curves.append(None if layer is None else width_times(layer, seen[name], ends, steps, known))
    through = np.array([(seen[n].written, seen[n].read) if n in seen else (0, 0) for n in names])
    each = through.reshape(-1, 2).T / np.maximum(1, widths)
    lines = []
    for side, width in enumerate(widths):
        ends_at = np.array(
            [
                1.0 if c is None else (c.by_outputs, c.by_inputs)[side][least[side, i]]
                for i, c in enumerate(curves)
            ]
        )
        slope = (1 - ends_at) / np.maximum(1, width - least[side])
        lines.append((1 - slope * width, slope))
    return _LayerTimes(
        np.array([0.0 if curve is None else 1e3 * curve.seconds for curve in curves]),
        lines[0],
        lines[1],
        curves,
        np.einsum("dls,dl->s", tables, each),
    )


def liked(units: Sequence[Menu], costs: Costs) -> list[Menu]:
    """Units without the sizes that take as long as a larger one."""
    pairs = zip(units, costs.seen, strict=True)
    return [replace(unit, allowed=_faster(_allowed(unit), row)) for unit, row in pairs]


def _faster(allowed: Mask, seen: Array) -> Mask:
    mask, last = np.zeros_like(allowed), np.inf
    for k in np.flatnonzero(allowed)[::-1]:
        if seen[k] < last - SAME * len(seen):
            mask[k], last = True, seen[k]
    return mask


def _counts_as(
    costs: Costs, s: int, curves: Sequence[WidthTimes | None], seconds: Array, rest: float
) -> Array:
    """(K + 1,) channels that each size of a site counts as, by the times of the layers that it is part of.

    Layers without channels are not called: none counts as fewer than none.
    """
    K = int(costs.channels[s])
    k = np.arange(K + 1)
    time = rest * k
    for i, curve in enumerate(curves):
        if curve is not None:
            for shares, width, each in (
                (curve.by_outputs, costs.outputs[i], costs.rows[i, s]),
                (curve.by_inputs, costs.inputs[i], costs.columns[i, s]),
            ):
                at = np.maximum(0, width - each * (K - k)).astype(np.intp)
                time = time + seconds[i] * shares[at] * (each > 0) * (at > 0)
    if K < 2 or time[K] - time[1] <= 0:
        return k.astype(float)
    return np.asarray(1 + (K - 1) * (time - time[1]) / (time[K] - time[1]))


def _step(each: Array) -> int:
    """Of how many channels a layer loses a multiple."""
    return int(np.gcd.reduce(each[each > 0].astype(np.intp))) if (each > 0).any() else 1


def _share_for(limit: float, known: Mapping[float, float], whole: float) -> float:
    """Share of the prediction for the original at which networks take as long as the limit."""
    # Sizes of next to nothing may be predicted to take less than nothing.
    predicted = sorted(one for one in known if one > 0)
    measured = np.maximum.accumulate([known[one] for one in predicted])
    # Between two that are known, as a power: straight lines close in from one side alone. Below all of them
    # in proportion, so that the next candidate takes less.
    beyond = min(1.0, limit / measured[0])
    found = np.exp(np.interp(np.log(limit), np.log(measured), np.log(predicted))) * beyond
    return float(min(1.0, found / whole * (1 + 1e-9)))


def _allowed(unit: Menu) -> Mask:
    return np.isfinite(unit.curve)


def _joined(array: Array, row: Array) -> Array:
    return np.concatenate([array, row[None]])


def _made(units: Sequence[Menu], sizes: Sequence[int]) -> Chosen:
    chosen = (unit.at(k) for unit, k in zip(units, sizes, strict=True) if k < unit.whole)
    return reduce(or_, chosen, Chosen())


def _batch(study: Study) -> Batch:
    """Samples that are timed together: of large networks fewer."""
    first = study.held[0]
    size = study.options.ranks.first(min(samples_in(first), TOGETHER))
    while size > 1:
        try:
            (times,) = times_of([study.original], take(first, 0, size), 0.0)
        except (RuntimeError, ValueError):
            # The network's code takes batches of one size alone.
            return first
        if study.options.ranks.first(min(times)) <= LONGEST:
            break
        size //= 2
    return take(first, 0, size)


def _fastest(study: Study, batch: Batch) -> float:
    """Milliseconds of the original."""
    (times,) = times_of([study.original], batch, SECONDS)
    return float(study.options.ranks.first(1e3 * min(times)))


def _share(
    study: Study, keep: Mapping[Site, Indices], batch: Batch, seconds: float = SECONDS
) -> tuple[float, float]:
    """Time of a network as a share of the original's, by turns, and by how much calls were disturbed."""
    # Without new biases: with one for every layer a decoder takes 5 % longer, with those that pay 1 %.
    steps = tuple(Collapse(site, np.arange(len(kept))) for site, kept in keep.items())
    network = apply(study.model, Plan(steps))
    before, after = list[float](), list[float]()
    for _ in range(TRIES):
        for own, more in zip(
            (before, after), times_of([study.original, network], batch, seconds), strict=True
        ):
            own.extend(more)
        # Neighbouring calls are disturbed alike: of two networks on a machine with twice as much to do as it
        # has cores, 8 pairs tell the share to 3 %, the fastest of 8 calls of each to 8 %.
        share = float(np.median(np.array(after) / np.array(before)))
        busy = float(np.median(before)) / min(before) - 1
        share, busy = study.options.ranks.first((share, busy))
        if busy <= BUSY:
            break
    return share, busy


def _note(found: float, predicted: float, limit: float, whole: float, samples: int, busy: float) -> str:
    said = (
        f"of {whole:.3g} ms for {samples} sample{'s' * (samples > 1)} {limit:.3g} were wanted; a network of "
        f"these widths takes {found:.3g} ({found / limit - 1:+.1%}), {predicted:.3g} were predicted"
    )
    if abs(found / limit - 1) > WITHIN:
        said += "; no widths that were tried came nearer"
    if busy > BUSY:
        said += f"; calls took {busy:.0%} longer than the fastest: on an idle machine times are more certain"
    return said
