"""MACs that no layer's widths explain, as a function of channels kept: read off networks that are cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from pysolve.nn.apply import apply
from pysolve.nn.counting import Call, by_layer
from pysolve.plan import Array, Collapse, Indices, Plan, Site

Count = Callable[[nn.Module], list[Call]]
# MACs of each module when a site keeps so many channels, as far as they are known.
Explained = Callable[[Indices], Mapping[str, float]]
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Rest:
    """gradient · k + ½ kᵀ hessian k + a constant: MACs of some modules when the sites keep k channels.

    Parameters
    ----------
    modules : collection of str
        Those whose MACs this says.
    gradient : (S,) array
    hessian : (S, S) array
    """

    modules: Collection[str]
    gradient: Array
    hessian: Array


def rest_of(
    model: nn.Module, sites: Sequence[Site], count: Count, now: Sequence[Call], explained: Explained
) -> Rest:
    """How MACs depend on channels where the widths of layers do not say it.

    Every size of every operand falls by a fixed number for each channel that a site loses: attention has
    fewer heads, a layer that runs over heads fewer positions. The numbers are found by cutting a copy of the
    network and counting again: all sites at once; where that is not explained, those sites whose number has a
    one in each binary place; where several sites share a size, one by one. Operators whose sizes fall in
    another way, and networks that do not run when they are cut, count as they are now.

    Parameters
    ----------
    model : nn.Module
    sites : sequence of Site
    count : callable
        From a network to its calls.
    now : sequence of Call
        Of the model.
    explained : callable
        From channels kept to the MACs of those modules for which they are known; others stay as they are.
    """
    cuts = _Cuts(model, sites, count)
    S = len(sites)
    none = Rest((), np.zeros(S), np.zeros((S, S)))
    everything = cuts.calls(cuts.free) if cuts.free else None
    if everything is None:
        return none
    before, after = by_layer(now), by_layer(everything)
    known = {**before, **explained(cuts.kept(cuts.free))}
    modules = [name for name in before if abs(after.get(name, 0.0) - known[name]) > _ROUNDING * before[name]]
    gradient, hessian = none.gradient.copy(), none.hessian.copy()
    for name in modules:
        for call, steps in cuts.steps([call for call in now if call.layer == name]):
            slope, bend = _quadratic(call, steps)
            gradient += slope
            hessian += bend
    # Of channels kept instead of channels added.
    return Rest(modules, gradient - hessian @ cuts.channels, hessian)


class _Cuts:
    """Calls of the network with some sites at half their width; each network is cut and counted once."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], count: Count) -> None:
        self.model, self.sites, self.count = model, sites, count
        self.channels = np.array([site.channels for site in sites], dtype=np.intp)
        self.removed = self.channels - np.maximum(1, self.channels // 2)
        self.free = [s for s, site in enumerate(sites) if site.pinned is None and self.removed[s]]
        self.found: dict[tuple[int, ...], list[Call] | None] = {}

    def kept(self, chosen: Collection[int]) -> Indices:
        """Channels of all sites when some are cut."""
        kept = self.channels.copy()
        kept[[*chosen]] -= self.removed[[*chosen]]
        return kept

    def calls(self, chosen: Sequence[int]) -> list[Call] | None:
        """None where such a network does not run."""
        key = tuple(chosen)
        if key not in self.found:
            kept = self.kept(chosen)
            plan = Plan(tuple(Collapse(self.sites[s], np.arange(kept[s])) for s in chosen))
            try:
                self.found[key] = self.count(apply(self.model, plan))
            # Whatever the network's own code raises where sites written by hand do not fit it.
            except Exception:
                self.found[key] = None
        return self.found[key]

    def steps(self, now: Sequence[Call]) -> list[tuple[Call, Array]]:
        """Calls of one module that change, with (sizes, S): how much of a size belongs to one channel."""
        numbers = range(1, len(self.free) + 1)
        places = [[i for i in numbers if i >> place & 1] for place in range(len(self.free).bit_length())]
        total = self._falls(now, range(len(self.free)))
        by_place = [self._falls(now, [i - 1 for i in chosen]) for chosen in places]
        if total is None or any(one is None for one in by_place):
            return []
        found = []
        for c, call in enumerate(now):
            falls = np.array([one[c] for one in by_place if one is not None])
            # Of the one site that a size depends on, if it is one.
            number = (falls != 0).T @ (1 << np.arange(len(places)))
            steps = np.zeros((len(total[c]), len(self.sites)))
            for size in np.flatnonzero(total[c]):
                seen = falls[:, size][falls[:, size] != 0]
                # Of several sites together each place shows a part.
                alone = number[size] <= len(self.free) and (seen == total[c][size]).all()
                chosen = [number[size]] if alone else [i for i in numbers if not i & ~number[size]]
                for i in chosen:
                    fall = total if alone else self._falls(now, [i - 1])
                    site = self.free[i - 1]
                    steps[size, site] = np.nan if fall is None else fall[c][size] / self.removed[site]
            expected = [steps @ (self.channels - self.kept([self.free[i - 1] for i in p])) for p in places]
            expected.append(steps @ (self.channels - self.kept(self.free)))
            if steps.any() and np.array_equal(expected, [*falls, total[c]]):
                found.append((call, steps))
        return found

    def _falls(self, now: Sequence[Call], chosen: Sequence[int]) -> list[Array] | None:
        """By how much each size of each call falls when some of the free sites are cut."""
        calls = self.calls([self.free[i] for i in chosen])
        if calls is None:
            return None
        cut = [call for call in calls if call.layer == now[0].layer]
        if [call.what for call in cut] != [call.what for call in now]:
            return None
        pairs = [(np.array(one.sizes), np.array(other.sizes)) for one, other in zip(now, cut, strict=True)]
        same = all(old.shape == new.shape for old, new in pairs)
        return [np.asarray(old - new, dtype=float) for old, new in pairs] if same else None


def _quadratic(call: Call, steps: Array) -> tuple[Array, Array]:
    """(S,) and (S, S) arrays g and H with  MACs = MACs now + g·a + ½ aᵀ H a  when sites had a channels more.

    Zero for a call that is of higher order.
    """
    S = steps.shape[1]
    sites, sizes = np.flatnonzero(steps.any(0)).tolist(), np.array(call.sizes)
    gradient, hessian = np.zeros(S), np.zeros((S, S))

    def more(*added: int) -> float:
        return call.at((sizes + steps[:, [*added]].sum(1)).round().astype(int).tolist()) - call.macs

    for i, s in enumerate(sites):
        hessian[s, s] = more(s, s) - 2 * more(s)
        gradient[s] = more(s) - hessian[s, s] / 2
        for t in sites[i + 1 :]:
            hessian[s, t] = hessian[t, s] = more(s, t) - more(s) - more(t)
    cubic = more(*sites * 3) - 3 * gradient.sum() - 4.5 * hessian.sum()
    return (gradient, hessian) if abs(cubic) <= _ROUNDING * call.macs else (0 * gradient, 0 * hessian)
