"""Pruning single weights: which stay, and whether a layer runs faster for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.account import account, scored
from pysolve.checks import check_model
from pysolve.compressed import Compressed, after
from pysolve.entries import LayerReport
from pysolve.forms import Sparse
from pysolve.masks import masks
from pysolve.nn.calibration import samples_in, take
from pysolve.nn.evaluate import latency, nbytes
from pysolve.nn.layers import in_form
from pysolve.nn.network import as_array, evaluating, find_matching, forward
from pysolve.nn.slicing import WEIGHTED
from pysolve.nn.surgery import apply
from pysolve.plan import Plan

LAYOUTS = ("auto", "dense", "sparse")
# Calls that a layer is timed over, in each layout, and the share of the dense time that counts as faster.
_REPEATS, _FASTER = 15, 0.9


def prune(
    model: nn.Module | Compressed,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "magnitude",
    amount: float | Mapping[str, float],
    scope: str = "local",
    layout: str = "auto",
    ignore: Sequence[str] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
) -> Compressed:
    """Set single weights to zero, and run a layer as a sparse one where that is faster and smaller.

    Parameters
    ----------
    model : nn.Module or Compressed
        Not changed. Weights of its Linear layers and convolutions are pruned; biases are not.
    batches : iterable of batches, optional
        As ``compress`` takes them; layers are timed on the first one, and the report's divergence is on it.
    method : "magnitude" or "random"
        What a weight is judged by.
    amount : float or {layer: float}
        Share of the weights that goes; with a mapping, layers without an entry keep all.
    scope : "local" or "global"
        The share of each layer, or of all together.
    layout : "auto", "dense" or "sparse"
        "dense": zeros are stored and multiplied. "sparse": each Linear and Conv2d becomes a ``SparseLinear``
        or ``SparseConv2d``. "auto": only where that takes fewer bytes and, on the first batch, at most nine
        tenths of the dense layer's time; without batches none does.
    ignore : sequence of str
        Layers to leave alone: names, or patterns as ``re:…``.
    evaluate : callable, optional
        From a network to a score, for the report.
    seed : int
        Of random scores.

    Returns
    -------
    Compressed
        Its report says for each layer how it runs, and why.
    """
    original = model.model if isinstance(model, Compressed) else model
    check_model(original)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    layers = dict(_layers(original, ignore))
    weights = {name: as_array(layer.weight) for name, layer in layers.items()}
    kept = masks(weights, amount, method=method, scope=scope, seed=seed)
    pruned = {name: np.where(kept[name], weight, 0).astype(weight.dtype) for name, weight in weights.items()}
    first = next(iter(batches), None) if batches is not None else None
    inputs = {} if first is None else _inputs(original, layers, first)
    lines = tuple(
        _laid_out(name, layer, pruned[name], layout, inputs.get(name)) for name, layer in layers.items()
    )
    sparse = {line.name for line in lines if line.layout == "sparse"}
    plan = Plan(
        values={
            f"{name}.weight".lstrip("."): weight for name, weight in pruned.items() if name not in sparse
        },
        forms={name: Sparse.from_dense(weight) for name, weight in pruned.items() if name in sparse},
    )
    smaller = apply(original, plan, probe=None if first is None else take(first, 0, 16))
    held = [] if first is None else [first]
    report = scored(account(original, smaller, held, seed=seed), original, smaller, evaluate)
    return after(model, Compressed(smaller, plan, replace(report, layers=lines)))


def _layers(model: nn.Module, ignore: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Layers whose weights can be pruned, by name."""
    ignored = find_matching(model, ignore)
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and name not in ignored:
            yield name, module


def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:
    """What each layer reads first when the network runs on a batch."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(_remember, seen, name)).remove)
        forward(model, batch)
    return seen


def _remember(seen: dict[str, Tensor], name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    # A layer that is called by keywords alone is not timed.
    if args:
        seen.setdefault(name, args[0].clone())


def _laid_out(name: str, layer: Any, weight: Any, layout: str, x: Tensor | None) -> LayerReport:
    """How a pruned layer is to run, and why."""
    line = LayerReport(name, np.count_nonzero(weight) / max(1, weight.size), "dense", "as asked")
    if layout == "dense":
        return line
    if not name:
        return replace(line, why="it is the whole network: put it into an nn.Sequential to run it sparse")
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return replace(line, why=f"a {type(layer).__name__} has no sparse form")
    if layer.weight.device.type != "cpu" or layer.weight.dtype not in (torch.float32, torch.float64):
        return replace(line, why="sparse layers run on the CPU in float32 or float64")
    form = Sparse.from_dense(weight)
    if layout == "sparse":
        return replace(line, layout="sparse")
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
    line = replace(line, dense_seconds=slow, sparse_seconds=fast)
    if fast < _FASTER * slow:
        return replace(
            line, layout="sparse", why=f"{slow / fast:.1f} times as fast on {samples_in(x)} samples"
        )
    return replace(line, why=f"sparse would take {fast / slow:.2f} times as long")
