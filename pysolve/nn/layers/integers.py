"""Inputs rounded to 8 bits, and products of 8-bit numbers."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Steps between the least and the greatest input of a row.
_STEPS = 255


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of inputs as integers: x ≈ steps · width + middle.

    The steps lie within −128 … 127, which stand for the least and the greatest of the row and of zero; they
    are off by half a width at most. A row with an entry that is not finite has a width that is not, either.

    Parameters
    ----------
    x : (…, d) tensor

    Returns
    -------
    steps : (…, d) tensor
        In the data type of ``x``.
    width, middle : (…, 1) tensors
    """
    # Both in one call, aminmax, takes 15 times as long on a CPU.
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    width = ((high - low) / _STEPS).clamp_min(torch.finfo(x.dtype).tiny)
    middle = low + 128 * width
    return (x - middle).div_(width).round_(), width, middle


def restored(x: Tensor) -> Tensor:
    """Rows of inputs, rounded."""
    steps, width, middle = rounded(x)
    return steps * width + middle


def multiplied(x: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b for rounded rows x, as products of integers; gradients go to scales and bias.

    y_h = scales_h · (width Σ_j steps_j codes_hj + middle · sums_h) + b_h

    Parameters
    ----------
    x : (n, d) float32 tensor
    codes : (h, d) int8 tensor
        W is codes · scales.
    scales, sums : (h,) float32 tensors
        ``sums`` are those of the codes.
    bias : (h,) float32 tensor, optional
    """
    steps, width, middle = rounded(x)
    # Not to(): it keeps odd strides, which the kernel does not take.
    whole = torch.empty(x.shape, dtype=torch.int8).copy_(steps)
    product = torch._int_mm(whole, codes.t()).float().mul_(width).addr_(middle.flatten(), sums)
    return product * scales if bias is None else torch.addcmul(bias, product, scales)


def can_multiply(x: Tensor, codes: Tensor) -> bool:
    """Whether ``multiplied`` takes these inputs and these codes, here."""
    # Dimensions of size 1 with strides that BLAS does not know leave the product without values.
    strides = codes.shape[1] > 1 and codes.stride() == (codes.shape[1], 1)
    on_cpu = x.device.type == codes.device.type == "cpu"
    return strides and on_cpu and x.dtype == torch.float32 and x.numel() > 0 and multiplies_exactly()


@functools.cache
def multiplies_exactly() -> bool:
    """Whether torch multiplies 8-bit numbers exactly on this processor, as those with VNNI do.

    Without it, kernels add pairs of products in 16 bits, which large codes overflow without notice.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    a = torch.tensor([[127], [-128]], dtype=torch.int8).expand(16, 2, 64).reshape(32, 64)
    return all(torch.equal(torch._int_mm(x, a.t()), x.int() @ a.int().t()) for x in (a, a[:1], a[1:2]))


def torchao_tensor(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight codes · scales as torchao's tensor; torchao rounds the inputs, row by row.

    It does so symmetrically about zero, in steps twice as wide as ours where no input is negative.

    Parameters
    ----------
    codes : (h, d) int8 tensor
    scales : (h, 1) tensor

    Raises
    ------
    ImportError
        When torchao is not installed, or too old to have such tensors.
    """
    try:
        with _quietly():
            from torchao.quantization import Int8Tensor, PerRow
            from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise ImportError(
            "this form of a layer comes with torchao 0.18 or later, which is not installed: pip install "
            "'pysolve[quant]', or run the layer as it is."
        ) from error
    inputs = QuantizeTensorToInt8Kwargs(PerRow())
    made: Tensor = Int8Tensor(codes, scales, [1, codes.shape[1]], scales.dtype, act_quant_kwargs=inputs)
    return made


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence torchao's log of kernels for other machines when it is imported."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
