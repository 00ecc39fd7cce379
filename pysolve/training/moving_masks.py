"""Masks that change while a network is trained: gradual pruning and dynamic network surgery."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray
from pysolve.errors import DataError
from pysolve.layer.masks import count_left, keep_largest, lamp_shares
from pysolve.nn.layers.base import weight_of
from pysolve.nn.layers.masking import below, masks_of
from pysolve.nn.running import as_array, find_layer
from pysolve.training.options import State, Step

# Of all layers together, or each layer's own.
PerLayer = float | Mapping[str, float]
# How often thresholds are updated where a share of the weights is pruned.
_STEPS = 100


@dataclass(frozen=True)
class Masking:
    """A step that changes masks, called with the share of the training done; checkpoints hold its state.

    ``about`` are options that a checkpoint must share to be resumed; ``get`` and ``put`` its state:
    steps done, and for surgery thresholds and the random state as JSON.
    """

    step: Step
    about: str
    get: Callable[[], State]
    put: Callable[[State], None]

    def __call__(self, share: float) -> None:
        with torch.no_grad():
            self.step(share)

    def state_dict(self) -> State:
        return {**self.get(), "about": self.about}

    def load_state_dict(self, state: State) -> None:
        if (was := state["about"]) != self.about:
            raise DataError(f"the checkpoint is of other pruning: it was {was}, now it is {self.about}.")
        self.put(state)


def gradually(model: nn.Module, amount: PerLayer, *, steps: int, end: float) -> Masking:
    """Prune a network's masked weights by magnitude while it is trained, along a cubic schedule.

    The pruned share is  s(t) = amount · (1 − (1 − t / end)³)  in equal steps, up to the share ``end`` of the
    training; of each layer's weights, or by ``lamp_shares`` of all together. See ``prune_gradually``.
    """
    masks, done = masks_of(model), 0
    layers = {name: find_layer(model, name) for name in masks}

    def prune(share: float) -> None:
        nonlocal done
        step = min(steps, int(steps * share / end))
        if step > done:
            done = step
            weights = {name: as_array(weight_of(layer)) for name, layer in layers.items()}
            for name, pruned in _shares(weights, amount, step / steps).items():
                _keep_largest(masks[name].mask, weights[name], pruned)

    def put(state: State) -> None:
        nonlocal done
        done = state["done"]

    return Masking(prune, f"gradual with {amount=}, {steps=}", lambda: {"done": done}, put)


def surgery(
    model: nn.Module,
    *,
    amount: PerLayer | None = None,
    rate: PerLayer | None = None,
    end: float,
    probability: PerLayer,
    seed: int,
) -> Masking:
    """Prune a network's masked weights while it is trained, and restore those that grow again.

    With a threshold t of a layer, weights below 0.9 t are pruned, those above 1.1 t restored, and those
    between keep their state. Each layer's mask, which must be a splicing one, is updated with a probability
    that falls linearly, to a tenth at ``end``. With ``amount`` t is the quantile of the layer's |w| at the
    share that ``gradually`` has, and at the end exactly that many are zero; with ``rate``, as published,
    t = max(0, mean + rate · std) of the |w| that it starts with. See ``network_surgery``.
    """
    masks, random, done = masks_of(model), np.random.default_rng(seed), -1
    weights = {name: below(find_layer(model, name)) for name in masks}
    limits = {} if rate is None else {name: _threshold(w, _of(rate, name)) for name, w in weights.items()}

    def operate(share: float) -> None:
        nonlocal done, limits
        step = min(_STEPS, int(_STEPS * share / end))
        if done == _STEPS:
            return
        if step > done and amount is not None:
            values = {name: as_array(weight) for name, weight in weights.items()}
            pruned = _shares(values, amount, step / _STEPS)
            limits = {name: _quantile(values[name], share) for name, share in pruned.items()}
            if step == _STEPS:
                for name, value in values.items():
                    _keep_largest(masks[name].mask, value, pruned[name])
        done = max(done, step)
        for name in masks if step < _STEPS else ():
            if random.random() < _of(probability, name) * (1 - 0.9 * share / end):
                mask, size = masks[name].mask, weights[name].abs()
                mask &= size >= 0.9 * limits[name]
                mask |= size > 1.1 * limits[name]

    def get() -> State:
        return {"done": done, "limits": limits, "random": json.dumps(random.bit_generator.state)}

    def put(state: State) -> None:
        nonlocal done, limits
        done, limits = state["done"], state["limits"]
        random.bit_generator.state = json.loads(state["random"])

    return Masking(operate, f"surgery with {amount=}, {rate=}, {probability=}", get, put)


def _of(each: PerLayer, name: str) -> float:
    return each[name] if isinstance(each, Mapping) else each


def _shares(weights: Mapping[str, AnyArray], amount: PerLayer, t: float) -> dict[str, float]:
    """Share of each layer's weights to prune at a share t of the time: fast at first."""
    level = float(1 - (1 - t) ** 3)
    if isinstance(amount, Mapping):
        return {name: level * amount[name] for name in weights}
    return lamp_shares(weights, level * amount)


def _keep_largest(mask: Tensor, weight: AnyArray, pruned: float) -> None:
    mask.copy_(torch.from_numpy(keep_largest(np.abs(weight), count_left(pruned, weight.size))))


def _quantile(weight: AnyArray, pruned: float) -> float:
    """Magnitude below which that share of the weights lies."""
    k = weight.size - count_left(pruned, weight.size)
    return float(np.partition(np.abs(weight), k - 1, axis=None)[k - 1]) if k else 0.0


def _threshold(weight: Tensor, c: float) -> float:
    """max(0, mean + c · std) of the magnitudes."""
    size = weight.detach().abs().double()
    return max(0.0, float(size.mean() + c * size.std(correction=0)))
