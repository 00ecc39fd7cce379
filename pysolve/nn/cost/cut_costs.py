"""MACs that no layer's widths explain, as a function of channels kept: read off networks that are cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from pysolve.nn.cost.counting import Call, by_layer
from pysolve.nn.cut.apply import apply
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
    one in each binary place; where several sites share a size, one by one. A last network, cut by a quarter,
    checks them. Heads and their dimensions, which no network loses both of, are cut one after the other.
    Operators whose sizes fall in another way, and networks that do not run when they are cut,
    count as they are now, layers by their widths.

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
    S = len(sites)
    gradient, hessian, modules = np.zeros(S), np.zeros((S, S)), []
    parts = [_Cuts(model, sites, count, own) for own in _compatible(sites)]
    parts = [cuts for cuts in parts if cuts.free and cuts.calls(cuts.half) is not None]
    after = [by_layer(cuts.calls(cuts.half) or ()) for cuts in parts]
    widths = [explained(cuts.half) for cuts in parts]
    for name, macs in by_layer(now).items():
        falls = [macs - one.get(name, 0.0) for one in after]
        known = [macs - one.get(name, macs) for one in widths]
        if all(abs(a - b) <= _ROUNDING * macs for a, b in zip(falls, known, strict=True)):
            continue
        found = [cuts.quadratic([call for call in now if call.layer == name]) for cuts in parts]
        removed = [cuts.channels - cuts.half for cuts in parts]
        told = [(slope - bend @ r / 2) @ r for (slope, bend), r in zip(found, removed, strict=True)]
        # The number of an expert's tokens, for example, falls in no such way.
        if name in widths[0] and any(abs(a - b) > _ROUNDING * macs for a, b in zip(falls, told, strict=True)):
            continue
        modules.append(name)
        counted = np.zeros(S, bool)
        for cuts, (slope, bend) in zip(parts, found, strict=True):
            own = np.isin(np.arange(S), cuts.free)
            gradient += slope * (own & ~counted)
            hessian += bend * (np.outer(own, own) & ~np.outer(counted, counted))
            counted |= own
    # Of channels kept instead of channels added.
    channels = np.array([site.channels for site in sites])
    return Rest(modules, gradient - hessian @ channels, hessian)


def _compatible(sites: Sequence[Site]) -> list[list[int]]:
    """Sets of sites that one network can lose channels of: with heads, or with their dimensions."""
    dims = [s for s, site in enumerate(sites) if site.attention]
    if not dims:
        return [[*range(len(sites))]]
    whole = [s for s, one in enumerate(sites) if any(one.overlaps(sites[d]) for d in dims if d != s)]
    return [[s for s in range(len(sites)) if s not in one] for one in (dims, whole)]


class _Cuts:
    """Calls of the network with some sites cut; each network is cut and counted once."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], count: Count, own: Collection[int]) -> None:
        self.model, self.sites, self.count = model, sites, count
        self.channels = np.array([site.channels for site in sites], dtype=np.intp)
        # Each token goes to as many experts, however many there are.
        able = [site.pinned is None and site.router is None for site in sites]
        self.free = [s for s in own if able[s] and sites[s].channels > 1]
        self.half = self.kept(self.free)
        self.found: dict[tuple[int, ...], list[Call] | None] = {}

    def kept(self, chosen: Sequence[int], parts: int = 2) -> Indices:
        """Channels of all sites when some lose one of so many parts."""
        kept = self.channels.copy()
        kept[chosen] -= -(-kept[chosen] // parts)
        return np.maximum(kept, np.minimum(1, self.channels))

    def calls(self, kept: Indices) -> list[Call] | None:
        """None where such a network does not run."""
        key = tuple(kept.tolist())
        if key not in self.found:
            steps = (Collapse(self.sites[s], np.arange(kept[s])) for s in self.free)
            plan = Plan(tuple(step for step in steps if len(step.removed)))
            try:
                self.found[key] = self.count(apply(self.model, plan))
            # Whatever the network's own code raises where sites written by hand do not fit it.
            except Exception:
                self.found[key] = None
        return self.found[key]

    def quadratic(self, now: Sequence[Call]) -> tuple[Array, Array]:
        """(S,) and (S, S) arrays that say how MACs of one module fall."""
        slope, bend = np.zeros(len(self.sites)), np.zeros((len(self.sites),) * 2)
        for one in self.steps(now):
            more = _quadratic(*one)
            slope, bend = slope + more[0], bend + more[1]
        return slope, bend

    def steps(self, now: Sequence[Call]) -> list[tuple[Call, Array]]:
        """Calls of one module that change, with (sizes, S): how much of a size belongs to one channel."""
        numbers = dict(enumerate(self.free, 1))
        places = [
            [site for i, site in numbers.items() if i >> place & 1]
            for place in range(len(self.free).bit_length())
        ]
        tried = [*map(self.kept, places), self.kept(self.free), self.kept(self.free, 4)]
        removed = self.channels - np.array(tried)
        seen = [one for kept in tried if (one := self._falls(now, kept)) is not None]
        found = []
        for c, call in enumerate(now if len(seen) == len(tried) else ()):
            falls = np.array([sizes[c] for sizes in seen])
            total = falls[len(places)]
            steps = np.zeros((len(total), len(self.sites)))
            for size in np.flatnonzero(total):
                ones = [place for place in range(len(places)) if falls[place, size]]
                # Of several sites together each place shows a part.
                alone = numbers.get(sum(1 << place for place in ones))
                if alone is not None and (falls[ones, size] == total[size]).all():
                    steps[size, alone] = total[size] / removed[len(places), alone]
                    continue
                others = {s for place, chosen in enumerate(places) if place not in ones for s in chosen}
                for s in (s for s in self.free if s not in others):
                    single = self._falls(now, self.kept([s]))
                    fall = np.nan if single is None else single[c][size]
                    steps[size, s] = fall / removed[len(places), s]
            if steps.any() and np.array_equal(removed @ steps.T, falls):
                found.append((call, steps))
        return found

    def _falls(self, now: Sequence[Call], kept: Indices) -> list[Array] | None:
        """By how much each size of each call falls when sites are cut; None where calls are others."""
        cut = [call for call in self.calls(kept) or () if call.layer == now[0].layer]
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
