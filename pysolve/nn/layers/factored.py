"""A layer as two smaller ones, one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Indices
from pysolve.errors import PysolveError
from pysolve.forms import LowRank
from pysolve.nn.layer_kinds import LINEAR, Turned, is_extended, plain
from pysolve.nn.layers.base import ASKED, Dense, check_shape, dense_layer, like, seen
from pysolve.nn.running import as_array, as_tensor

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Attributes for each dimension, and what they are along a kernel of size 1.
_ALONG = {"stride": 1, "padding": 0, "dilation": 1}
# A dense layer, or whatever runs in its place.
Part = Any


class Factored(nn.Module):
    """y = outer(inner(x)): takes the place of a Linear or a convolution whose weight has low rank.

    Both are ordinary layers, ``inner`` without a bias, so that the network can be trained, exported, pruned
    and factored like any other.

    Parameters
    ----------
    inner, outer : nn.Linear or convolution
    """

    inner: Part
    outer: Part

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    @classmethod
    def from_form(cls, layer: Dense, form: LowRank) -> Factored:
        """A layer with a dense one's bias, strides and padding, and a weight of low rank.

        PysolveError when the layer is no Linear and no ungrouped convolution, or of another shape.
        """
        check_factors(layer, form)
        first, second = factors(layer, form)
        # A dimension of the kernel belongs to the factor that extends along it.
        outside = [size > 1 for size in second.shape[2:]]
        # The code of a layer that extends torch's own may pad, and the like.
        keeps_code = is_extended(layer) and not isinstance(layer, Turned)
        inner: Part = (
            like(layer, as_tensor(first), None)
            if keeps_code
            else _part(layer, first, None, [not out for out in outside])
        )
        return cls(inner, _part(layer, second, layer.bias, outside)).train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        """Of the attributes of the layer in whose place this is, those that code may ask for."""
        return _answer(self.inner, self.outer, name) if name in ASKED else super().__getattr__(name)

    @property
    def rank(self) -> int:
        """Channels between the two."""
        return len(self.inner.weight)

    @property
    def weight(self) -> Tensor:
        """The weight, multiplied out, for code that asks a layer for it."""
        return seen(torch.einsum("hk...,kc...->hc...", self.outer.weight, self.inner.weight))

    @property
    def bias(self) -> nn.Parameter | None:
        """The outer layer's."""
        return self.outer.bias  # type: ignore[no-any-return]

    def form(self) -> LowRank:
        """The two weights."""
        return LowRank(as_array(self.outer.weight), as_array(self.inner.weight))

    def to_dense(self) -> Dense:
        """One layer with the product as its weight."""
        inner, outer = self.inner, self.outer
        # Under autocast the product has another type.
        weight = self.weight.to(inner.weight)
        if is_extended(inner):
            whole: Dense = like(inner, weight, outer.bias)
            return whole.train(self.training)
        names = () if isinstance(inner, nn.Linear) else (*_ALONG, "kernel_size", "padding_mode")
        how = {name: getattr(self, name) for name in names}
        trained, sizes = inner.weight.requires_grad, (inner.weight.shape[1], len(outer.weight))
        dense: Dense = dense_layer(type(inner), weight, outer.bias, sizes, how, trained=trained)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def check_factors(layer: nn.Module, form: LowRank) -> None:
    """Refuse a layer that cannot be factored, and factors of another shape, with a PysolveError."""
    if form.exact is not None:
        raise PysolveError("only of embeddings some rows are stored apart.")
    if plain(layer) not in (*LINEAR, *CONVOLUTIONS) or getattr(layer, "groups", 1) > 1:
        kind = type(layer).__name__
        raise PysolveError(f"only Linear layers and convolutions without groups can be factored, got {kind}.")
    if is_extended(layer) and any(size > 1 for size in form.outer.shape[2:]):
        raise PysolveError(
            f"the code of a {type(layer).__name__} may rely on its kernel: factor by channels."
        )
    check_shape(layer, form)
    most = min(form.outer[:, 0].size, form.inner[0].size)
    if form.rank > most:
        raise PysolveError(f"a weight of shape {form.shape} has a rank of at most {most}, got {form.rank}.")


def factors(layer: nn.Module, form: LowRank) -> tuple[AnyArray, AnyArray]:
    """Weights of the inner and of the outer layer, outputs first."""
    if isinstance(layer, Turned):
        return form.outer.swapaxes(0, 1), form.inner.swapaxes(0, 1)
    return form.inner, form.outer


def empty(
    layer: Dense | nn.Embedding, rank: int, *, spatial: bool = False, rows: Indices | None = None
) -> LowRank:
    """Factors of zeros for a layer: with its kernel first, or along height and width; some rows apart."""
    if rows is not None and len(rows):
        (V, D), n = layer.weight.shape, len(rows)
        parts = np.zeros((V - n, rank), np.float32), np.zeros((rank, D), np.float32)
        return LowRank(*parts, rows, np.zeros((n, D), np.float32))
    h, c, *kernel = layer.weight.shape
    inside, outside = [*kernel], [1] * len(kernel)
    if spatial and kernel:
        inside[-1], outside[-1] = 1, kernel[-1]
    rank = min(rank, 1 + min(h * outside[-1] if kernel else h, layer.weight[0].numel()))
    return LowRank(np.zeros((h, rank, *outside), np.float32), np.zeros((rank, c, *inside), np.float32))


def empty_matrix(weight: Tensor, rank: int) -> LowRank:
    """Factors of zeros for a matrix that is a parameter by itself."""
    return LowRank(np.zeros((len(weight), rank), np.float32), np.zeros((rank, weight.shape[1]), np.float32))


def _part(layer: Dense, weight: AnyArray, bias: Tensor | None, own: list[bool]) -> Dense:
    """A Linear, or a convolution along some of a layer's dimensions."""
    how: dict[str, object] = {}
    if not isinstance(layer, LINEAR):
        each = _ALONG.items()
        how = {name: _mixed(own, getattr(layer, name), [single] * len(own)) for name, single in each}
        how |= {"kernel_size": weight.shape[2:], "padding_mode": layer.padding_mode}
    (out, channels), trained = weight.shape[:2], layer.weight.requires_grad
    own_weight = as_tensor(weight).to(layer.weight)
    kind = nn.Linear if isinstance(layer, LINEAR) else cast(type[nn.Conv2d], plain(layer))
    made: Dense = dense_layer(kind, own_weight, bias, (channels, out), how, trained=trained)
    return made


def _mixed(own: list[bool], values: str | Iterable[int], others: Iterable[int]) -> str | tuple[int, ...]:
    """A convolution's attribute: some values in its own dimensions, others elsewhere; words as they are."""
    if isinstance(values, str):
        return values
    return tuple(a if mine else b for a, b, mine in zip(values, others, own, strict=True))


def _answer(inner: Part, outer: Part, name: str) -> object:
    """The attribute of the whole layer from those of its two parts."""
    if name.startswith("out_"):
        return getattr(outer, name)
    first = getattr(inner, name)
    if name == "kernel_size":
        return tuple(map(max, first, outer.kernel_size))
    if name not in _ALONG:
        return first
    own = [a > b for a, b in zip(outer.kernel_size, inner.kernel_size, strict=True)]
    return _mixed(own, getattr(outer, name), first)
