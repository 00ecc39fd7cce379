"""Comparison of two networks: latencies, timed alternately, and the costs of each layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.nn.batches.samples import samples_in
from pysolve.nn.cost.nonzeros import nonzeros, padding
from pysolve.nn.cost.per_sample import sample_macs
from pysolve.nn.evaluate import COUNTED, parameters, seconds_of, summary, wait
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Batch, arguments, device_of, evaluating, hooked
from pysolve.report.rows import REST, Latency, LayerMass

# Calls of each network: at least, at most, and otherwise for this many seconds.
FEWEST, MOST, SECONDS = 7, 100, 0.1
# Most samples that are timed together.
TOGETHER = 64
# Share of all parameters from which a layer without MACs, such as an embedding, has a row of its own.
LARGE = 0.01


def latencies(models: Sequence[nn.Module], batch: Batch) -> tuple[Latency, ...]:
    """Latencies of networks on a batch, called alternately, so that disturbances affect all of them."""
    return tuple(summary(one, samples_in(batch)) for one in times_of(models, batch, SECONDS))


def times_of(models: Sequence[nn.Module], batch: Batch, seconds: float) -> list[list[float]]:
    """Seconds of the calls of networks on a batch, by turns: for each this many together, or ``FEWEST``."""
    with evaluating(*models, as_used=True):
        calls = [_call(model, batch) for model in models]
        return _by_turns(calls, [device_of(model) for model in models], seconds)


def masses(
    before: nn.Module, after: nn.Module, batch: Batch | None, macs: Sequence[Mapping[str, int]] = ()
) -> tuple[LayerMass, ...]:
    """Parameters, MACs and seconds of the layers with weights and of all else that multiplies.

    Parts of a replaced layer, whose names begin with its own, count as that layer. The last row is what
    belongs to no other, so that rows add up to the network.

    Parameters
    ----------
    before, after : nn.Module
    batch : one batch, optional
        Seconds are taken on it; without it, none.
    macs : two of {module: int}, optional
        Of one sample, as ``sample_macs`` counts them; by default on the batch.
    """
    old, new = macs or [sample_macs(model, batch) for model in (before, after)]
    sizes = _sizes(before, old)
    owner = partial(_owner, dict(before.named_modules()), sizes)
    counts = [_grouped(one, owner) for one in (old, new)]
    # A bias of zeros, or an embedding's row of them, is nothing that was removed.
    tensors = {t.name: t.nonzeros if len(t.shape) > 1 else t.size for t in nonzeros(after).tensors}
    idle = padding(after)
    for name in idle.keys() & tensors.keys() & padding(before).keys():
        tensors[name] += idle[name]
    left = _grouped(tensors, lambda name: owner(name.rpartition(".")[0]))
    # A module with a row inside would be timed twice.
    apart = [name for name in old if name and not any(one.startswith(f"{name}.") for one in old)]
    seconds = [{}, {}] if batch is None else _layer_seconds((before, after), batch, apart)
    found = []
    for name, size in sizes.items():
        own = [name] if name in apart else [one for one in seconds[1] if owner(one) == name]
        times = (
            _least(times, [one for one in names if one in times])
            for times, names in zip(seconds, ([name], own), strict=True)
        )
        found.append(LayerMass(name, size, left.get(name, 0), *(one.get(name, 0) for one in counts), *times))
    rest = parameters(before) - sum(sizes.values()), left.get(None, 0), *(one.get(None, 0) for one in counts)
    return (*found, LayerMass(REST, *rest)) if any(rest) else tuple(found)


def layer_inputs(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """Input of each layer's first call on a batch, to run it alone; not of layers called by keywords."""
    seen: dict[str, Tensor] = {}

    def remember(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and name not in seen:
            seen[name] = _as_its_weights(layer, args[0])

    hooks = (layer.register_forward_pre_hook(partial(remember, name)) for name, layer in layers.items())
    with evaluating(model), hooked(hooks):
        output_of(model, batch)
    return seen


def _as_its_weights(layer: nn.Module, x: Tensor) -> Tensor:
    """A copy of what a layer reads in the precision of its parameters: under autocast x may have another."""
    own = (one.dtype for one in layer.parameters() if one.is_floating_point())
    return x.to(next(own, x.dtype), copy=True) if x.is_floating_point() else x.clone()


def _sizes(model: nn.Module, counted: Collection[str]) -> dict[str, int]:
    """Parameters of what has a row of its own: layers with weights, what multiplies, and other large ones.

    Shared ones count in the first.
    """
    much = LARGE * parameters(model)
    sizes: dict[str, int] = {}
    whole, seen = list[str](), set[nn.Parameter]()
    for name, module in model.named_modules():
        if any(name.startswith(f"{one}.") for one in whole):
            continue
        layer = isinstance(module, COUNTED)
        own = {*module.parameters(recurse=layer)}
        size = parameters(module) if layer else sum(one.numel() for one in own)
        size -= sum(one.numel() for one in own & seen)
        seen |= own
        if layer:
            whole.append(name)
        if layer or (name and (name in counted or size > much)):
            sizes[name] = size
    return sizes


def _owner(modules: Mapping[str, nn.Module], rows: Collection[str], name: str) -> str | None:
    """The row of the original's modules that one of this name belongs to, also where layers were replaced."""
    parts = name.split(".") if name else []
    above = [".".join(parts[:n]) for n in range(len(parts) + 1)]
    known = [one for one in above if one in modules]
    whole = [one for one in known if isinstance(modules[one], COUNTED)]
    nearest = whole[0] if whole else known[-1]
    return nearest if nearest in rows else None


def _grouped(counts: Mapping[str, int], owner: Callable[[str], str | None]) -> dict[str | None, int]:
    """Sums by row; None is for what belongs to none."""
    found: dict[str | None, int] = {}
    for name, count in counts.items():
        found[owner(name)] = found.get(owner(name), 0) + count
    return found


def _call(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """The network's call on a batch on its device, made once to warm up."""
    device = device_of(model)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), arguments(batch))
    call = partial(model, *args, **kwargs)
    call()
    return call


