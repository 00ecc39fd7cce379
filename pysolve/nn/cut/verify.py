"""Comparing two networks' outputs on one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pysolve.errors import PysolveError
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.factored_recurrent import FactoredRecurrent
from pysolve.nn.layers.quantized import unrounded
from pysolve.nn.outputs import tensors_of
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Batch, evaluating, forward, hooked, same_draws
from pysolve.nn.state import copy_of

# How far the outputs of two equal networks may differ, in units of the largest output. Dropping zero
# columns only reorders sums: LeNet-5 differs by about 1e-7 in float32. Half precisions round each layer.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2
# Networks that amplify rounding (norms of values that hardly vary) may differ by so many times what other
# rounding of their weights does, but by no more than so many times the tolerance.
_AMPLIFIED, _MOST = 10, 20


def mismatch(
    wide: nn.Module,
    smaller: nn.Module,
    probe: Batch,
    *,
    seeds: tuple[int, int] = (0, 0),
    taken: bool = False,
) -> str | None:
    """The difference of two networks on one batch, in words; None when there is none.

    Of networks that draw random numbers, both draw the same, or what follows from two ``seeds``. Where it is
    known that the wide network takes the probe, ``taken``, it does not run if the smaller one fails.

    Quantised layers do not round their inputs here: a difference by rounding is no mistake, and would hide
    those that are.
    """
    with evaluating(wide, smaller), unrounded(wide), unrounded(smaller), _watched(smaller) as coarse:
        wanted = [] if taken else _outputs(wide, probe, seeds[0])
        try:
            with same_draws(wide, seeds[1]):
                got = tensors_of(forward(smaller, probe))
        except Exception as error:
            return f"the smaller network fails ({str(error).splitlines()[0] if str(error) else error!r})"
        wanted = wanted or _outputs(wide, probe, seeds[0])
        if [t.shape for t in got] != [t.shape for t in wanted]:
            return f"the outputs' shapes differ ({[*map(list, (t.shape for t in got))]})"
        other, rounded = list[Tensor](), any(coarse)
        for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
            worst, allowed = _compared(a, b, rounded=rounded)
            if allowed < worst <= _MOST * allowed:
                other = other or _outputs(_rounded_otherwise(wide), probe, seeds[0])
                allowed = max(allowed, _AMPLIFIED * _sizes(a.cpu(), other[i].cpu())[1])
            if not worst <= allowed:
                return f"the outputs differ by {worst:.1e}, where {allowed:.1e} is allowed"
    return None


def _outputs(wide: nn.Module, probe: Batch, seed: int) -> list[Tensor]:
    with same_draws(wide, seed):
        found = tensors_of(output_of(wide, probe))
    if not found:
        raise PysolveError("the network's output holds no tensor, so there is nothing to compare.")
    return found


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[bool]]:
    """Whether factored layers ran in less than single precision: their products are then rounded once more.

    So they do under autocast, and on GPUs, where convolutions and recurrent layers run in TF32 by default.
    """
    coarse: list[bool] = []

    def note(layer: Factored | FactoredRecurrent, args: object, output: object) -> None:
        linear = isinstance(layer, Factored) and isinstance(layer.inner, nn.Linear)
        tf32 = not linear or torch.get_float32_matmul_precision() != "highest"
        coarse.extend(
            one.dtype not in _TOLERANCE or (one.device.type == "cuda" and tf32) for one in tensors_of(output)
        )

    factored = [one for one in model.modules() if isinstance(one, Factored | FactoredRecurrent)]
    with hooked(layer.register_forward_hook(note) for layer in factored):
        yield coarse


def _rounded_otherwise(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by up to half a unit in the last place."""
    network, generator = copy_of(model), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            noise = torch.rand(parameter.shape, generator=generator).to(parameter) - 0.5
            parameter.data.mul_(1 + torch.finfo(parameter.dtype).eps * noise)
    return network


def _compared(wanted: Tensor, got: Tensor, *, rounded: bool) -> tuple[float, float]:
    """The largest difference of one output, and the largest that is allowed."""
    tolerance = 0.0
    if wanted.is_floating_point():
        tolerance = _HALF_TOLERANCE if rounded else _TOLERANCE.get(wanted.dtype, _HALF_TOLERANCE)
    scale, worst = _sizes(wanted.cpu(), got.cpu())
    return worst, tolerance * scale


def _sizes(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """The largest number, and the largest difference."""
    if not wanted.numel():
        return 0.0, 0.0
    if wanted.dtype == got.dtype and wanted.dtype in _TOLERANCE:
        # Logits of all words for all tokens take seconds in double precision, and gigabytes.
        scale, worst = wanted.abs().max().item(), (wanted - got).abs_().max().item()
        if math.isfinite(scale) and math.isfinite(worst):
            return scale, worst
    wanted, got = wanted.double(), got.double()
    # Equal infinities and NaN in the same place are no difference.
    same = (wanted == got) | (wanted.isnan() & got.isnan())
    scale = wanted[wanted.isfinite()].abs().max().item() if bool(wanted.isfinite().any()) else 0.0
    worst = (wanted - got)[~same].abs().max().item() if not bool(same.all()) else 0.0
    return scale, worst
