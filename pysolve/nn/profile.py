"""Comparison of two networks: latencies, timed alternately, and the costs of each layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.nn.calibration import samples_in, take
from pysolve.nn.evaluate import COUNTED, layer_macs, parameters, seconds_of, summary, wait
from pysolve.nn.nonzeros import nonzeros
from pysolve.nn.running import Batch, arguments, device_of, evaluating, forward, hooked
from pysolve.report.rows import Latency, LayerMass

# Calls of each network: at least, at most, and otherwise for this many seconds.
FEWEST, MOST, SECONDS = 7, 100, 0.1
# Share of all parameters from which a layer without MACs, such as an embedding, has a row of its own.
LARGE = 0.01


def latencies(models: Sequence[nn.Module], batch: Batch) -> tuple[Latency, ...]:
    """Latencies of networks on a batch, called alternately, so that disturbances affect all of them."""
    with evaluating(*models):
        calls = [_call(model, batch) for model in models]
        times = _by_turns(calls, [device_of(model) for model in models])
    return tuple(summary(one, samples_in(batch)) for one in times)


def masses(before: nn.Module, after: nn.Module, batch: Batch) -> tuple[LayerMass, ...]:
    """Parameters, MACs and seconds of the layers with weights, in both networks.

    Parts of a replaced layer, whose names begin with its own, count as that layer. Seconds are taken on the
    batch, MACs on its first samples.
    """
    seconds = _layer_seconds((before, after), batch)
    example = take(batch, 0, 2)
    n = samples_in(example)
    old, new = (layer_macs(model, example) for model in (before, after))
    sizes, left = _sizes(before, old), _nonzeros(after, new)
    found = []
    for name, size in sizes.items():
        own = [one for one in new if one == name or one.startswith(f"{name}.")]
        alive = sum(left.pop(one, 0) for one in {name, *own})
        counts = (old.get(name, 0) // n, sum(new[one] for one in own) // n)
        times = (_least(seconds[0], [name] if name in old else []), _least(seconds[1], own))
        found.append(LayerMass(name, size, alive, *counts, *times))
    others = LayerMass("all others", parameters(before) - sum(sizes.values()), sum(left.values()), 0, 0)
    return (*found, others) if others.params or others.left else tuple(found)


def layer_inputs(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """Input of each layer's first call on a batch; layers called by keywords are left out."""
    seen: dict[str, Tensor] = {}

    def remember(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args and name not in seen:
            seen[name] = args[0].clone()

    hooks = (layer.register_forward_pre_hook(partial(remember, name)) for name, layer in layers.items())
    with evaluating(model), hooked(hooks):
        forward(model, batch)
    return seen


def _sizes(model: nn.Module, counted: Collection[str]) -> dict[str, int]:
    """Parameters of the layers with rows of their own: those with MACs, and other large ones."""
    much = LARGE * parameters(model)
    sizes = {}
    for name, module in model.named_modules():
        if name in counted:
            sizes[name] = parameters(module)
        elif not any(name.startswith(f"{one}.") for one in sizes):
            direct = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if direct > much:
                sizes[name] = direct
    return sizes


def _nonzeros(model: nn.Module, counted: Collection[str]) -> dict[str, int]:
    """Parameters that are not zero, shared ones once, by the layer that holds them."""
    found: dict[str, int] = {}
    for tensor in nonzeros(model).tensors:
        home = tensor.name.rpartition(".")[0]
        owner = next((one for one in counted if home == one or home.startswith(f"{one}.")), home)
        found[owner] = found.get(owner, 0) + tensor.nonzeros
    return found


def _call(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """The network's call on a batch on its device, made once to warm up."""
    device = device_of(model)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), arguments(batch))
    call = partial(model, *args, **kwargs)
    call()
    return call


def _by_turns(calls: Sequence[Callable[[], object]], devices: Sequence[torch.device]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in calls]
    while len(times[0]) < FEWEST or (len(times[0]) < MOST and min(map(sum, times)) < SECONDS):
        for call, device, own in zip(calls, devices, times, strict=True):
            own.append(seconds_of(call, device))
    return times


def _layer_seconds(models: Sequence[nn.Module], batch: Batch) -> list[dict[str, list[float]]]:
    """Seconds of each layer of each network, in each of several runs."""
    seconds: list[dict[str, list[float]]] = [{} for _ in models]
    with evaluating(*models):
        calls = [_call(model, batch) for model in models]
        for _ in range(FEWEST):
            for model, call, own in zip(models, calls, seconds, strict=True):
                layers = {name: one for name, one in model.named_modules() if isinstance(one, COUNTED)}
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
