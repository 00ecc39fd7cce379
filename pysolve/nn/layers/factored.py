"""A layer as two smaller ones, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pysolve.errors import PysolveError
from pysolve.forms import Form, LowRank
from pysolve.nn.running import as_array, as_tensor

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Factored(nn.Module):
    """y = outer(inner(x)): takes the place of a Linear or a convolution whose weight has low rank.

    Both are ordinary layers, ``inner`` without a bias, so that the network can be trained, exported, pruned
    and factored like any other.

    Parameters
    ----------
    inner, outer : nn.Linear or convolution
    """

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        self.outer: Any = outer

    @classmethod
    def from_form(cls, layer: Dense, form: LowRank) -> Factored:
        """A layer with a dense one's bias, strides and padding, and a weight of low rank.

        Raises
        ------
        PysolveError
            When the layer is no Linear and no ungrouped convolution, or its weight has another shape.
        """
        check_factors(layer, form)
        (h, c), r, bias = form.shape[:2], form.rank, layer.bias is not None
        # A dimension of the kernel belongs to the factor that extends along it.
        outside = [size > 1 for size in form.outer.shape[2:]]
        made = cls(
            _part(layer, c, r, [not out for out in outside], bias=False),
            _part(layer, r, h, outside, bias=bias),
        )
        _fill(made.inner, as_tensor(form.inner), None, layer)
        _fill(made.outer, as_tensor(form.outer), layer.bias, layer)
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.inner(x))
        return y

    @property
    def rank(self) -> int:
        """Channels between the two."""
        return len(self.inner.weight)

    @property
    def weight(self) -> Tensor:
        """The weight, multiplied out, for code that asks a layer for it."""
        return torch.einsum("hk...,kc...->hc...", self.outer.weight, self.inner.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the outer layer."""
        bias: nn.Parameter | None = self.outer.bias
        return bias

    def form(self) -> LowRank:
        """The two weights."""
        return LowRank(as_array(self.outer.weight), as_array(self.inner.weight))

    def to_dense(self) -> nn.Module:
        """One layer with the product as its weight."""
        inner, outer = self.inner, self.outer
        bias = outer.bias is not None
        if isinstance(inner, nn.Linear):
            dense: Any = _made(inner, inner.in_features, outer.out_features, bias=bias)
        else:
            own = [a > b for a, b in zip(outer.kernel_size, inner.kernel_size, strict=True)]
            dense = _made(
                inner,
                inner.in_channels,
                outer.out_channels,
                tuple(map(max, inner.kernel_size, outer.kernel_size)),
                **{name: _both(own, inner, outer, name) for name in ("stride", "padding", "dilation")},
                bias=bias,
                padding_mode=inner.padding_mode,
            )
        _fill(dense, self.weight, outer.bias, inner)
        return dense.train(self.training)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def check_factors(layer: nn.Module, form: LowRank) -> None:
    """Refuse a layer that cannot be factored, and factors of another shape, with a PysolveError."""
    kind = type(layer)
    if kind not in (nn.Linear, *CONVOLUTIONS) or getattr(layer, "groups", 1) > 1:
        raise PysolveError(
            f"only Linear layers and convolutions without groups can be factored, got {kind.__name__}."
        )
    check_shape(layer, form)
    most = min(form.outer[:, 0].size, form.inner[0].size)
    if form.rank > most:
        raise PysolveError(f"a weight of shape {form.shape} has a rank of at most {most}, got {form.rank}.")


def check_shape(layer: nn.Module, form: Form) -> None:
    """Refuse a form of another shape than the layer's weight with a PysolveError."""
    assert isinstance(layer.weight, Tensor)
    if form.shape != tuple(layer.weight.shape):
        raise PysolveError(f"expected a form of shape {tuple(layer.weight.shape)}, got {form.shape}.")


def _made(like: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer of the same kind, data type and device with any values; no random number is drawn for them."""
    home = {"device": like.weight.device, "dtype": like.weight.dtype}
    return skip_init(type(like), *args, **home, **kwargs)  # type: ignore[no-untyped-call]


def _fill(made: Any, weight: Tensor, bias: Tensor | None, like: Any) -> None:
    """Give a layer its values; it is trained as another one is, and its bias as this bias is."""
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
            made.bias.requires_grad_(bias.requires_grad)
    made.weight.requires_grad_(like.weight.requires_grad)


def _part(layer: Any, channels: int, out: int, own: list[bool], *, bias: bool) -> Any:
    """A Linear, or a convolution along some of a layer's dimensions."""
    if isinstance(layer, nn.Linear):
        return _made(layer, channels, out, bias=bias)

    def along(values: Any, other: int) -> Any:
        if isinstance(values, str):
            return values
        return tuple(value if mine else other for value, mine in zip(values, own, strict=True))

    return _made(
        layer,
        channels,
        out,
        along(layer.kernel_size, 1),
        stride=along(layer.stride, 1),
        padding=along(layer.padding, 0),
        dilation=along(layer.dilation, 1),
        bias=bias,
        padding_mode=layer.padding_mode,
    )


def _both(own: list[bool], inner: Any, outer: Any, name: str) -> Any:
    """What both have together along their dimensions: an attribute of the whole convolution."""
    first, second = getattr(inner, name), getattr(outer, name)
    if isinstance(first, str):
        return first
    return tuple(b if mine else a for a, b, mine in zip(first, second, own, strict=True))


def empty(layer: Dense, rank: int, *, spatial: bool = False) -> LowRank:
    """Factors of zeros for a layer: with its kernel first, or along height and width."""
    h, c, *kernel = layer.weight.shape
    inside, outside = [*kernel], [1] * len(kernel)
    if spatial and kernel:
        inside[-1], outside[-1] = 1, kernel[-1]
    rank = min(rank, 1 + min(h * outside[-1] if kernel else h, layer.weight[0].numel()))
    return LowRank(np.zeros((h, rank, *outside), np.float32), np.zeros((rank, c, *inside), np.float32))
