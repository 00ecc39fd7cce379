"""A network quantised to a file of so many bytes: all layers pay one price for a bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from pysolve.errors import PysolveError
from pysolve.nn.evaluate import nbytes
from pysolve.quantization.network import Quantized, quantized, shortened
from pysolve.quantization.worth import Worth, price_for

# The share of the file's bytes that may be left, and runs to come so close.
_CLOSE, _RUNS, _ROUGH = 0.03, 6, 2
# Bytes of a file's record and tables, about.
_RECORD = 1000


def within(
    model: nn.Module,
    worth: Worth,
    target: float,
    measure: Callable[[Quantized], int],
    *,
    begun: Quantized | None = None,
    rough: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Quantized:
    """Quantise layers until the network's file has at most ``target`` bytes, and few less.

    Errors of layers count by what they do to the network's outputs; a bit costs the same in each. What has
    one dimension (biases, norms) is rounded to bfloat16.

    Parameters
    ----------
    model : nn.Module
    worth : Worth
        What errors of its layers do.
    target : float
    measure : callable
        Bytes of the file.
    begun : Quantized, optional
        What came near such a target before.
    rough : bool
        Come near the target from either side, in little time.
    seed, progress
        As ``quantize`` has them.

    Raises
    ------
    PysolveError
        When no price makes the file so small: says how small it can be.
    """
    found: dict[int, Quantized] = {}

    def at(lam: float) -> Quantized:
        fit: Any = partial(worth.fit, lam)
        done = quantized(worth.layers, worth.material, fit, seed=seed, progress=progress)
        return replace(shortened(model, done), lam=lam)

    def size(lam: float) -> float:
        done = begun if begun is not None and begun.lam == lam else at(lam)
        bytes = measure(done)
        found[bytes] = done
        return bytes

    guess = None if begun is None else begun.lam
    if guess is None:
        guess = price_for(max(target - beside(model, worth.layers), 0.2 * target), worth.coded) or 1.0
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
