"""``low_rank``: layers that are factored into two smaller ones, and channels under the same target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import numpy as np
from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.correlations import Indices
from pysolve.errors import PysolveError, check_flags, exactly_one, one_of
from pysolve.layer.reduced_rank import rank_keeping
from pysolve.methods.budget import costs_of, settle
from pysolve.methods.candidates import (
    Candidates,
    candidates_of,
    check_named,
    line_of,
    reasons_of,
    without_dearer,
    without_slower,
)
from pysolve.methods.goal import (
    Length,
    Memory,
    Target,
    check_distill,
    check_target,
    check_whole,
    network_of,
    options_for,
    prepared,
)
from pysolve.methods.head_dims import contest, priced, with_dims, without_dims
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.kinds.embeddings import UNSEEN
from pysolve.methods.kinds.ranks import STRUCTURES, ranks_of
from pysolve.methods.layout import LaidOut, check_layout, lay_out
from pysolve.methods.menu import Chosen, Menu
from pysolve.methods.price import Probe, divergence_of, price, probe
from pysolve.methods.rebuild import PASSES, Rebuilt, rebuild
from pysolve.methods.result import distance, finish
from pysolve.methods.sizes import Sized, site_reports, sized
from pysolve.methods.streams import as_needed, in_principal_axes
from pysolve.methods.studied import studied
from pysolve.methods.study import Clock, Study
from pysolve.methods.weights import reasons, weights_of
from pysolve.nn.batches.items import Transform
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate
from pysolve.nn.layer_kinds import WEIGHTED
from pysolve.nn.progress import one_bar
from pysolve.nn.running import Batch, Device, Ignored
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Site
from pysolve.solve.budget import MEASURES

METHODS = ("activation", "svd")
LAYOUTS = ("auto", "factored")
REFITS = ("sequential", "independent", "none")
# Of two plans one is not carried out that is so many times as far from the original before layers are
# refitted one after the other, which brought networks nearer by a factor of 1.7 to 3.4.
_BEHIND = 4


@one_blas_thread
@one_bar
def low_rank(
    model: nn.Module | Compressed,
    batches: Iterable[Batch] | Study | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    target: Target | None = None,
    method: str | None = None,
    structure: str = "auto",
    prune: bool = False,
    unseen: str = "exact",
    refit: str = "sequential",
    layout: str = "auto",
    distill: Length = 0,
    ignore: Sequence[Ignored] = (),
    evaluate: Evaluate | None = None,
    divergence: Divergence = kl_divergence,
    memory: Memory = None,
    transform: Transform | None = None,
    latency: bool = True,
    process_group: ProcessGroup | None = None,
    device: Device = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Factor layers of a network: each becomes two smaller ones, without labels and without training.

    Exactly one of ``rank``, ``energy`` and ``target`` says how far.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Linear layers, convolutions without groups, embeddings and weights of recurrent layers
        can be factored; where heads share an embedding's weight, they share its factors.
    batches : iterable of batches, optional
        As ``compress`` takes them, unlabelled; needed for "activation" and for a target.
    rank : int or {layer: int}
        Of every layer for which it pays, or of those that are named: of recurrent layers their weights, such
        as "lstm.weight_hh_l0".
    energy : float
        Share of E‖M x‖² around its mean ("svd": of ‖W‖²) that each layer keeps.
    target : {"params", "macs" or "bytes": number}
        What the network may cost, as ``compress`` has it. Ranks are shared out by what they do to the
        network's outputs on held-out samples; layers may stay as they are.
    method : "activation" or "svd"
        "svd": the nearest weights, min ‖W − U V‖. "activation" (default, if there are batches): the nearest
        outputs, min E‖y − U V x − b‖² in the metric of what they mean to the network's, from the correlations
        of what a layer reads: solved exactly but for spatial factors, which are refitted in turn; layer after
        layer on the factored network's own inputs, the layers between refitted too.
    structure : "auto", "channel" or "spatial"
        Of 2-d convolutions: the kernel to r channels and 1 × 1 behind, or k × 1 and 1 × k; by default
        whichever loses less at half the cost.
    prune : bool
        With a target: channels may be removed as well, as ``compress`` does it. Each layer is pruned,
        factored, both, or left alone, for the least divergence together, and refitted once.
    unseen : "exact" or "approximate"
        Rows of an embedding that no batch looks up: stored as they are, or approximated as if they had been
        looked up once.
    refit : "sequential", "independent" or "none"
        As ``compress`` has it; "none" where only weights are approximated.
    layout : "auto" or "factored"
        "auto": layers that take longer as two, measured on a held-out batch, stay as they are; embeddings,
        which multiply nothing, and recurrent weights, which are multiplied out, are not timed.
        "factored": the time does not matter.
    distill : number of seconds, or {"seconds" or "epochs": number, …}
        Label-free matching afterwards, as ``compress`` has it.
    ignore : sequence of str, types or modules
        Layers to leave alone: names, patterns as ``re:…``, types, or the layers themselves.
    evaluate : callable, optional
        From a network to a score, for the report.
    divergence : callable
        As in ``compress``.
    seed : int
        Of the choice of rows and of distillation.
    progress : bool
        Show progress bars, with the time left, when on a terminal.
    memory, transform, latency, process_group, device
        As ``compress`` has them.

    Returns
    -------
    Compressed
        Factored layers are ``pysolve.nn.Factored``, two ordinary layers, or ``FactoredRecurrent``. The report
        says for each layer what became of it, and why.

    Raises
    ------
    PysolveError
        When a layer named by ``rank`` cannot be factored, or would not be smaller; no layer can be factored;
        a target out of reach.
    TypeError, ValueError
        Arguments that make no sense, before any work.

    References
    ----------
    A. J. Izenman, Reduced-rank regression for the multivariate linear model, 1975.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> factored = ps.low_rank(model, batches, rank=2, layout="factored", latency=False)
    >>> factored.model[0].inner, factored.model[0].outer
    (Linear(in_features=16, out_features=2, bias=False), Linear(in_features=2, out_features=64, bias=True))
    """
    before, given = network_of(model, dense=False)
    method = method or ("svd" if batches is None else "activation")
    how = check_distill(given, distill)
    _check(
        rank,
        energy,
        target,
        method,
        structure,
        layout,
        refit,
        unseen,
        blind=batches is None,
        prune=prune,
        distill=how,
    )
    options = options_for(
        given, ignore, divergence, memory, seed, progress, evaluate, transform, latency, process_group, device
    )
    network, options = prepared(given, options)
    weights, left = weights_of(network, options.ignore, (*WEIGHTED, nn.Embedding), tied=True, recurrent=True)
    plain = method == "svd"
    turns = prune and refit != "none"
    refit = "none" if plain else refit
    found = studied(
        network, batches, options, weights=weights, sites=prune, gather=not plain, heads=turns, left=left
    )
    found, inner = without_dims(found)
    found = in_principal_axes(found) if turns else found
    clock = Clock()
    kind, against = ranks_of(found, structure, plain, unseen)
    table = candidates_of(found, kind, against, timed=layout == "auto")
    if isinstance(rank, Mapping):
        check_named(found, table, rank)
    if not table.menus and not found.free:
        why = reasons_of(table.against) or f"none has its own weight{reasons(left, ignore)}"
        raise PysolveError(f"no layer can be factored: {why}.")
    if target is None:
        plans = [_Plan(found, None, *_ranks_as_told(table, rank, energy))]
    else:
        plans = _plans_within(found, table, target, inner, refits=refit != "none")
    clock.stage("choose")
    made = [_made(plan, refit) for plan in plans]
    clock.stage("refit")
    best, notes = _nearest(found, made)
    found, plan, rebuilt, laid = best.study, best.plan, best.rebuilt, best.laid
    clock.stage("apply")
    return finish(
        before,
        found,
        laid,
        clock,
        target=target,
        samples=rebuilt.samples,
        sites=[*site_reports(found, plan.widths)] if plan.widths else [],
        lines=[line_of(plan.table, rebuilt, laid, name) for name in weights],
        notes=(*rebuilt.notes, *notes),
        distill=how,
        selected=target is not None,
    )


