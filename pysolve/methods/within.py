"""A network quantised to a file of so many bytes: all layers pay one price for a bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pysolve.errors import PysolveError
from pysolve.methods.quantized import Quantized, quantized
from pysolve.methods.subject import Subject, is_many
from pysolve.methods.worth import price_for
from pysolve.nn.evaluate import nbytes

# The share of the file's bytes that may be left, and runs to come so close.
_CLOSE, _RUNS, _ROUGH = 0.03, 6, 2
# Bytes of a file's record and tables, about.
_RECORD = 1000


def within(
    subject: Subject,
    target: float,
    measure: Callable[[Quantized], int],
    *,
    spare: float = 0.0,
    rough: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Quantized:
    """Quantise layers until the network's file has at most ``target`` bytes, and few less.

    Errors of layers count by what they do to the network's outputs; a bit costs the same in each. What has
    one dimension (biases, norms) is rounded to bfloat16.

    Parameters
    ----------
    subject : Subject
    target : float
    measure : callable
        Bytes of the file.
    spare : float
        Bytes to leave.
    rough : bool
        Come near the target from either side, in little time.
    seed, progress
        As ``quantize`` has them.

    Raises
    ------
    PysolveError
        When no price makes the file so small: says how small it can be.
    """
    worth, begun, found = subject.worth, subject.begun, dict[int, Quantized]()
    assert worth is not None
    aim = max(target - spare, 1.0)

    def at(lam: float) -> Quantized:
        fit: Any = partial(worth.fit, lam)
        done = quantized(worth.layers, worth.material, fit, seed=seed, progress=progress)
        return replace(subject.shortened(done), lam=lam)

    def size(lam: float) -> float:
        done = begun if begun is not None and begun.lam == lam else at(lam)
        bytes = measure(done)
        found[bytes] = replace(done, bytes=bytes)
        return bytes

    guess = None if begun is None else begun.lam
    if guess is None:
        guess = price_for(max(aim - beside(subject), 0.2 * aim), worth.coded) or 1.0
    price_for(aim, size, guess, steps=_ROUGH if rough else _RUNS, close=_CLOSE)
    if rough:
        return found[min(found, key=lambda bytes: abs(bytes - aim))]
    small = [bytes for bytes in found if bytes <= aim]
    if not small:
        raise PysolveError(
            f"the file still has {min(found):,} bytes where {target:,.0f} are wanted: what is no weight, and "
            "layers that are left alone, count too. Give a larger target, or a smaller network."
        )
    return found[max(small)]


def beside(subject: Subject) -> float:
    """Bytes of a network's file that are no weights of its layers to quantise, about."""
    weights = sum(int(layer.weight.nbytes) for layer in subject.layers.values())
    coded = sum(value.nbytes for value in subject.short.values() if is_many(value))
    # Of float32 one byte each, and halves of what is rounded to bfloat16.
    return coded / 4 + (nbytes(subject.model) - weights - coded) / 2 + _RECORD
