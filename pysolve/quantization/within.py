"""A network quantised to a file of so many bytes: all layers pay one price for a bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from pysolve.errors import PysolveError
from pysolve.layerwise import Material
from pysolve.nn.divergence import Divergence
from pysolve.nn.evaluate import nbytes
from pysolve.quantization.network import Quantized, quantized, shortened
from pysolve.quantization.worth import price_for, worth_of

# The share of the file's bytes that may be left, and runs to come so close.
_CLOSE, _RUNS, _ROUGH = 0.03, 6, 2
# Bytes of a file's record and tables, about.
_RECORD = 1000


def within(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    material: Material | None,
    target: float,
    measure: Callable[[Quantized], int],
    *,
    bits: int = 8,
    rough: bool = False,
    divergence: Divergence,
    seed: int = 0,
    progress: bool = True,
) -> Quantized:
    """Quantise layers until the network's file has at most ``target`` bytes, and few less.

    Errors of layers count by what they do to the network's outputs; a bit costs the same in each. What has
    one dimension (biases, norms) is rounded to bfloat16.

    Parameters
    ----------
    model : nn.Module
    layers : {name: layer}
        To quantise.
    material : Material, optional
    target : float
    measure : callable
        Bytes of the file.
    bits : int
        At most 2^bits values a layer.
    rough : bool
        Come near the target from either side, in little time.
    divergence, seed, progress
        As ``quantize`` has them.

    Raises
    ------
    PysolveError
        When no price makes the file so small: says how small it can be.
    """
    worth = worth_of(model, layers, material, bits=bits, divergence=divergence)
    found: dict[int, Quantized] = {}

    def size(lam: float) -> float:
        fit: Any = partial(worth.fit, lam)
        done = shortened(model, quantized(layers, material, fit, seed=seed, progress=progress))
        bytes = measure(done)
        found[bytes] = done
        return bytes

    guess = price_for(max(target - beside(model, layers), 0.2 * target), worth.coded) or 1.0
    price_for(target, size, guess, steps=_ROUGH if rough else _RUNS, close=_CLOSE)
    if rough:
        return found[min(found, key=lambda bytes: abs(bytes - target))]
    small = [bytes for bytes in found if bytes <= target]
    if not small:
        raise PysolveError(
            f"the file still has {min(found):,} bytes where {target:,.0f} are wanted: what is no weight, and "
            "layers that are left alone, count too. Give a larger target, or a smaller network."
        )
    return found[max(small)]


def beside(model: nn.Module, layers: Mapping[str, Any]) -> float:
    """Bytes of a network's file that are no weights of these layers, about."""
    # Halves of what is rounded to bfloat16.
    weights = sum(int(layer.weight.nbytes) for layer in layers.values())
    return (nbytes(model) - weights) / 2 + _RECORD