@dataclass(frozen=True, eq=False)
class _Plan:
    """Channels of a study that stay, where some go, and ranks of the layers that are factored."""

    study: Study
    widths: Sized | None
    ranks: Mapping[str, int]
    table: Candidates

    @property
    def keep(self) -> Mapping[Site, Indices]:
        """Channels that stay of the sites that lose some."""
        return self.widths.keep if self.widths else {}

    def chosen(self, found: Study) -> Chosen:
        """What it makes of a network, which is the study's own or the one that was turned into it."""
        menus, turn = {name: self.table.menus[name] for name in self.ranks}, self.study.turn
        if found.turn is None and turn is not None:
            kind = self.table.kind.unturned(turn.outputs)
            menus = {name: kind.again(found, menu) for name, menu in menus.items()}
        return reduce(or_, [menus[name].at(k) for name, k in self.ranks.items()], Chosen(self.keep))


@dataclass(frozen=True, eq=False)
class _Made:
    """A plan carried out, on a study that is turned where the plan needs it."""

    plan: _Plan
    study: Study
    rebuilt: Rebuilt
    laid: LaidOut


def _made(plan: _Plan, refit: str) -> _Made:
    """The network that a plan makes, refitted."""
    found = as_needed(plan.study, plan.keep)
    chosen = plan.chosen(found)
    rebuilt = rebuild(found, chosen, refit if chosen.fits or chosen.keep else "none", passes=PASSES)
    return _Made(plan, found, rebuilt, lay_out(found, rebuilt, "factored"))


