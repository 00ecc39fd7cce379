"""``compress``: channels removed under a target, every layer refitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.correlations import Array
from pysolve.errors import check_flags, one_of
from pysolve.methods.goal import (
    Length,
    Memory,
    Target,
    check_distill,
    check_keep,
    check_sites,
    check_target,
    network_of,
    options_for,
    prepared,
)
from pysolve.methods.head_dims import contest, menus_of, priced, with_dims, without_dims
from pysolve.methods.kinds.channels import ELIMINATIONS, SENSITIVITY, Channels, Select
from pysolve.methods.layout import LaidOut, lay_out
from pysolve.methods.menu import Chosen
from pysolve.methods.price import price, probe
from pysolve.methods.rebuild import PASSES, REFITS, Rebuilt, rebuild
from pysolve.methods.result import distance, finish
from pysolve.methods.sizes import (
    Sized,
    by_keep,
    by_lam,
    check_free,
    expected,
    experts_lost,
    site_reports,
    with_costs,
    within,
)
from pysolve.methods.streams import as_needed, in_principal_axes
from pysolve.methods.studied import studied
from pysolve.methods.study import Clock, Study
from pysolve.methods.ties import RoundTo, check_round_to, check_widths, uniform
from pysolve.nn.batches.items import Transform, check_batches
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate
from pysolve.nn.progress import one_bar
from pysolve.nn.running import Batch, Device, Ignored
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Site
from pysolve.report.rows import Expected
from pysolve.report.warnings import needed_experts
from pysolve.solve.selection import select_channels

DEFAULT: Target = {"params": 0.25}


@one_blas_thread
@one_bar
def compress(
    model: nn.Module | Compressed,
    batches: Iterable[Batch] | Study,
    *,
    target: Target | None = None,
    keep: float | Mapping[str | Site, float] | None = None,
    lam: float | Mapping[str | Site, float] | None = None,
    select: str | Mapping[str | Site, Array] = "elimination",
    refit: str = "sequential",
    distill: Length = 0,
    evaluate: Evaluate | None = None,
    ignore: Sequence[Ignored] = (),
    seed: int = 0,
    progress: bool = True,
    sites: Sequence[Site] | None = None,
    widths: str = "per_layer",
    round_to: RoundTo = 1,
    divergence: Divergence = kl_divergence,
    memory: Memory = None,
    transform: Transform | None = None,
    latency: bool = True,
    process_group: ProcessGroup | None = None,
    device: Device = None,
    dry_run: bool = False,
    head_dims: bool = True,
) -> Compressed:
    """Make a network smaller, without labels and without training it again.

    One pass over the data gathers the correlations of every layer that reads channels which can go. Each
    site's channels are ordered by what the refitted readers miss least; the divergence of the network's
    outputs, measured on held-out samples, tells what shrinking each site does; sizes are chosen for the least
    divergence within the target; then every layer is refitted front to back, on the compressed network's
    inputs and the original's outputs.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed.
    batches : iterable of batches, or Study
        What users have: tensors, tuples or lists whose first item is the input, or mappings of keyword
        arguments; labels are ignored, and so is padding where an ``attention_mask`` tells. Any amount of
        them; a Dataset of single samples; or what ``study`` gathered.
    target : {"params", "macs", "bytes" or "ms": number}
        What the result may cost: a share of the original up to 1, or an integer above. Default
        {"params": 0.25}, unless ``keep`` or ``lam`` is given. "ms" are milliseconds of a batch (of up to 64
        samples, of large networks fewer) where the call runs: networks are made and timed beside the
        original until one is near the target, and the report says how near. Timings differ from call to call,
        and so do the widths that they lead to.
    keep : float or {writer or Site: number}
        Instead of a target: the share (a float up to 1) or number of channels that each site keeps; sites
        without an entry keep all. 0, by name, removes a residual branch. Nothing is measured then but the
        result.
    lam : float or {writer or Site: float}
        Instead of a target: the penalty of the joint group lasso  Σ_r ½ E‖y_r − M_r x‖² + lam Σ_g ‖M_g‖_F
        over each site's readers r, whose non-zero groups stay.
    select : str, or {Site or its name: (channels,) scores}
        How channels are chosen: "elimination" or any method of ``select_channels``; "sensitivity", which is
        elimination in the metric of what errors mean to the network's outputs, and takes gradients; or by
        scores of every channel of every site that can shrink, of which the largest stay. By either
        elimination, with a target or
        ``keep``, streams that norms alone read lose principal axes instead of channels.
    refit : "sequential", "independent", "bias" or "none"
        Every layer on the compressed network's own inputs; the readers alone on the original's; biases alone;
        or nothing at all: the weights that are left stay as they are.
    distill : number of seconds, or {"seconds" or "epochs": number, …}
        Afterwards, train the result to give the original's outputs on the batches, with any further options
        of ``distill``; undone, with a note, where that takes its outputs on held-out samples further from
        the original's, by more than chance.
    evaluate : callable, optional
        From a network to a score, for the report.
    ignore : sequence of str, types or modules
        Layers to leave alone: names, patterns as ``re:…``, types, or the layers themselves.
    seed : int
        Of the choice of rows and of distillation. The same seed gives the same network, but for a target in
        milliseconds.
    progress : bool
        Show progress bars, with the time left, when on a terminal.
    sites : sequence of Site, optional
        Instead of those that ``find_sites`` finds; needed for a network that cannot be exported, whose
        readers are then refitted independently.
    widths : "per_layer" or "uniform"
        One size for corresponding sites of repeated layers, and no biases that layers did not have: what the
        network's own class makes of other numbers, and other software reads. Of a network of transformers,
        only what its configuration counts shrinks, to sizes that the configuration accepts;
        ``save_pretrained`` writes it. What ``keep`` names with 0 goes in this layer alone, without a
        constant. The report says what either choice is expected to cause.
    round_to : int, or {writer, pattern ``re:…`` or Site: int}
        Sites keep multiples of this many channels, or all.
    divergence : callable
        From the original's and another output to how far they are apart, averaged over samples.
    memory : int or str, optional
        Bytes that the call may take beyond the network, or words such as "4GiB". Sums that do not fit are
        gathered in several passes and kept on disk, and the refit uses fewer samples; the report says so.
        Without, all sums are held, and the refit's samples take at most half of the free memory.
    transform : callable, optional
        Makes such inputs of an item of ``batches``, of a Dataset's sample: ``lambda item: item["pixels"]``.
    latency : bool
        Whether the report times both networks and their layers, which takes at most about a twentieth of the
        call, or a second. What a target in milliseconds needs is timed all the same.
    process_group : torch.distributed.ProcessGroup, optional
        All processes of the group make the same call, each with its share of the batches, of which the i-th
        of rank r is number i · size + r of all. Sums are added up over them, measurements and refits shared,
        and every process ends with the same network.
    device : torch.device or str, optional
        Where to compute: a copy of the network and the batches are moved there; by default both must be on
        one device. The result is where ``model`` is; ``evaluate`` is called with networks there.
    head_dims : bool
        Whether attention may lose dimensions of its heads in the place of whole heads, layer by layer, where
        a target in parameters, MACs or bytes costs less divergence then: the same ones of all heads of a
        layer, of queries and keys as of values, in their principal axes. Takes an elimination, and refits;
        a target in milliseconds takes whole heads. With ``keep``, by their sites, which ``find_sites`` finds
        where it is asked to.
    dry_run : bool
        Cut nothing: the result is the network as it is, and ``report.expected`` tells which divergence to
        expect of the target, which is measured, and, where it is one share, of others, which follow from it
        and from the divergences of single sites.

    Returns
    -------
    Compressed

    Raises
    ------
    PysolveError
        ``memory`` is too little, with the least that would do; no channel can be removed; a target that
        cannot be reached (names the smallest that can); a network
        that cannot be traced.
    TypeError, ValueError
        Arguments that make no sense, before any work.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> smaller = ps.compress(model, batches, target={"params": 0.5}, latency=False)
    >>> smaller.report.after["params"] <= 0.5 * smaller.report.before["params"]
    True
    >>> smaller.model(batches[0]).shape
    torch.Size([100, 4])
    """
    check_batches(batches)
    check_flags(dry_run=dry_run, head_dims=head_dims)
    before, given = network_of(model, dense=False)
    several = [name for name, one in (("target", target), ("keep", keep), ("lam", lam)) if one is not None]
    if len(several) > 1:
        raise ValueError(f"give one of target, keep and lam, got {' and '.join(several)}.")
    wanted = DEFAULT if not several else target
    if dry_run and (wanted is None or "ms" in wanted):
        raise ValueError('a dry run tells what targets of "params", "macs" and "bytes" would cost; give one.')
    targets = [] if wanted is None else [wanted]
    how = checked(given, targets, select, refit, distill, sites, ignore, round_to)
    check_keep(keep, lam)
    one = check_widths(widths, lam)
    turns = select in ELIMINATIONS and refit != "none" and lam is None
    keys = [key for key in keep if isinstance(key, Site)] if isinstance(keep, Mapping) else []
    inside = [site.name for site in (*keys, *(sites or ())) if isinstance(site, Site) and site.attention]
    if inside and not turns:
        raise ValueError(
            f"{inside[0]} are axes that elimination chooses and a refit turns: give keep or a target, with "
            "select='elimination' and another refit than 'none', or leave that site out."
        )
    # A share of all sites, and a penalty of all, are of channels that the user's own modules have.
    named_sites = sites is not None or isinstance(keep, Mapping) or isinstance(lam, Mapping)
    apart = wanted is not None or named_sites
    options = options_for(
        given, ignore, divergence, memory, seed, progress, evaluate, transform, latency, process_group, device
    )
    network, options = prepared(given, replace(options, new_biases=not one), apart=apart)
    every = True if sites is None else sites
    # What a class makes of one number for all layers may be without some, if that is told.
    branches = not one or (isinstance(keep, Mapping) and 0 in keep.values())
    found = studied(
        network,
        batches,
        options,
        sites=every,
        experts=lam is None,
        branches=branches,
        heads=turns and (head_dims or bool(inside)),
    )
    found = found if wanted is None else with_costs(found)
    found, inner = without_dims(found)
    check_free(found)
    ties = uniform(found) if one else None
    found = in_principal_axes(found) if turns else found
    clock, channels = Clock(), Channels(by_site(found, select))
    menus = channels.menus(found)
    if lam is not None:
        sized = by_lam(found, menus, lam)
    elif keep is not None:
        own = [site for site in inner if isinstance(keep, Mapping) and site in keep]
        if dims := with_dims(found, own, channels, one=one):
            found, menus, ties = dims.study, [*menus, *dims.menus], dims.ties
        sized = by_keep(found, menus, keep, round_to, ties)
    else:
        assert wanted is not None
        dims = None if "ms" in wanted else with_dims(found, inner, channels, one=one)
        where = probe(found, [*menus, *menus_of(dims)])
        menus = price(found, menus, where)
        costs = expected(found, menus, wanted, round_to, ties) if dry_run else ()
        if any(one.target == wanted and one.divergence is None for one in costs):
            clock.stage("measure")
            return told(before, found, clock, costs)
        sized = within(found, menus, wanted, where, round_to, ties)
        if dims is not None:
            found, sized = contest(found, sized, priced(dims, where), wanted, where, round_to)
        if dry_run:
            clock.stage("measure")
            return told(before, found, clock, measured(found, costs, wanted, sized, refit, clock))
    clock.stage("measure")
    return made(before, found, sized, clock, wanted, refit, how)


def measured(
    found: Study, costs: Sequence[Expected], target: Target, sized: Sized, refit: str, clock: Clock
) -> list[Expected]:
    """What targets would cost, by the network that one of them makes.

    The others differ from the sums of their single sites by the same factor.
    """
    own = next(one.divergence for one in costs if one.target == target)
    if not own or not found.apart:
        return [*costs]
    found = as_needed(found, sized.keep)
    _, laid = _rebuilt(found, Chosen(sized.keep), refit, clock)
    factor = distance(found.original, laid.model, found.apart, found.options.divergence) / own
    return [
        replace(one, divergence=None if one.divergence is None else factor * one.divergence) for one in costs
    ]


def told(
    before: nn.Module | Compressed, found: Study, clock: Clock, targets: Sequence[Expected]
) -> Compressed:
    """The network as it is, with a report of what targets would cost."""
    found = as_needed(found, {})
    found = replace(found, options=replace(found.options, latency=False))
    return finish(before, found, lay_out(found, Rebuilt(Chosen()), "dense"), clock, expected=targets)


def made(
    before: nn.Module | Compressed,
    found: Study,
    sized: Sized,
    clock: Clock,
    target: Target | None,
    refit: str,
    distill: Mapping[str, object],
) -> Compressed:
    """A studied network, refitted with some channels kept, cut, checked and reported."""
    found = as_needed(found, sized.keep)
    rebuilt, laid = _rebuilt(found, Chosen(sized.keep), refit, clock)
    return finish(
        before,
        found,
        laid,
        clock,
        target=target,
        samples=rebuilt.samples,
        sites=[*site_reports(found, sized)],
        solves=sized.solves,
        notes=(*sized.said, *rebuilt.notes),
        warnings=needed_experts(experts_lost(found, sized)),
        distill=distill,
        selected=sized.predicted is not None,
        together=sized.together,
    )


def _rebuilt(found: Study, chosen: Chosen, refit: str, clock: Clock) -> tuple[Rebuilt, LaidOut]:
    """The network refitted and cut; experts together where the selection set is nearer then."""

    def one(stacks: bool) -> tuple[Rebuilt, LaidOut]:
        rebuilt = rebuild(found, chosen, refit, passes=PASSES, stacks=stacks)
        clock.stage("refit")
        laid = lay_out(found, rebuilt, "dense")
        clock.stage("apply")
        return rebuilt, laid

    rebuilt, laid = one(True)
    if not rebuilt.stacks or not found.held:
        return rebuilt, laid
    other, without = one(False)
    before, after = (
        distance(found.original, one.model, found.held, found.options.divergence) for one in (without, laid)
    )
    if after < before:
        return rebuilt, laid
    note = (
        "experts and recurrent layers keep the weights that they have, or are refitted one by one: on the "
        f"selection set the divergence is {before:.3g} so, {after:.3g} with all refitted together"
    )
    return replace(other, notes=(*other.notes, note)), without


def checked(
    network: nn.Module,
    targets: Sequence[Target],
    select: str | Mapping[str | Site, Array],
    refit: str,
    distill: Length,
    sites: Sequence[Site] | None,
    ignore: Sequence[Ignored],
    round_to: RoundTo,
) -> dict[str, object]:
    """Refuse what can be told to be wrong without running the network; options of distillation."""
    for target in targets:
        check_target(target)
    if not isinstance(select, Mapping) and select != SENSITIVITY:
        # A problem of one channel: whether the method exists is checked where it is known.
        select_channels(np.eye(1), np.eye(1), 1, method=select)
    one_of("refit", refit, REFITS)
    if sites is not None:
        check_sites(sites, ignore)
    check_round_to(round_to)
    return check_distill(network, distill)


def by_site(found: Study, select: str | Mapping[str | Site, Array]) -> Select:
    """Scores by site, where users give them by the sites' names."""
    if isinstance(select, str):
        return select
    named = {site: select.get(site, select.get(site.name)) for site in found.free}
    missing = [site.name for site, scores in named.items() if scores is None]
    if missing:
        raise ValueError(f"select must give scores for every site that can shrink; {missing[0]} has none.")
    return {site: np.asarray(scores, dtype=np.float64) for site, scores in named.items()}
