"""The recipe: study a network, choose sizes, refit every layer, cut, and check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from pysolve.compressed import Compressed
from pysolve.methods.account import after
from pysolve.methods.goal import check_goal, check_model, check_options
from pysolve.methods.shrink import shrink
from pysolve.methods.sizes import channels_to_keep
from pysolve.methods.study import Select, study
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.plan import Site
from pysolve.report.report import Report

Target = Mapping[str, float]
# Arguments that concern the pass over the data, and those that concern what follows.
STUDIED = ("select", "ignore", "sites", "divergence", "memory", "progress")
SHRUNK = ("refit", "distill", "seed", "progress")


def compress(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    target: Target | None = None,
    keep: float | Mapping[str, float] | None = None,
    lam: float | Mapping[str, float] | None = None,
    select: Select = "elimination",
    refit: str = "sequential",
    distill: float | Mapping[str, float] = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
    sites: Sequence[Site] | None = None,
    round_to: int = 1,
    divergence: Divergence = kl_divergence,
    memory: int | None = None,
) -> Compressed:
    """Make a network smaller, without labels and without training it again.

    One pass over the data gathers the correlations of every layer that reads channels which can go. Each
    site's channels are ordered by what the refitted readers miss least; the divergence of the network's
    outputs, measured on samples held back, tells what shrinking each site does; sizes are chosen to do the
    least harm within the target; then every layer is refitted front to back, on the compressed network's
    inputs and the original's outputs.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed.
    batches : iterable of batches
        What users have: tensors, tuples or lists whose first item is the input, or mappings of keyword
        arguments; labels are ignored. Any amount of them.
    target : {"params", "macs" or "bytes": number}
        What the result may cost: a share of the original up to 1, or a whole number above. Default
        {"params": 0.25}, unless ``keep`` or ``lam`` is given.
    keep : float or {writer: number}
        Instead of a target: the share (a float up to 1) or number of channels that each site keeps; sites
        without an entry keep all.
    lam : float or {writer: float}
        Instead of a target: the penalty of the joint group lasso  Σ_r ½ E‖y_r − M_r x‖² + lam Σ_g ‖M_g‖_F
        over each site's readers r, whose non-zero groups stay.
    select : str, or {site's name: (channels,) scores}
        How channels are chosen: "elimination" or any method of ``select_channels``; or by scores of every
        channel of every site that can shrink, of which the largest stay.
    refit : "sequential", "independent" or "none"
        Every layer on the compressed network's own inputs, or the readers alone on the original's, or nothing
        at all: the weights that are left stay as they are.
    distill : number of seconds, or {"seconds" or "epochs": number}
        Afterwards, train the result to give the original's outputs on the batches; undone, with a note, where
        that takes its outputs on the samples held back further from the original's, by more than chance.
    evaluate : callable, optional
        From a network to a score, for the report.
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    seed : int
        Of the choice of rows and of distillation. The same seed gives the same network.
    progress : bool
        Show progress bars, with the time left, when on a terminal.
    sites : sequence of Site, optional
        Instead of those that ``find_sites`` finds; needed for a network that cannot be exported, whose
        readers are then refitted independently.
    round_to : int
        Sites keep multiples of this many channels, or all.
    divergence : callable
        From the original's and another output to how far they are apart, averaged over samples.
    memory : int, optional
        Bytes that the refit may hold in activations; by default half of what is free. Beyond, it uses fewer
        samples, and the report says so.

    Returns
    -------
    Compressed

    Raises
    ------
    PysolveError
        No channel can go; a target that cannot be reached (names the smallest that can); a network that
        cannot be traced.
    """
    network = model.model if isinstance(model, Compressed) else model
    check_model(network)
    check_goal(target, keep, lam)
    check_options(network, select, refit, distill, ignore, sites, round_to, memory)
    wanted = {"params": 0.25} if target is None and keep is None and lam is None else target
    found = study(
        network,
        batches,
        select=select,
        ignore=ignore,
        sites=sites,
        divergence=divergence,
        memory=memory,
        progress=progress,
    )
    sizes = channels_to_keep(found, wanted, keep, lam, round_to)
    result = shrink(
        found,
        sizes,
        target=wanted,
        refit=refit,
        distill=distill,
        evaluate=evaluate,
        seed=seed,
        progress=progress,
    )
    return after(model, result)


def sweep(
    model: nn.Module | Compressed,
    batches: Iterable[Any],
    *,
    targets: Iterable[Target],
    evaluate: Callable[[nn.Module], float] | None = None,
    retrain: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> list[Report]:
    """Compress to several targets after one pass over the data.

    Parameters
    ----------
    model, batches, evaluate
        As in ``compress``.
    targets : iterable of targets
    retrain : callable, optional
        Trains a network in place; each result is evaluated once more after it. Needs ``evaluate``.
    options
        Further arguments of ``compress``, but for ``keep`` and ``lam``.

    Returns
    -------
    list of Report
        In the order of the targets: what ``compress`` reports of each.
    """
    network = model.model if isinstance(model, Compressed) else model
    wanted = _checked_sweep(network, targets, evaluate, retrain, options)
    found = study(network, batches, **{name: options[name] for name in STUDIED if name in options})
    reports = []
    for target in wanted:
        # What is measured for one target does not steer the next.
        fresh = replace(found, harms=[dict(known) for known in found.harms])
        sizes = channels_to_keep(fresh, target, None, None, options.get("round_to", 1))
        given = {name: options[name] for name in SHRUNK if name in options}
        result = shrink(fresh, sizes, target=target, evaluate=evaluate, **given)
        report = result.report
        if retrain is not None and evaluate is not None:
            retrain(result.model)
            report = replace(report, retrained=float(evaluate(result.model)))
        reports.append(report)
    return reports


def _checked_sweep(
    network: nn.Module, targets: Any, evaluate: Any, retrain: Any, options: Mapping[str, Any]
) -> list[Target]:
    """The targets of a sweep, after its arguments."""
    check_model(network)
    known = {name: parameter.default for name, parameter in signature(compress).parameters.items()}
    takes = sorted({*STUDIED, *SHRUNK, "round_to"})
    for name in options:
        if name not in takes:
            raise TypeError(f"sweep has no argument {name!r}; beside its own it takes {', '.join(takes)}.")
    names = ("select", "refit", "distill", "ignore", "sites", "round_to", "memory")
    check_options(network, *({**known, **options}[name] for name in names))
    if retrain is not None and evaluate is None:
        raise ValueError("retrain needs evaluate, which says how good the network is afterwards.")
    if isinstance(targets, Mapping):
        raise TypeError(f"targets must be a list of targets, got one: pass [{dict(targets)}].")
    wanted = list(targets)
    for target in wanted:
        check_goal(target, None, None)
    return wanted
