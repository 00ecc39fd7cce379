"""Layers that could be factored: the ranks of each, why others cannot, and which would take longer as two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pysolve.errors import PysolveError
from pysolve.forms import LowRank
from pysolve.methods.goal import Target
from pysolve.methods.kinds.ranks import RankMenu, Ranks
from pysolve.methods.layout import LaidOut, seconds_of_both
from pysolve.methods.rebuild import Rebuilt
from pysolve.methods.study import Study
from pysolve.nn.running import find_layer
from pysolve.nn.threads import all_blas_threads
from pysolve.report.rows import LayerReport


@dataclass(frozen=True, eq=False)
class Candidates:
    """Layers that could be factored, and why the others cannot.

    Parameters
    ----------
    kind : Ranks
    menus, spare : {layer: RankMenu}
        And the other structure of a convolution.
    against : {layer: str}
    timed : bool
        Whether layers that would take longer are left alone.
    seconds : {layer: (int, float, float)}
        A rank that was timed, of this layer or of one like it; what that took as it is and factored.
    """

    kind: Ranks
    menus: Mapping[str, RankMenu]
    spare: Mapping[str, RankMenu]
    against: Mapping[str, str]
    timed: bool
    seconds: Mapping[str, tuple[int, float, float]]
    study: Study


def candidates_of(found: Study, kind: Ranks, against: Mapping[str, str], *, timed: bool) -> Candidates:
    """The menus of all layers that can be factored."""
    menus: dict[str, RankMenu] = {}
    spare: dict[str, RankMenu] = {}
    reasons = dict(against)
    for name in found.weights:
        if name not in reasons:
            with all_blas_threads():
                several = kind.menus(found, name)
            if not several:
                table = kind.tables.get(name)
                reasons[name] = "too small for any rank to pay" if table is None else table.why_not()
                continue
            menus[name] = several[0]
            if len(several) > 1:
                spare[name] = several[1]
    return Candidates(kind, menus, spare, reasons, timed, {}, found)


def without_dearer(table: Candidates, target: Target) -> Candidates:
    """Take layers off the menus that cost nothing now of what is bounded: two would."""
    dearer = {
        name for name, menu in table.menus.items() if not any(menu.dense[measure] for measure in target)
    }
    menus = {name: menu for name, menu in table.menus.items() if name not in dearer}
    measures = " and ".join(target)
    why = {
        name: f"steps multiply with all of it whatever its rank: no {measures} would be saved"
        if table.menus[name].gates
        else f"as two it would cost {measures}, of which it has none"
        for name in dearer
    }
    return replace(table, menus=menus, against={**table.against, **why})


def without_slower(table: Candidates, ranks: Mapping[str, int]) -> Candidates:
    """Take layers that take longer as two off the menus, or give them their other structure."""
    if not table.timed:
        return table
    menus, spare = dict(table.menus), dict(table.spare)
    against, seconds = dict(table.against), dict(table.seconds)
    timed: dict[object, list[tuple[int, float, float]]] = {}
    # The largest first: where they are faster as two, so are smaller ones of all layers like these.
    for name, rank in sorted(ranks.items(), key=lambda pair: -pair[1]):
        if menus[name].gates:
            # Made whole in every call, which saves no time at any rank.
            continue
        if rank > seconds.get(name, (0, 0.0, 0.0))[0]:
            times = timed.setdefault(_kind_of(table, name), [])
            if not any(_tells(one, rank) for one in times):
                both = seconds_of_both(table.study, menus[name], rank, table.kind.inputs.get(name))
                both = table.study.options.ranks.first(both)
                if both is None:
                    continue
                times.append((rank, *both))
            seconds[name] = next(one for one in times if _tells(one, rank))
        least, before, after = seconds[name]
        if after >= before:
            against[name] = f"rank {least} would take {after / before:.2f} times as long"
            del seconds[name], menus[name]
            if name in spare:
                menus[name] = spare.pop(name)
    # In the network's order, as the first time.
    ordered = {name: menus[name] for name in table.menus if name in menus}
    return replace(table, menus=ordered, spare=spare, against=against, seconds=seconds)


def _kind_of(table: Candidates, name: str) -> object:
    """Equal where two layers take as long at equal ranks."""
    layer, x = find_layer(table.study.model, name), table.kind.inputs.get(name)
    weight = table.study.weights[name]
    shapes = weight.shape, weight.dtype, None if x is None else x.shape
    return type(layer), repr(layer), *shapes, table.menus[name].spatial


def _tells(timed: tuple[int, float, float], rank: int) -> bool:
    """Whether a time at one rank says which is faster at another."""
    known, before, after = timed
    return rank <= known if after < before else rank >= known


def line_of(table: Candidates, rebuilt: Rebuilt, laid: LaidOut, name: str) -> LayerReport:
    """What became of a layer, and why."""
    timed, before, after = table.seconds.get(name, (0, None, None))
    done = next((line for line in laid.lines if line.name == name), None)
    error = rebuilt.fits[name].error if name in rebuilt.fits else None
    if done is None or not done.layout.startswith("rank"):
        why = table.against.get(name, "others lose less for what they save")
        why = "it became too narrow for its rank to pay" if done is not None else why
        return LayerReport(name, 1.0, "dense", why, before, after, error)
    why = done.why
    if name in table.menus and (others := table.menus[name].names[1:]):
        why += f", shared with {', '.join(others)}"
    if before is not None and after is not None:
        form = rebuilt.fits[name].form
        least = "at least " * (isinstance(form, LowRank) and form.rank < timed)
        why += f", {least}{before / after:.1f} times as fast"
    return replace(done, why=why, dense_seconds=before, new_seconds=after, error=error)


def reasons_of(against: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" if name else why for name, why in [*against.items()][:3])


def check_named(found: Study, table: Candidates, ranks: Mapping[str, int]) -> None:
    """Refuse layers that cannot have the rank they were named with."""
    for name, rank in ranks.items():
        if name not in found.weights:
            find_layer(found.model, name)
        if name not in table.menus:
            why = table.against.get(name, "it has no weight")
            own = [one for one in found.weights if one.startswith(f"{name}.weight_")]
            why = f"name one of its weights, such as {own[0]}" if own else why
            raise PysolveError(f"{name} cannot be factored: {why}.")
        if rank > (most := table.menus[name].most):
            raise PysolveError(
                f"rank {rank} of {name} would be no smaller than the layer is: at most {most}."
            )
