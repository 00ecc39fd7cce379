"""A layer as y = M x + b: its matrix, and its inputs and outputs as rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear
from torch.nn.functional import pad

from pysolve.nn.gathering.sums import ROOM
from pysolve.nn.layer_kinds import LINEAR, TRANSPOSED, WEIGHTED, Turned, inputs_first

LAYERS = WEIGHTED
Convolution = Conv1d | Conv2d | Conv3d | ConvTranspose1d | ConvTranspose2d | ConvTranspose3d
Layer = Linear | Turned | Convolution


def channels(layer: Layer) -> tuple[int, int]:
    """Numbers of input and output channels."""
    if isinstance(layer, LINEAR):
        return (
            (layer.weight.shape[0], layer.nf)
            if isinstance(layer, Turned)
            else (layer.in_features, layer.out_features)
        )
    return layer.in_channels, layer.out_channels


def taps(layer: Layer) -> int:
    """Columns of the layer's matrix for one input channel: 1, or the size of the kernel."""
    return layer.weight.shape[2:].numel()


def groups(layer: Layer) -> int:
    """Number of groups of a convolution, 1 of a Linear."""
    return 1 if isinstance(layer, LINEAR) else layer.groups


def matrix(layer: Layer) -> Tensor:
    """The layer's weight as the matrix M of  y = M x + b.

    It is (h, d), with h output channels and d = input channels × taps. Input channel j owns the columns
    j·taps … (j + 1)·taps − 1, one for each place of the kernel in the weight's own order. A grouped
    convolution's matrix is block diagonal.
    """
    parts = [_turned(layer, part).flatten(1) for part in layer.weight.detach().chunk(groups(layer))]
    return parts[0] if len(parts) == 1 else torch.block_diag(*parts)  # type: ignore[no-untyped-call]


