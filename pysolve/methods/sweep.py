"""``sweep``: channels removed under several targets, after one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.distributed import ProcessGroup

from pysolve.compressed import Compressed
from pysolve.correlations import Array
from pysolve.errors import check_flags
from pysolve.methods.compress import by_site, checked, made
from pysolve.methods.goal import (
    Length,
    Memory,
    Target,
    network_of,
    options_for,
    prepared,
)
from pysolve.methods.head_dims import contest, menus_of, priced, with_dims, without_dims
from pysolve.methods.kinds.channels import ELIMINATIONS, Channels
from pysolve.methods.price import price, probe
from pysolve.methods.result import later_score
from pysolve.methods.sizes import (
    check_free,
    with_costs,
    within,
)
from pysolve.methods.streams import in_principal_axes
from pysolve.methods.studied import studied
from pysolve.methods.study import Clock, Study
from pysolve.methods.ties import RoundTo, check_widths, uniform
from pysolve.nn.batches.items import Transform, check_batches
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import Evaluate
from pysolve.nn.progress import one_bar
from pysolve.nn.running import Batch, Device, Ignored
from pysolve.nn.threads import one_blas_thread
from pysolve.plan import Site
from pysolve.report.sweep import Sweep


@one_blas_thread
@one_bar
def sweep(
    model: nn.Module | Compressed,
    batches: Iterable[Batch] | Study,
    *,
    targets: Iterable[Target],
    evaluate: Evaluate | None = None,
    retrain: Callable[[nn.Module], object] | None = None,
    select: str | Mapping[str | Site, Array] = "elimination",
    refit: str = "sequential",
    distill: Length = 0,
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
    checkpoint: str | os.PathLike[str] | None = None,
    head_dims: bool = True,
) -> Sweep:
    """Compress to several targets after one pass over the data.

    Parameters
    ----------
    model, batches, evaluate
        As in ``compress``.
    targets : iterable of targets
    retrain : callable, optional
        Trains each result in place, which is evaluated once more after it. Needs ``evaluate``.
    select, refit, distill, ignore, seed, progress, sites, widths, round_to, divergence, memory, transform,
    latency, process_group, device, head_dims
        As in ``compress``.
    checkpoint : path, optional
        Folder for sums, from which a killed call goes on, as in ``study``.

    Returns
    -------
    Sweep
        A sequence of ``Compressed``, in the order of the targets: what ``compress`` makes of each.

    Raises
    ------
    PysolveError, TypeError, ValueError
        As ``compress``.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> targets = [{"params": 0.5}, {"params": 0.25}]
    >>> results = ps.sweep(model, batches, targets=targets, latency=False)
    >>> [result.report.after["params"] for result in results]
    [655, 319]
    """
    check_batches(batches)
    before, given = network_of(model, dense=False)
    if retrain is not None and evaluate is None:
        raise ValueError("retrain needs evaluate, which says how good the network is afterwards.")
    if isinstance(targets, Mapping):
        raise TypeError(f"targets must be a list of targets, got one: pass [{dict(targets)}].")
    check_flags(head_dims=head_dims)
    wanted = list(targets)
    how = checked(given, wanted, select, refit, distill, sites, ignore, round_to)
    one = check_widths(widths)
    options = options_for(
        given,
        ignore,
        divergence,
        memory,
        seed,
        progress,
        evaluate,
        transform,
        latency,
        process_group,
        device,
        checkpoint,
    )
    options = replace(options, new_biases=not one)
    network, options = prepared(given, options)
    every = True if sites is None else sites
    turns = select in ELIMINATIONS and refit != "none"
    found = studied(
        network, batches, options, sites=every, experts=True, branches=not one, heads=turns and head_dims
    )
    found, inner = without_dims(with_costs(found))
    check_free(found)
    ties = uniform(found) if one else None
    found = in_principal_axes(found) if turns else found
    clock, channels = Clock(), Channels(by_site(found, select))
    menus = channels.menus(found)
    dims = with_dims(found, inner, channels, one=one)
    where = probe(found, [*menus, *menus_of(dims)])
    menus = price(found, menus, where)
    dims = None if dims is None else priced(dims, where)
    clock.stage("measure")
    found, results = replace(found, seconds={**found.seconds, **clock.seconds}), []
    for target in wanted:
        clock = Clock()
        study, sized = found, within(found, menus, target, where, round_to, ties)
        if dims is not None and "ms" not in target:
            study, sized = contest(found, sized, dims, target, where, round_to)
        clock.stage("choose")
        result = made(before, study, sized, clock, target, refit, how)
        if retrain is not None:
            retrain(result.model)
            score, notes = later_score(options, result.model)
            notes = (*result.report.notes, *notes)
            result = replace(result, report=replace(result.report, retrained=score, notes=notes))
        results.append(result)
    return Sweep(results)
