"""Patches that a convolution reads at each output position, as a view of its padded input."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from torch.nn.functional import pad

from pysolve.nn.layer_kinds import TRANSPOSED

Convolution = Conv1d | Conv2d | Conv3d | ConvTranspose1d | ConvTranspose2d | ConvTranspose3d


def windows(layer: Convolution, x: Tensor) -> Tensor:
    """Inputs under the kernel at each output position.

    A transposed convolution is an ordinary one, of stride 1 and with a flipped kernel, of its input with
    zeros inserted between positions.

    Parameters
    ----------
    layer : a convolution
    x : (n, inputs, …) or (inputs, …) tensor

    Returns
    -------
    (n, *positions, inputs, *kernel) tensor
        A view of the padded input: no number is stored more than once.

    Raises
    ------
    ValueError
        When x has the wrong number of dimensions.
    """
    x = batched(layer, x)
    if isinstance(layer, TRANSPOSED):
        x, strides = _dilated(layer, x), (1,) * len(layer.stride)
    else:
        x, strides = _padded(layer, x), layer.stride
    for i, (size, step, stride) in enumerate(zip(layer.kernel_size, layer.dilation, strides, strict=True)):
        x = x.unfold(2 + i, step * (size - 1) + 1, stride)[..., ::step]
    return x.movedim(1, 1 + len(strides))


def batched(layer: Convolution, values: Tensor) -> Tensor:
    """An input or output of the layer, with a leading dimension of samples."""
    wanted = layer.weight.ndim
    if values.ndim not in (wanted - 1, wanted):
        raise ValueError(
            f"{layer} reads and writes tensors of {wanted} dimensions, or {wanted - 1} for one sample, "
            f"got shape {tuple(values.shape)}."
        )
    return values if values.ndim == wanted else values[None]


def _padded(layer: Conv1d | Conv2d | Conv3d, x: Tensor) -> Tensor:
    borders: list[int] = []
    for i, (size, step) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if isinstance(layer.padding, str):
            both = step * (size - 1) if layer.padding == "same" else 0
            before, after = both // 2, both - both // 2
        else:
            before = after = int(layer.padding[i])
        borders = [before, after, *borders]  # torch counts them from the last dimension on
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(x, borders, mode) if any(borders) else x


def _dilated(layer: ConvTranspose1d | ConvTranspose2d | ConvTranspose3d, x: Tensor) -> Tensor:
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], layer.stride, strict=True)]
    dilated = x.new_zeros(*x.shape[:2], *sizes)
    dilated[(slice(None), slice(None), *(slice(None, None, stride) for stride in layer.stride))] = x
    borders: list[int] = []
    for i, (size, step) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        before = step * (size - 1) - int(layer.padding[i])
        borders = [before, before + int(layer.output_padding[i]), *borders]
    return pad(dilated, borders)