def _by_turns(
    calls: Sequence[Callable[[], object]], devices: Sequence[torch.device], seconds: float
) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in calls]
    while len(times[0]) < FEWEST or (len(times[0]) < MOST and min(map(sum, times)) < seconds):
        for call, device, own in zip(calls, devices, times, strict=True):
            own.append(seconds_of(call, device))
    return times


def _layer_seconds(
    models: Sequence[nn.Module], batch: Batch, more: Collection[str]
) -> list[dict[str, list[float]]]:
    """Seconds of each layer of each network, and of more modules, in each of several runs."""
    seconds: list[dict[str, list[float]]] = [{} for _ in models]
    with evaluating(*models):
        calls = [_call(model, batch) for model in models]
        for _ in range(FEWEST):
            for model, call, own in zip(models, calls, seconds, strict=True):
                layers = {n: one for n, one in model.named_modules() if isinstance(one, COUNTED) or n in more}
                watches = {name: _Watch(own.setdefault(name, []), device_of(model)) for name in layers}
                starts = (layers[name].register_forward_pre_hook(watches[name].start) for name in layers)
                stops = (layers[name].register_forward_hook(watches[name].stop) for name in layers)
                # Anew for each run: the networks may share layers.
                with hooked(starts), hooked(stops):
                    call()
    return seconds


class _Watch:
    """Hooks that add the seconds of a layer's calls to the last of its times."""

    def __init__(self, times: list[float], device: torch.device) -> None:
        self.times, self.device, self.started = times, device, 0.0
        times.append(0.0)

    def start(self, *_: object) -> None:
        wait(self.device)
        self.started = time.perf_counter()

    def stop(self, *_: object) -> None:
        wait(self.device)
        self.times[-1] += time.perf_counter() - self.started


def _least(seconds: Mapping[str, list[float]], names: Sequence[str]) -> float | None:
    """Seconds of several layers together in the fastest run: others were disturbed."""
    return float(np.min(np.sum([seconds[name] for name in names], axis=0))) if names else None
