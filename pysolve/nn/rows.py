"""A layer as y = M x + b: its matrix, what it reads and writes as samples in rows, and their sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pysolve.correlations import Correlations

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
Layer = (
    nn.Linear
    | nn.Conv1d
    | nn.Conv2d
    | nn.Conv3d
    | nn.ConvTranspose1d
    | nn.ConvTranspose2d
    | nn.ConvTranspose3d
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def channels(layer: Layer) -> tuple[int, int]:
    """How many channels the layer reads and how many it writes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def taps(layer: Layer) -> int:
    """Columns of the layer's matrix that belong to one input channel: 1, or the size of the kernel."""
    return layer.weight.shape[2:].numel()


def groups(layer: Layer) -> int:
    """Parts that the layer's channels fall into, each read and written on its own: 1 unless grouped."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def matrix(layer: Layer) -> Tensor:
    """The layer's weight as the (h, d) matrix M of  y = M x + b.

    Input channel j owns the columns j·taps … (j + 1)·taps − 1, one for each place of the kernel in the
    weight's own order. The matrix of a grouped convolution is block diagonal.

    Returns
    -------
    (h, d) tensor
        Detached; h output channels, d = input channels × taps.
    """
    parts = [_swapped(layer, part).flatten(1) for part in layer.weight.detach().chunk(groups(layer))]
    return parts[0] if len(parts) == 1 else torch.block_diag(*parts)  # type: ignore[no-untyped-call]


def weight_like(layer: Layer, M: Tensor) -> Tensor:
    """An (h, d) matrix in the shape of the layer's weight: the inverse of ``matrix``.

    Of the matrix for a grouped convolution only the blocks on the diagonal are used.
    """
    inputs, outputs = channels(layer)
    if M.shape != (outputs, inputs * taps(layer)):
        raise ValueError(f"M must be ({outputs}, {inputs * taps(layer)}) for {layer}, got {tuple(M.shape)}.")
    count, kernel = groups(layer), layer.weight.shape[2:]
    strips = (strip.chunk(count, 1)[g] for g, strip in enumerate(M.chunk(count)))
    parts = [_swapped(layer, part.reshape(len(part), inputs // count, *kernel)) for part in strips]
    return parts[0] if count == 1 else torch.cat(parts)


def positions(layer: Layer, y: Tensor) -> int:
    """How many rows ``samples`` and ``outputs`` have for an output ``y``: samples × output positions."""
    return y.numel() // channels(layer)[1]


def samples(layer: Layer, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What the layer reads for each output that it writes: ``samples @ matrix.T + bias == outputs``.

    Parameters
    ----------
    layer : one of LAYERS
    x : (…, inputs) tensor for a Linear, (n, inputs, …) or (inputs, …) tensor for a convolution
    chosen : (m,) tensor of integers, optional
        Rows to form, counted over samples × output positions; others take no memory. By default all.

    Returns
    -------
    (m, d) tensor
        In the dtype of x and on its device.
    """
    return _flat(layer, _picked(_windows(layer, x), _lead(layer), chosen))


