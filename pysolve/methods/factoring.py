"""The network with factored layers, each fitted on what those before it leave; and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from pysolve.compressed import Compressed
from pysolve.correlations import Array, Correlations
from pysolve.forms import LowRank
from pysolve.methods.account import account
from pysolve.methods.candidates import Candidates, weights_of
from pysolve.methods.layerwise import Fitted, Reconstructed, near_old, reconstruct
from pysolve.nn.apply import apply
from pysolve.nn.calibration import take
from pysolve.plan import Plan, weight_name
from pysolve.report.rows import LayerReport


def factored(
    found: Candidates,
    ranks: Mapping[str, int],
    *,
    original: nn.Module | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Make the layers of the given ranks two.

    With correlations, layer after layer on the factored network's inputs; the layers between are refitted
    where their inputs changed.

    Parameters
    ----------
    found : Candidates
    ranks : {layer: int}
        Of layers that are no candidates it does not count.
    original : nn.Module, optional
        What the report compares with.
    seed : int
        Of the choice of rows.
    progress : bool
    """
    ranks = {name: rank for name, rank in ranks.items() if name in found.open}
    forms: dict[str, LowRank] = {}

    def fit(name: str, W: Array, correlations: Correlations | None) -> Fitted:
        if name not in ranks:
            assert correlations is not None
            return near_old(W, correlations)
        layer = found.factored(found.open[name], W, correlations, ranks[name])
        forms[weight_name(name)] = layer.form
        return layer

    if found.plain or found.material is None:
        done = Reconstructed(
            {}, {name: fit(name, weights_of(found.layers[name]), None).error for name in ranks}, 0
        )
    elif not ranks:
        done = Reconstructed({}, {}, 0)
    else:
        done = reconstruct(found.material, fit, always=ranks.keys(), seed=seed, progress=progress)
    values = {name: value for name, value in done.values.items() if name.removesuffix(".weight") not in ranks}
    plan = Plan(values=values, forms=forms)
    probe = None if found.held is None else take(found.held, 0, 16)
    smaller = apply(found.model, plan, probe=probe)
    report = account(
        found.model if original is None else original,
        smaller,
        [] if probe is None else [found.held],
        divergence=found.divergence,
        seed=seed,
    )
    lines = tuple(_line(found, ranks, name, done.errors.get(name)) for name in found.layers)
    return Compressed(smaller, plan, replace(report, layers=lines, samples=done.samples, notes=found.notes))


def _line(found: Candidates, ranks: Mapping[str, int], name: str, error: float | None) -> LayerReport:
    _, before, after = found.seconds.get(name, (0, None, None))
    if name not in ranks:
        why = found.against.get(name, "others lose less for what they save")
        return LayerReport(name, 1.0, "dense", why, before, after, error)
    one, rank = found.open[name], ranks[name]
    kind = f"rank {rank}{', spatial' * one.spatial}"
    why = f"{one.each['params'] * rank / one.dense['params']:.0%} of the parameters"
    if before is not None and after is not None:
        why += f", {before / after:.1f} times as fast"
    return LayerReport(name, one.each["params"] * rank / one.dense["params"], kind, why, before, after, error)