def weight_like(layer: Layer, M: Tensor) -> Tensor:
    """An (h, d) matrix in the shape of the layer's weight: the inverse of ``matrix``.

    Of a grouped convolution's matrix, what lies outside the diagonal blocks is ignored.
    """
    (inputs, h), count = channels(layer), groups(layer)
    if M.shape != (h, d := inputs * taps(layer)):
        raise ValueError(f"the matrix of {layer} is {h} x {d}, got one of shape {tuple(M.shape)}.")
    blocks = [strip.chunk(count, 1)[g] for g, strip in enumerate(M.chunk(count))]
    kernel = layer.weight.shape[2:]
    parts = [_turned(layer, block.reshape(len(block), inputs // count, *kernel)) for block in blocks]
    return parts[0] if count == 1 else torch.cat(parts)


def positions(layer: Layer, y: Tensor) -> int:
    """Rows of ``samples`` and ``outputs`` for an output ``y``: samples × output positions."""
    return y.numel() // max(1, y.shape[1 - layer.weight.ndim])


def choice(n: int, share: float, random: torch.Generator) -> Tensor | None:
    """A random share of n rows, ascending: in order they are read several times as fast; None for all."""
    if share >= 1:
        return None
    return torch.randperm(n, generator=random)[: max(1, round(share * n))].sort().values


def samples(layer: Layer, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Inputs of the layer, one (d,) row for each row of its outputs:  samples Mᵀ + b = outputs.

    Parameters
    ----------
    layer : one of LAYERS
    x : (…, inputs) tensor for a Linear, (n, inputs, …) or (inputs, …) tensor for a convolution
        May have fewer channels than the layer reads; the columns are then those of these channels.
    chosen : (m,) tensor of integers, optional
        Rows to form, counted over samples × output positions. By default all.
    """
    return _aligned(layer, _rows(_reads(layer, x), _lead(layer), chosen))


def outputs(layer: Layer, y: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Outputs of the layer, (m, h), in the order of ``samples``; parameters as there."""
    return _rows(_writes(layer, y), _lead(layer), chosen)


def blocks(
    layer: Layer, x: Tensor, y: Tensor, chosen: Tensor | None = None, *, limit: int = ROOM
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``samples`` and ``outputs`` in blocks, in order; of no rows there is one empty block.

    The samples of a block are at most ``limit`` numbers, but one row at least.
    """
    read, written, lead = _reads(layer, x), _writes(layer, y), _lead(layer)
    if read.shape[:lead] != written.shape[:lead]:
        raise ValueError(
            f"{layer} turns an input of shape {tuple(x.shape)} into {tuple(read.shape[:lead])} samples and "
            f"positions, but the output of shape {tuple(y.shape)} has {tuple(written.shape[:lead])}."
        )
    if chosen is None:
        for piece in _cut(read, written, limit):
            some_read, some_written = (_rows(part, piece[1].ndim - 1) for part in piece)
            yield _aligned(layer, some_read), some_written
        return
    for some in chosen.split(max(1, limit // max(1, read.shape[lead:].numel()))):  # type: ignore[no-untyped-call]
        yield _aligned(layer, _rows(read, lead, some)), _rows(written, lead, some)


def _turned(layer: Layer, weight: Tensor) -> Tensor:
    """Swap inputs and outputs of a weight that stores inputs first."""
    return weight.transpose(0, 1) if inputs_first(layer) else weight


def _lead(layer: Layer) -> int:
    """Dimensions of ``_reads`` and ``_writes`` that count rows."""
    return layer.weight.ndim - 1


def _writes(layer: Layer, y: Tensor) -> Tensor:
    """The output as an (n, *positions, h) view."""
    return (
        y.reshape(y.shape[:-1].numel(), y.shape[-1])
        if isinstance(layer, LINEAR)
        else _batched(layer, y).movedim(1, -1)
    )


def _reads(layer: Layer, x: Tensor) -> Tensor:
    """The input as an (n, *positions, inputs, *kernel) view."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]) if isinstance(layer, LINEAR) else _windows(layer, x)


def _rows(view: Tensor, lead: int, chosen: Tensor | None = None) -> Tensor:
    """Rows of a view whose first ``lead`` dimensions count them, stored by columns where that is quicker."""
    if lead == 1:
        return view.flatten(1) if chosen is None else view[chosen.to(view.device)].flatten(1)
    rest = view.shape[lead:]
    if chosen is None:
        return (
            view.permute(*range(lead, view.ndim), *range(lead))
            .reshape(rest.numel(), view.shape[:lead].numel())
            .T
        )
    # One index in place of one a dimension, and rows that vary fastest: 4 times as fast as view[index].
    index = torch.unravel_index(chosen.to(view.device), view.shape[:lead])
    start = torch.stack([i * stride for i, stride in zip(index, view.stride(), strict=False)]).sum(0)
    span = 1 + sum((n - 1) * stride for n, stride in zip(view.shape[:lead], view.stride(), strict=False))
    starts = view.as_strided((*rest, max(0, span)), (*view.stride()[lead:], 1))
    return starts[..., start].reshape(rest.numel(), len(start)).T


def _aligned(layer: Layer, rows: Tensor) -> Tensor:
    """Flip the columns of a transposed convolution: it meets its kernel from the far end."""
    if not isinstance(layer, TRANSPOSED):
        return rows
    d, m = rows.T.shape
    return rows.T.reshape(d // taps(layer), taps(layer), m).flip(1).reshape(d, m).T


def _cut(read: Tensor, written: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both views in blocks of at most ``limit`` input numbers, cut along the dimensions that count rows."""
    step = limit // max(1, read[:1].numel())
    if step == 0 and written.ndim > 2:
        for one_read, one_written in zip(read, written, strict=True):
            yield from _cut(one_read, one_written, limit)
        return
    for start in range(0, max(1, len(read)), max(1, step)):
        some = slice(start, start + max(1, step))
        yield read[some], written[some]


def _windows(layer: Convolution, x: Tensor) -> Tensor:
    """Inputs under the kernel at each output position: a view of the padded input.

    A transposed convolution is an ordinary one, of stride 1 and with a flipped kernel, of its input with
    zeros inserted between positions.
    """
    x = _batched(layer, x)
    if isinstance(layer, TRANSPOSED):
        x, strides = _dilated(layer, x), (1,) * len(layer.stride)
    else:
        x, strides = _padded(layer, x), layer.stride
    for i, (size, step, stride) in enumerate(zip(layer.kernel_size, layer.dilation, strides, strict=True)):
        x = x.unfold(2 + i, step * (size - 1) + 1, stride)[..., ::step]
    return x.movedim(1, 1 + len(strides))


def _batched(layer: Convolution, values: Tensor) -> Tensor:
    """An input or output of the layer, with a leading dimension of samples."""
    wanted = layer.weight.ndim
    if values.ndim not in (wanted - 1, wanted):
        raise ValueError(
            f"{layer} reads and writes tensors of {wanted} dimensions, or {wanted - 1} for one sample, "
            f"got shape {tuple(values.shape)}."
        )
    return values if values.ndim == wanted else values[None]


def margins(layer: Conv1d | Conv2d | Conv3d) -> tuple[int, ...]:
    """Padding as ``torch.nn.functional.pad`` takes it, and as torch applies it now."""
    if layer.padding_mode != "zeros":
        return tuple(layer._reversed_padding_repeated_twice)
    borders: list[int] = []
    for i, (size, step) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if isinstance(layer.padding, str):
            both = step * (size - 1) if layer.padding == "same" else 0
            before, after = both // 2, both - both // 2
        else:
            before = after = int(layer.padding[i])
        borders = [before, after, *borders]  # torch counts them from the last dimension on
    return tuple(borders)


def _padded(layer: Conv1d | Conv2d | Conv3d, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    borders = margins(layer)
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
