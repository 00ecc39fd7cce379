"""What a bit is worth in each layer of a network, so that all layers share out the bytes of one file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from pysolve.correlations import Array, Correlations
from pysolve.forms import Codebook, QuantForm
from pysolve.layer.quantize_layer import QuantizedLayer, quantize_layer
from pysolve.methods.layerwise import Material
from pysolve.nn.calibration import first_samples, samples_in
from pysolve.nn.divergence import Divergence, kl_divergence, mean_divergence, run
from pysolve.nn.graph.branches import layer_values
from pysolve.nn.layer_matrix import matrix
from pysolve.nn.running import as_array, as_tensor
from pysolve.nn.sensitivity import sensitivities

# Error of a weight, as a share of its part of the outputs' energy, that a bit costs when harm is measured;
# the least harm that counts, as a share of the layers' median; what an output's error counts at least.
_TRIED, _LEAST, _OUTPUT = 3e-3, 1e-2, 1e-3
# Samples that the network runs on for this, those of all layers together, and of each at least.
_SAMPLES, _LEAST_SAMPLES = 16384, 256
# Logarithms of the least factors of a price that a search tries, at first and later, and of the greatest; the
# least power of a price by which sizes fall; the factor from the start after which equal sizes are the most.
_NEAREST, _FARTHEST, _FLAT, _TELLING = (0.06, 0.18), 3.4, 0.02, 16.0
# Calls of a search at least after the first one that gave few enough bytes.
_SINCE = 2
# Bytes of a file for each value that a layer shares, and how often it occurs.
_VALUE = 5
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
        return sum(self._bytes(name, lam) for name in self.layers)

    def _bytes(self, name: str, lam: float) -> float:
        if self.material is None or name not in self.material.correlations:
            W = _weights(self.layers[name])
            return coded_bytes(self.fit(lam, name, W, None).form)
        W, outputs = _matrix(self.material, name), self.outputs[name]
        rows = np.arange(0, len(W), max(1, len(W) // _ROWS))
        R = self.material.correlations[name].centered().r_xx
        some = replace(self, outputs={name: outputs[rows]})
        found = some.fit(lam, name, W[rows], R)
        return coded_bytes(found.form, len(W) / len(rows))


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
    seen: list[tuple[float, float]] = []
    best: tuple[float, float] | None = None
    start, since = lam, 0
    for tries in range(2 * steps):
        since += best is not None
        if tries >= steps and since > _SINCE:
            break
        found = size(lam)
        seen.append((lam, found))
        if found <= wanted:
            # Where no bytes are added any more, codebooks have all their values.
            flat = best is not None and found < (1 + close) * best[1]
            full = since == tries and flat and _TELLING * lam < start
            best = (lam, found)
            if full or found >= (1 - close) * wanted:
                break
        lam = _next((1 - close / 2) * wanted, seen)
    return None if best is None else best[0]


def coded_bits(codes: npt.NDArray[Any]) -> float:
    """What entropy coding takes for whole numbers."""
    _, counts = np.unique(codes, return_counts=True)
    return float(counts @ (np.log2(max(1, codes.size)) - np.log2(counts)))


def coded_bytes(form: QuantForm, times: float = 1.0) -> float:
    """Of a file for a weight so many times as long, about."""
    values = len(form.centroids) if isinstance(form, Codebook) else form.scales.size
    return coded_bits(form.codes) * times / 8 + _VALUE * values


def _next(wanted: float, seen: Sequence[tuple[float, float]]) -> float:
    """A price between those that are known, or beyond them, the farther the more were tried."""
    large, small = ([point for point in seen if (point[1] > wanted) == more] for more in (True, False))
    if large and small:
        # Sizes fall about as a power of the price; the middle where they do not.
        low, high = large[-1], small[-1]
        span = math.log(low[1] / max(high[1], 1e-3))
        bent = span <= 0 or (seen[-1][1] > wanted) == (seen[-2][1] > wanted)
        share = 0.5 if bent else min(0.9, max(0.1, math.log(low[1] / wanted) / span))
        return float(low[0] * (high[0] / low[0]) ** share)
    (lam, size), tries = seen[-1], len(seen)
    power = 0.5
    if tries > 1:
        before = seen[-2]
        power = math.log(max(before[1], 1.0) / max(size, 1.0)) / math.log(lam / before[0])
    # Much of a file may be of one size at any price.
    step = abs(math.log(max(size, 1.0) / wanted)) / max(power, _FLAT)
    step = max(step, _NEAREST[min(tries - 1, 1)]) * (1 << min(max(tries - 2, 0), 4))
    return float(lam * math.exp(min(step, _FARTHEST) * (1 if large else -1)))


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
