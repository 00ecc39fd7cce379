"""What a bit is worth in each layer of a network, so that all layers share out the bytes of one file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from pysolve.correlations import Array, Correlations
from pysolve.layerwise import Material
from pysolve.nn.calibration import first_samples, samples_in
from pysolve.nn.divergence import Divergence, kl_divergence, mean_divergence, run
from pysolve.nn.graph.branches import layer_values
from pysolve.nn.network import as_array, as_tensor
from pysolve.nn.rows import matrix
from pysolve.nn.sensitivity import sensitivities
from pysolve.quantization.single import QuantizedLayer, quantize_layer

# Error of a weight, as a share of its part of the outputs' energy, that a bit costs when harm is measured;
# the least harm that counts, as a share of the layers' median; what an output's error counts at least.
_TRIED, _LEAST, _OUTPUT = 3e-3, 1e-2, 1e-3
# Samples that the network runs on for this, those of all layers together, and of each at least.
_SAMPLES, _LEAST_SAMPLES = 16384, 256
# Factors of a price that a search tries; the least one from its start after which equal sizes are the most.
_NEAREST, _FARTHEST, _TELLING = 1.2, 30.0, 16.0
# Calls of a search at least after the first one that gave few enough bytes.
_SINCE = 2
# Outputs of a layer that tell what all of its weights take.
_ROWS = 64


@dataclass(frozen=True, eq=False)
class Worth:
    """What the errors of layers do to a network.

    Parameters
    ----------
    layers : {name: layer}
        To be quantised.
    material : Material, optional
    harm : {layer: float}
        Divergence of the network's outputs for a unit of the layer's objective.
    outputs : {layer: (h,) array}
        What the error of each output counts, 1 in the mean; of layers whose correlations are known.
    bits : int
        Codebooks have at most 2^bits values.
    """

    layers: Mapping[str, nn.Module]
    material: Material | None
    harm: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, Array] = field(default_factory=dict)
    bits: int = 8

    def fit(self, lam: float, name: str, W: Array, known: Correlations | Array | None) -> QuantizedLayer:
        """A layer's weights where a bit costs ``lam`` of divergence; what is pruned stays so."""
        keep, outputs = W != 0, None if known is None else self.outputs.get(name)
        return quantize_layer(
            W,
            known,
            bits=self.bits,
            mask=None if keep.all() else keep,
            lam=lam / self.harm.get(name, 1.0),
            outputs=outputs,
        )

    def coded(self, lam: float) -> float:
        """Bytes of all weights, coded, about: from the original's correlations and some of the outputs."""
        return sum(self._bits(name, lam) for name in self.layers) / 8

    def _bits(self, name: str, lam: float) -> float:
        if self.material is None or name not in self.material.correlations:
            W = _weights(self.layers[name])
            return coded_bits(self.fit(lam, name, W, None).codes)
        W, outputs = _matrix(self.material, name), self.outputs[name]
        rows = np.arange(0, len(W), max(1, len(W) // _ROWS))
        R = self.material.correlations[name].centered().r_xx
        some = replace(self, outputs={name: outputs[rows]})
        found = some.fit(lam, name, W[rows], R)
        return coded_bits(found.codes) * len(W) / len(rows)


def worth_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    material: Material | None,
    *,
    bits: int = 8,
    divergence: Divergence = kl_divergence,
) -> Worth:
    """Measure the divergence of the network's outputs with one layer quantised.

    Without data, errors of all layers count as shares of their weights' squares.

    Parameters
    ----------
    model : nn.Module
    layers : {name: layer}
    material : Material, optional
    bits : int
    divergence : callable
    """
    if material is None:
        energy = {name: float(np.square(_weights(layer)).sum()) for name, layer in layers.items()}
        return Worth(layers, None, {name: 1.0 / (whole or 1.0) for name, whole in energy.items()}, bits=bits)
    known = {name: material.layers[name].module for name in material.correlations}
    # One batch tells which outputs matter.
    metrics = sensitivities(model, known, material.calibration.kept[:1])
    outputs = {name: np.maximum(np.diag(metric), _OUTPUT) for name, metric in metrics.items()}
    start = Worth(layers, material, outputs=outputs, bits=bits)
    other, state = copy.deepcopy(model), model.state_dict()
    # Few samples tell too little: with 250, harms of one layer were off by factors of three to seven.
    seen = first_samples(material.calibration.kept, max(_LEAST_SAMPLES, _SAMPLES // len(layers)))
    originals, counts = list(run(model, seen)), [*map(samples_in, seen)]
    harm = {}
    for name in layers:
        values, loss = _tried(start, name, state)
        other.load_state_dict({**state, **values})
        lost = mean_divergence(originals, run(other, seen), counts, divergence)
        harm[name] = lost / loss if loss > 0 else 0.0
    least = _LEAST * float(np.median([value for value in harm.values() if value > 0] or [1.0]))
    return Worth(layers, material, {name: max(one, least) for name, one in harm.items()}, outputs, bits)


def price_for(
    wanted: float,
    size: Callable[[float], float],
    lam: float = 1e-6,
    *,
    steps: int = 12,
    close: float = 0.02,
) -> float | None:
    """The price of a bit at which weights take ``wanted`` bytes or a little less; None where none does.

    Parameters
    ----------
    wanted : float
    size : callable
        Bytes at a price, which fall with it.
    lam : float
        Where to begin.
    steps : int
        Calls of ``size``; up to as many again where few enough bytes were found late or never.
    close : float
        Share of the bytes that may be left.
    """
    low = high = None
    start, since = lam, 0
    for tries in range(2 * steps):
        since += high is not None
        if tries >= steps and since > _SINCE:
            break
        found = size(lam)
        if found > wanted:
            low = (lam, found)
        else:
            # Where no bytes are added any more, codebooks have all their values.
            flat = high is not None and found < (1 + close) * high[1]
            full = low is None and flat and _TELLING * lam < start
            high = (lam, found)
            if full or found >= (1 - close) * wanted:
                break
        lam = _next(wanted, low, high, tries)
    return None if high is None else high[0]


def coded_bits(codes: npt.NDArray[Any]) -> float:
    """What entropy coding takes for whole numbers."""
    _, counts = np.unique(codes, return_counts=True)
    return float(counts @ (np.log2(max(1, codes.size)) - np.log2(counts)))


def _next(
    wanted: float, low: tuple[float, float] | None, high: tuple[float, float] | None, tries: int
) -> float:
    """A price between those that are known, or beyond them, the farther the more were tried."""
    if low is None or high is None:
        known = low or high
        assert known is not None
        # Sizes fall about with the root of the price, but much of a file may be of one size at any.
        ratio = max(known[1], 1.0) / wanted
        factor = min(_FARTHEST, max(_NEAREST, ratio ** (2 if high is None else -2)))
        factor = min(_FARTHEST, float(factor ** (1 << min(tries, 4))))
        return known[0] * (factor if high is None else 1 / factor)
    # Sizes fall about as a power of the price; the middle where they do not.
    span = math.log(low[1] / max(high[1], 1e-3))
    share = min(0.9, max(0.1, math.log(low[1] / wanted) / span)) if span > 0 else 0.5
    return float(low[0] * (high[0] / low[0]) ** share)


def _tried(start: Worth, name: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """New values of a network with one layer quantised roughly, and what that layer's objective lost."""
    material = start.material
    if material is None or name not in material.correlations:
        W = _weights(start.layers[name])
        found = start.fit(_TRIED * float(np.square(W).mean()), name, W, None)
        weight: Any = start.layers[name].weight
        values = {_key(name): as_tensor(found.weight.reshape(weight.shape)).to(weight.dtype)}
        return values, 0.5 * float(np.square(W - found.weight).sum())
    layer, known, W = material.layers[name], material.correlations[name], _matrix(material, name)
    own = known.centered()
    found = start.fit(_TRIED * float(np.trace(own.r_yy)) / W.size, name, W, known)
    change = found.weight - W
    loss = 0.5 * float(start.outputs[name] @ np.einsum("ij,ij->i", change @ own.r_xx, change))
    return layer_values(state, layer, None, found.weight, found.bias if layer.takes_bias else None), loss


def _matrix(material: Material, name: str) -> Array:
    return np.asarray(matrix(material.layers[name].module).double().cpu().numpy())


def _weights(layer: Any) -> Array:
    return np.asarray(as_array(layer.weight.flatten(1)), np.float64)


def _key(name: str) -> str:
    return f"{name}.weight".lstrip(".")
