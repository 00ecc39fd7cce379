"""Drop-in layers whose weight is a sparse matrix: for inference, and for fine-tuning what is left of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad, unfold

from pysolve.errors import PysolveError
from pysolve.forms import Integers, LowRank, RuntimeForm
from pysolve.nn.layers.factored import Factored, check_factors, check_shape
from pysolve.nn.layers.products import SparseWeight
from pysolve.nn.layers.quant_weight import check_form as check_integers
from pysolve.nn.layers.quantized import QuantConv2d, QuantLinear, quantized


class SparseLinear(SparseWeight):
    """y = A x + b with a sparse A: takes the place of an ``nn.Linear``.

    Runs on the CPU, in float32 or float64. Gradients go to the inputs, the entries and the bias, so that what
    is left of a pruned layer can be fine-tuned; places without an entry stay zero.

    torch.compile runs it as it is, between two graphs, and so not with ``fullgraph=True``. A program of
    torch.export or torch.onnx needs nothing of this package: it holds the entries, and makes the dense weight
    of them in each call. ``pysolve.nn.layers.dense.to_dense`` has it made once and for all.

    Parameters
    ----------
    matrix : (h, d) csr_array
    bias : (h,) tensor, optional
    """

    @classmethod
    def from_dense(cls, layer: nn.Linear) -> SparseLinear:
        """A layer with the non-zero weights of a dense one."""
        return cls(csr_array(layer.weight.detach().numpy()), layer.bias).train(layer.training)

    def to_dense(self) -> nn.Linear:
        """The same layer with a dense weight."""
        layer = nn.Linear(self.shape[1], self.shape[0], self.bias is not None)
        _fill(layer, self)
        return layer

    def computed(self, x: Tensor) -> Tensor:
        return self.multiplied(x.reshape(-1, self.shape[1]), "batch").reshape(*x.shape[:-1], self.shape[0])

    def traced(self, x: Tensor) -> Tensor:
        return linear(x, self.scattered(), self.bias)


class SparseConv2d(SparseWeight):
    """A 2-d convolution with a sparse weight: takes the place of an ``nn.Conv2d``.

    Of any stride, padding, dilation and groups; its matrix is the unfolded weight, one row an output channel.
    Make one with ``from_dense``. As ``SparseLinear`` otherwise.
    """

    def __init__(self, matrix: csr_array, bias: Tensor | None, dense: nn.Conv2d) -> None:
        super().__init__(matrix, bias, tuple(dense.weight.shape))
        self.groups, self.padding_mode = dense.groups, dense.padding_mode
        self.kernel_size: Any = dense.kernel_size
        self.stride: Any = dense.stride
        self.padding: Any = dense.padding
        self.dilation: Any = dense.dilation
        self.margins: list[int] = list(dense._reversed_padding_repeated_twice)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d) -> SparseConv2d:
        """A layer with the non-zero weights of a dense one."""
        weight = layer.weight.detach()
        rows, columns = len(weight) // layer.groups, weight.shape[1]
        whole = weight.new_zeros(len(weight), layer.in_channels, *layer.kernel_size)
        for g in range(layer.groups):
            own = slice(g * rows, (g + 1) * rows)
            whole[own, g * columns : (g + 1) * columns] = weight[own]
        return cls(csr_array(whole.flatten(1).numpy()), layer.bias, layer).train(layer.training)

    def to_dense(self) -> nn.Conv2d:
        """The same layer with a dense weight."""
        channels, bias = self.dense_shape[1] * self.groups, self.bias is not None
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        layer = nn.Conv2d(channels, self.shape[0], *shape, bias, self.padding_mode)
        _fill(layer, self)
        return layer

    def computed(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self.computed(x[None])[0]
        if any(self.margins):
            x = pad(x, self.margins, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        columns = unfold(x, self.kernel_size, self.dilation, stride=self.stride)
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        together = columns.transpose(0, 1).reshape(self.shape[1], -1)
        return self.multiplied(together, "feature").reshape(self.shape[0], len(x), *size).transpose(0, 1)

    def traced(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = pad(x, self.margins, mode=self.padding_mode), 0
        return conv2d(x, self.scattered(), self.bias, self.stride, padding, self.dilation, self.groups)


def check_form(layer: nn.Module, form: RuntimeForm) -> None:
    """Refuse a form that a layer's weight cannot take with a PysolveError."""
    if isinstance(form, LowRank):
        check_factors(layer, form)
    elif isinstance(form, Integers):
        check_integers(layer, nn.Conv2d if type(layer) is nn.Conv2d else nn.Linear, form)
    elif type(layer) not in (nn.Linear, nn.Conv2d):
        raise PysolveError(f"only Linear and Conv2d have a sparse form, got {type(layer).__name__}.")
    else:
        check_shape(layer, form)


def in_form(
    layer: nn.Module, form: RuntimeForm
) -> SparseLinear | SparseConv2d | Factored | QuantLinear | QuantConv2d:
    """The layer in another form that takes the place of a dense one, with a weight of the same shape.

    Raises
    ------
    PysolveError
        When the layer cannot take the form, or its weight has another shape.
    """
    if isinstance(form, LowRank):
        return Factored.from_form(layer, form)  # type: ignore[arg-type]
    if isinstance(form, Integers):
        return quantized(layer, form)
    check_form(layer, form)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(form.dense()))
    return SparseLinear.from_dense(dense) if isinstance(dense, nn.Linear) else SparseConv2d.from_dense(dense)


def _fill(dense: nn.Linear | nn.Conv2d, sparse: SparseWeight) -> None:
    """Give a dense layer a sparse one's weight and bias."""
    dense.to(sparse.values)
    with torch.no_grad():
        dense.weight.copy_(sparse.scattered())
        if sparse.bias is not None and dense.bias is not None:
            dense.bias.copy_(sparse.bias)
    dense.train(sparse.training)
