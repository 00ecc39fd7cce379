"""Which layers become two, and of which rank; what the others are left for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pysolve.account import costs
from pysolve.errors import PysolveError
from pysolve.lowrank.candidates import Candidates, harm_curve_of, seconds_of_both
from pysolve.lowrank.ranks import Candidate, share_ranks
from pysolve.nn.network import find_layer


@dataclass(frozen=True)
class Goal:
    """One of three ways to say how far, as ``low_rank`` has them."""

    rank: int | Mapping[str, int] | None = None
    energy: float | None = None
    target: Mapping[str, float] | None = None

    @property
    def named_ranks(self) -> Iterator[tuple[str, Any]]:
        """What ranks were given, for which layers."""
        if isinstance(self.rank, Mapping):
            yield from ((f"the rank of {name}", value) for name, value in self.rank.items())
        elif self.rank is not None:
            yield "rank", self.rank


def choose_ranks(found: Candidates, goal: Goal, *, timed: bool) -> dict[str, int]:
    """Ranks of the layers that become two; the reasons against the others go to ``found.against``.

    Parameters
    ----------
    found : Candidates
    goal : Goal
    timed : bool
        Leave layers alone that would take longer.
    """
    if isinstance(goal.rank, Mapping):
        _check_named(found, goal.rank)
    while True:
        ranks = _within(found, goal.target) if goal.target is not None else _asked_for(found, goal)
        slower = [name for name, rank in ranks.items() if timed and _is_slower(found, name, rank)]
        if not slower or goal.target is None:
            return {name: rank for name, rank in ranks.items() if name not in slower}


def _asked_for(found: Candidates, goal: Goal) -> dict[str, int]:
    """The same rank or share of the energy for all layers, or ranks by their names."""
    ranks = {}
    for name, one in found.open.items():
        wanted: int | None
        if goal.energy is not None:
            wanted = one.rank_for(goal.energy)
        else:
            wanted = goal.rank.get(name) if isinstance(goal.rank, Mapping) else goal.rank
        if wanted is None:
            found.against[name] = "not asked for"
        elif wanted > one.most:
            found.against[name] = f"only ranks up to {one.most} would be smaller"
        else:
            ranks[name] = int(wanted)
    return ranks


def _within(found: Candidates, target: Mapping[str, float]) -> dict[str, int]:
    """Ranks within a target that do the network the least harm."""
    candidates = [*found.open.values()]
    curves = [harm_curve_of(found, one) for one in candidates]
    now = costs(found.model, found.held)
    ranks = share_ranks(candidates, curves, {key: float(value) for key, value in now.items()}, target)
    pairs = zip(candidates, ranks, strict=True)
    return {one.name: rank for one, rank in pairs if rank is not None}


def _check_named(found: Candidates, ranks: Mapping[str, int]) -> None:
    """Refuse layers that cannot have the rank they were named with."""
    for name, rank in ranks.items():
        find_layer(found.model, name)
        if name not in found.open:
            raise PysolveError(f"{name} cannot be factored: {found.against.get(name, 'it has no weight')}.")
        if rank > (most := found.open[name].most):
            raise PysolveError(
                f"rank {rank} of {name} would be no smaller than the layer is: at most {most}."
            )


def _is_slower(found: Candidates, name: str, rank: int) -> bool:
    """Whether a layer takes longer as two; then it is no candidate any more."""
    if name not in found.inputs:
        return False
    one: Candidate = found.open[name]
    before, after = found.seconds[name] = seconds_of_both(found.layers[name], one, rank, found.inputs[name])
    if after < before:
        return False
    del found.open[name]
    found.against[name] = f"rank {rank} would take {after / before:.2f} times as long"
    return True


def layers_left(found: Candidates, ranks: Mapping[str, int]) -> dict[str, str]:
    """Why layers stay as they are."""
    return {name: found.against.get(name, "others pay more") for name in found.layers if name not in ranks}