def outputs(layer: Layer, y: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What the layer writes, (m, h), in the order of ``samples``; parameters as there."""
    return _picked(_writes(layer, y), _lead(layer), chosen)


def blocks(
    layer: Layer, x: Tensor, y: Tensor, chosen: Tensor | None = None, *, limit: int = 2**23
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of ``samples`` and ``outputs`` in pieces, in order.

    Parameters
    ----------
    layer, x, y, chosen
        As in ``samples`` and ``outputs``.
    limit : int
        Numbers that the samples of one piece hold at most, unless a single row holds more.
    """
    read, written, lead = _windows(layer, x), _writes(layer, y), _lead(layer)
    if read.shape[:lead] != written.shape[:lead]:
        raise ValueError(
            f"{layer} writes {tuple(read.shape[:lead])} samples × positions for an input of shape "
            f"{tuple(x.shape)}, but the output of shape {tuple(y.shape)} has {tuple(written.shape[:lead])}."
        )
    if chosen is None:
        pieces = _cut(read, written, limit)
    else:
        rows = max(1, limit // max(1, read.shape[lead:].numel()))
        parts = (chosen[start : start + rows] for start in range(0, len(chosen), rows))
        pieces = ((_picked(read, lead, part), _picked(written, lead, part)) for part in parts)
    for some_read, some_written in pieces:
        yield _flat(layer, some_read), some_written


def _swapped(layer: Layer, weight: Tensor) -> Tensor:
    """Outputs first, or back: a transposed convolution stores its inputs first."""
    return weight.transpose(0, 1) if isinstance(layer, _TRANSPOSED) else weight


def _lead(layer: Layer) -> int:
    """Dimensions of ``_windows`` and ``_writes`` that count rows."""
    return layer.weight.ndim - 1


def _writes(layer: Layer, y: Tensor) -> Tensor:
    """The output as an (n, *positions, h) view."""
    return y.reshape(-1, y.shape[-1]) if isinstance(layer, nn.Linear) else _batched(layer, y).movedim(1, -1)


def _windows(layer: Layer, x: Tensor) -> Tensor:
    """What each output reads, as an (n, *positions, inputs, *kernel) view of the padded input."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    transposed = isinstance(layer, _TRANSPOSED)
    x = _batched(layer, x)
    x = _stuffed(layer, x) if isinstance(layer, _TRANSPOSED) else _padded(layer, x)
    dims = len(layer.kernel_size)
    for i, (size, step) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        stride = 1 if transposed else layer.stride[i]
        x = x.unfold(2 + i, step * (size - 1) + 1, stride)[..., ::step]
    return x.movedim(1, 1 + dims)


def _batched(layer: Layer, values: Tensor) -> Tensor:
    wanted = layer.weight.ndim
    if values.ndim not in (wanted - 1, wanted):
        raise ValueError(f"{layer} reads and writes {wanted} dimensions, got {tuple(values.shape)}.")
    return values if values.ndim == wanted else values[None]


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    borders: list[int] = []
    for i, (size, step) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        if isinstance(layer.padding, str):
            both = step * (size - 1) if layer.padding == "same" else 0
            before, after = both // 2, both - both // 2
        else:
            before = after = int(layer.padding[i])
        borders = [before, after, *borders]  # torch.nn.functional.pad begins with the last dimension
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(x, borders, mode) if any(borders) else x


def _stuffed(layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """The input, with zeros in between and around, of which the transposed convolution is an ordinary one."""
    strides = layer.stride
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], strides, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    index = (slice(None), slice(None), *(slice(None, None, stride) for stride in strides))
    wide[index] = x
    borders: list[int] = []
    for i, (size, step) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        before = step * (size - 1) - int(layer.padding[i])
        borders = [before, before + layer.output_padding[i], *borders]
    return pad(wide, borders)


def _picked(view: Tensor, lead: int, chosen: Tensor | None) -> Tensor:
    """The chosen rows of a view whose first ``lead`` dimensions count rows."""
    if chosen is None:
        return view.flatten(0, lead - 1)
    return view[torch.unravel_index(chosen.to(view.device), view.shape[:lead])]


def _flat(layer: Layer, windows: Tensor) -> Tensor:
    """(m, inputs, *kernel) as (m, d); a transposed convolution meets its kernel from the far end."""
    flipped = windows.flip(*range(2, windows.ndim)) if isinstance(layer, _TRANSPOSED) else windows
    return flipped.flatten(1)


def _cut(read: Tensor, written: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both views in pieces of at most ``limit`` numbers read, their leading dimensions flattened."""
    lead = written.ndim - 1
    step = limit // max(1, read[:1].numel())
    if step == 0 and lead > 1:
        for one in zip(read, written, strict=True):
            yield from _cut(*one, limit)
        return
    for start in range(0, len(read), max(1, step)):
        some = slice(start, start + max(1, step))
        yield _picked(read[some], lead, None), _picked(written[some], lead, None)


@dataclass(frozen=True, eq=False)
class Sums:
    """Running sums over samples in rows, float64; grown in place.

    Parameters
    ----------
    xx, yx, yy, x_sum, y_sum, count : tensors
        As in Correlations, on one device.
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    x_sum: Tensor
    y_sum: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, d: int, h: int, device: torch.device) -> Sums:
        """Sums over no samples yet, of d inputs and h outputs."""
        # Apple's GPU has no float64.
        home = torch.device("cpu") if device.type == "mps" else device
        shapes: tuple[tuple[int, ...], ...] = ((d, d), (h, d), (h, h), (d,), (h,), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=home) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: ``x`` (n, d) and ``y`` (n, h), of any dtype and on any device."""
        x, y = (values.to(self.xx.device, torch.float64) for values in (x, y))
        self.xx.addmm_(x.T, x)
        self.yx.addmm_(y.T, x)
        self.yy.addmm_(y.T, y)
        self.x_sum.add_(x.sum(0))
        self.y_sum.add_(y.sum(0))
        self.count.add_(len(x))

    def correlations(self, group_size: int = 1) -> Correlations:
        """The sums as NumPy arrays."""
        # A matrix product rounds its two triangles differently; their mean is exactly symmetric.
        tensors = ((self.xx + self.xx.T) / 2, self.yx, (self.yy + self.yy.T) / 2, self.x_sum, self.y_sum)
        xx, yx, yy, x_sum, y_sum = (tensor.cpu().numpy() for tensor in tensors)
        return Correlations(xx, yx, yy, int(self.count), x_sum, y_sum, group_size)