def _nearest(found: Study, made: Sequence[_Made]) -> tuple[_Made, tuple[str, ...]]:
    """The network whose outputs are nearest to the original's on the selection set, and what to say of it."""
    if len(made) == 1:
        return made[0], ()
    both, alone = (
        distance(found.original, one.laid.model, found.held, found.options.divergence) for one in made
    )
    if both <= alone:
        return made[0], ()
    return made[1], (
        f"no layer is factored: a divergence of {alone:.3g} without and of {both:.3g} with ranks",
    )


def _ranks_as_told(
    table: Candidates, rank: int | Mapping[str, int] | None, energy: float | None
) -> tuple[dict[str, int], Candidates]:
    """Ranks of the layers that are factored, all the same, by energy or by name."""
    while True:
        ranks, against = dict[str, int](), dict(table.against)
        for name, menu in table.menus.items():
            if energy is not None:
                wanted: int | None = rank_keeping(menu.lost, energy)
            else:
                wanted = rank.get(name) if isinstance(rank, Mapping) else rank
            if wanted is None:
                against[name] = "not asked for"
            elif wanted > menu.most:
                against[name] = f"only ranks up to {menu.most} would be smaller"
            else:
                ranks[name] = int(wanted)
        table = replace(table, against=against)
        faster = without_slower(table, ranks)
        if faster is table or faster.menus == table.menus:
            return ranks, faster
        table = faster


def _plans_within(
    found: Study, table: Candidates, target: Target, dims: Sequence[Site], *, refits: bool
) -> list[_Plan]:
    """Channels and ranks within a target, for the least divergence; and channels alone, where that can be.

    What single units cause adds up less well where there are more kinds of them. ``dims``: of heads, which
    may go where no layer is factored.
    """
    sites: Sequence[Menu] = Channels().menus(found)
    table = without_dearer(table, target)
    also = [name for menu in table.menus.values() for name in menu.names]
    names, costs = [*table.menus], costs_of(found, also=also)
    while True:
        where = probe(found, [*sites, *table.menus.values()])
        sites, layers = price(found, sites, where), price(found, [*table.menus.values()], where)
        try:
            done = settle(found, costs, sites, layers, target, where)
        except PysolveError as error:
            gone = [name for name in names if name not in table.menus]
            hint = f" Left as they are, since they would take longer as two: {', '.join(gone)}; with "
            raise PysolveError(
                f"{error}{hint}layout='factored' they count." if gone else str(error)
            ) from None
        sites, table = done.sites, replace(table, menus={str(menu.unit): menu for menu in done.layers})
        faster = without_slower(table, done.ranks)
        if faster.menus == table.menus:
            break
        table = faster
    chosen = sized(found, done.sites, done.sizes, done.predicted) if sites else None
    plans = [_Plan(found, chosen, done.ranks, faster)]
    inner = with_dims(found, dims, Channels(), one=False)
    if sites and (done.ranks or inner):
        with suppress(PysolveError):
            alone = settle(found, costs_of(found), sites, (), target, where)
            study, heads = found, sized(found, alone.sites, alone.sizes, alone.predicted)
            if inner is not None:
                study, heads = contest(found, heads, priced(inner, where), target, where)
            plans.append(_Plan(study, heads, {}, faster))
    return _near(plans, where) if refits and len(plans) > 1 else plans


def _near(plans: Sequence[_Plan], where: Probe) -> list[_Plan]:
    """The plans without those that are far behind before anything is refitted layer after layer."""
    lost = [divergence_of(plan.study, plan.chosen(plan.study), where) for plan in plans]
    return [plan for plan, one in zip(plans, lost, strict=True) if one <= _BEHIND * min(lost)]


def _check(
    rank: int | Mapping[str, int] | None,
    energy: float | None,
    target: Target | None,
    method: str,
    structure: str,
    layout: str,
    refit: str,
    unseen: str,
    *,
    blind: bool,
    prune: bool,
    distill: Mapping[str, object],
) -> None:
    """What can be told to be wrong before any work."""
    check_flags(prune=prune)
    one_of("method", method, METHODS)
    one_of("structure", structure, STRUCTURES)
    one_of("refit", refit, REFITS)
    one_of("unseen", unseen, UNSEEN)
    check_layout(layout, LAYOUTS, "factored layers")
    exactly_one(rank=rank, energy=energy, target=target)
    if target is not None:
        check_target(target, MEASURES, "times of ranks are compared layer by layer, not budgeted")
    elif prune:
        raise ValueError("prune=True needs a target, within which channels and ranks compete.")
    for name, value in (
        rank.items() if isinstance(rank, Mapping) else [("", rank)] if rank is not None else []
    ):
        check_whole(f"the rank of {name}" if name else "rank", value)
    if energy is not None and not (isinstance(energy, int | float | np.number) and 0 < energy <= 1):
        raise ValueError(f"energy must be a share in (0, 1], got {energy!r}.")
    if blind and (method == "activation" or target is not None or distill):
        what = "a target" if target is not None else 'method="activation"'
        raise ValueError(f"{what} needs batches: unlabelled inputs.")
