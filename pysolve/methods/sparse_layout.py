"""How pruned layers run: dense or sparse, whichever is faster and smaller; and the network made so."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.compressed import Compressed
from pysolve.forms import Sparse
from pysolve.methods.account import Evaluate, account, scored
from pysolve.methods.selected import Pruned
from pysolve.nn.apply import apply
from pysolve.nn.calibration import samples_in, take
from pysolve.nn.divergence import Divergence, kl_divergence
from pysolve.nn.evaluate import latency, nbytes
from pysolve.nn.layers.masking import mask_weights
from pysolve.nn.layers.runtime import in_form
from pysolve.nn.profile import layer_inputs
from pysolve.plan import Plan, weight_name
from pysolve.report.rows import LayerReport

LAYOUTS = ("auto", "dense", "csr", "mask")
# Calls that a layer is timed over, in each layout, and the share of the dense time that counts as faster.
_REPEATS, _FASTER = 15, 0.9


def laid_out(
    original: nn.Module,
    pruned: Pruned,
    layout: str,
    *,
    against: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    divergence: Divergence = kl_divergence,
    seed: int = 0,
) -> Compressed:
    """The network with pruned weights, each in the layout that suits it, and a report.

    Parameters
    ----------
    original : nn.Module
    pruned : Pruned
    layout : str
        Of ``LAYOUTS``, as ``prune`` has it.
    against : nn.Module, optional
        What the report compares with, by default the original.
    evaluate : callable, optional
    divergence : callable
    seed : int
    """
    weights, batch = pruned.weights, pruned.batch
    layers = {name: original.get_submodule(name) for name in weights}
    inputs = {} if batch is None else layer_inputs(original, layers, batch)
    lines = tuple(
        replace(
            _laid_out(name, layers[name], weight, layout, inputs.get(name)), error=pruned.errors.get(name)
        )
        for name, weight in weights.items()
    )
    sparse = {line.name for line in lines if line.layout == "csr"}
    dense = {weight_name(name): weight for name, weight in weights.items() if name not in sparse}
    forms = {weight_name(name): Sparse.from_dense(weights[name]) for name in weights if name in sparse}
    plan = Plan(values={**pruned.values, **dense}, forms=forms)
    # Values need no check by running.
    smaller = apply(original, plan, probe=take(batch, 0, 16) if forms and batch is not None else None)
    if layout == "mask":
        mask_weights(smaller, {name: weight != 0 for name, weight in weights.items()})
    held = [] if batch is None else [batch]
    report = account(against or original, smaller, held, divergence=divergence, seed=seed)
    report = replace(report, layers=lines, samples=pruned.samples, notes=pruned.notes)
    return Compressed(smaller, plan, scored(report, original, smaller, evaluate))


def _laid_out(name: str, layer: Any, weight: Any, layout: str, x: Tensor | None) -> LayerReport:
    """How a pruned layer is to run, and why."""
    line = LayerReport(name, np.count_nonzero(weight) / max(1, weight.size), "dense", "as asked")
    if layout in ("dense", "mask"):
        return replace(line, layout=layout)
    if not name:
        return replace(line, why="it is the whole network: put it into an nn.Sequential to run it sparse")
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return replace(line, why=f"a {type(layer).__name__} has no sparse form")
    if layer.weight.device.type != "cpu" or layer.weight.dtype not in (torch.float32, torch.float64):
        return replace(line, why="sparse layers run on the CPU in float32 or float64")
    form = Sparse.from_dense(weight)
    if layout == "csr":
        return replace(line, layout="csr")
    if form.density == 1:
        return replace(line, why="nothing was pruned")
    if x is None:
        return replace(line, why="not timed: no batch reached it")
    dense = copy.deepcopy(layer)
    sparse = in_form(layer, form)
    larger = nbytes(sparse) / nbytes(dense)
    if larger >= 1:
        return replace(line, why=f"sparse would take {larger:.2f} times the bytes")
    return _timed(line, dense, sparse, x)


def _timed(line: LayerReport, dense: nn.Module, sparse: nn.Module, x: Tensor) -> LayerReport:
    slow, fast = (latency(one, x, repeats=_REPEATS).median for one in (dense, sparse))
    line = replace(line, dense_seconds=slow, new_seconds=fast)
    if fast < _FASTER * slow:
        return replace(line, layout="csr", why=f"{slow / fast:.1f} times as fast on {samples_in(x)} samples")
    return replace(line, why=f"sparse would take {fast / slow:.2f} times as long")
