"""Parametrisations by which weights are one of few values: codes that stay, or the nearest value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Up to so many bounds, counting those below each weight is quicker than searching for it.
_FEW = 64


class Shared(nn.Module):
    """The parametrisation  c ↦ w,  w_i = c[codes_i].

    A value's gradient is the sum of those of its weights.

    Parameters
    ----------
    codes : uint8 tensor
        Of the weight's shape; never changed by training.
    k : int
        How many values there are.
    zero : bool
        Code 0 stands for zero, whatever c_0 is, which gets no gradient.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, k: int, *, zero: bool = False) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.k = k
        self.zero = zero

    def forward(self, centroids: Tensor) -> Tensor:
        """The weight in use."""
        return looked_up(*self.in_use(centroids))

    def in_use(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and what they stand for."""
        return self.codes, _with_zero(centroids, self.zero)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The values nearest to a weight that is put in place: its means over codes."""
        counts = torch.bincount(self.codes.flatten(), minlength=self.k).clamp(min=1)
        return (_sums(self.codes, weight.detach(), self.k) / counts).to(weight)


class Snapped(nn.Module):
    """The parametrisation  v ↦ w  by the nearest one of a few values: weights v and values are trained.

    A value's gradient is the sum of those of the weights that have it at the time. That of w reaches v as if
    the two were the same; so v goes on changing, and its code with it.

    Parameters
    ----------
    centroids : (k,) tensor
        The values, at most 256.
    zero : bool
        The first of them is zero, and stays so.
    threshold : float, optional
        For three values 0, n, p: trained ternary quantisation. In use is p where v > t max|v|, n where
        v < −t max|v|, and else 0; gradients reach v times p and −n where it is not 0.
    fixed : bool tensor, optional
        Of the weight's shape: what is of code 0 for good.

    References
    ----------
    C. Zhu, S. Han, H. Mao, W. J. Dally, Trained ternary quantization, 2017.
    """

    fixed: Tensor | None

    def __init__(
        self,
        centroids: Tensor,
        *,
        zero: bool = False,
        threshold: float | None = None,
        fixed: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centroids)
        self.zero = zero
        self.threshold = threshold
        self.register_buffer("fixed", fixed)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        codes, values = self.in_use(weight)
        slopes = None
        if self.threshold is not None:
            slopes = values.detach() * values.new_tensor([0.0, -1.0, 1.0])
            slopes[0] = 1.0
        return looked_up(codes, values, weight, slopes)

    @torch.no_grad()
    def codes_of(self, weight: Tensor) -> Tensor:
        """uint8 numbers of the values in use."""
        if self.threshold is None:
            codes = _nearest(weight, _with_zero(self.centroids, self.zero))
        else:
            bound = self.threshold * (weight.abs().max() if weight.numel() else weight.new_zeros(()))
            codes = (weight < -bound).byte() + 2 * (weight > bound).byte()
        return codes if self.fixed is None else codes.masked_fill_(self.fixed, 0)

    def in_use(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and what they stand for."""
        return self.codes_of(weight), _with_zero(self.centroids, self.zero)


def _with_zero(values: Tensor, zero: bool) -> Tensor:
    """The values, of which the first is zero whatever an optimiser made of it."""
    return pad(values[1:], (1, 0)) if zero else values


def _nearest(weight: Tensor, values: Tensor) -> Tensor:
    """Numbers of the nearest values."""
    ordered, order = values.sort(stable=True)
    bounds = (ordered[1:] + ordered[:-1]) / 2
    if len(bounds) >= _FEW:
        places = torch.bucketize(weight, bounds)
    else:
        places = torch.zeros_like(weight, dtype=torch.uint8)
        for bound in bounds:
            places += weight > bound
    return _taken(order.byte(), places)


class _LookUp(torch.autograd.Function):
    """Values by their codes; gradients to the values, and straight through to the weight below."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, values: Tensor, weight: Tensor | None, slopes: Tensor | None
    ) -> Tensor:
        ctx.codes, ctx.slopes, ctx.k = codes, slopes, len(values)
        return _taken(values, codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        below = sums = None
        if ctx.needs_input_grad[1]:
            sums = _sums(ctx.codes, gradient, ctx.k).to(gradient)
        if ctx.needs_input_grad[2]:
            below = gradient if ctx.slopes is None else gradient * _taken(ctx.slopes, ctx.codes)
        return None, sums, below, None


def looked_up(
    codes: Tensor, values: Tensor, weight: Tensor | None = None, slopes: Tensor | None = None
) -> Tensor:
    return _LookUp.apply(codes, values, weight, slopes)  # type: ignore[no-any-return, no-untyped-call]


def _taken(values: Tensor, codes: Tensor) -> Tensor:
    # Selecting by int32 takes a third of the time of values[codes].
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


def _sums(codes: Tensor, numbers: Tensor, k: int) -> Tensor:
    """Sums of the numbers of each code."""
    # In single precision, sums of half a million numbers are good for three digits; MPS has no double.
    wide = numbers.float() if numbers.device.type == "mps" else numbers.double()
    return torch.bincount(codes.flatten(), wide.flatten(), k)
