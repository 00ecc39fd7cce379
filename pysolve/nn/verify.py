"""Whether two networks compute the same, tried out on one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pysolve.errors import PysolveError
from pysolve.nn.network import evaluating, forward

# How far the outputs of two equal networks may differ, in units of the largest output. Dropping zero
# columns only reorders sums: LeNet-5 differs by about 1e-7 in float32. Half precisions round each layer.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


def mismatch(
    wide: nn.Module, smaller: nn.Module, probe: Any, *, tolerance: float | None = None
) -> str | None:
    """What tells two networks apart on one batch, in words; None when nothing does.

    Parameters
    ----------
    wide, smaller : nn.Module
    probe : one batch
    tolerance : float, optional
        How far outputs may differ, in units of the largest; by default what their data type allows.
    """
    with evaluating(wide, smaller):
        wanted = list(_tensors(forward(wide, probe)))
        if not wanted:
            raise PysolveError("the network's output holds no tensor, so there is nothing to compare.")
        try:
            got = list(_tensors(forward(smaller, probe)))
        except Exception as error:
            return f"the smaller network fails ({str(error).splitlines()[0] if str(error) else error!r})"
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return f"the outputs' shapes differ ({[*map(list, (t.shape for t in got))]})"
    return next(
        (found for a, b in zip(wanted, got, strict=True) if (found := _difference(a, b, tolerance))), None
    )


def _difference(wanted: Tensor, got: Tensor, tolerance: float | None) -> str | None:
    """How far one output is off, in words; None within tolerance."""
    if not wanted.is_floating_point():
        tolerance = 0.0
    elif tolerance is None:
        tolerance = _TOLERANCE.get(wanted.dtype, HALF_TOLERANCE)
    wanted, got = wanted.cpu().double(), got.cpu().double()
    # Equal infinities and NaN in the same place are no difference.
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    scale = wanted[wanted.isfinite()].abs().max().item() if bool(wanted.isfinite().any()) else 0.0
    worst = (wanted - got)[~same].abs().max().item() if not bool(same.all()) else 0.0
    if worst <= tolerance * scale:
        return None
    return f"the outputs differ by {worst:.1e}, where {tolerance * scale:.1e} is allowed"


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in a network's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
