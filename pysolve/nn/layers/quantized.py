"""Layers whose weight is small whole numbers: decoded once, or multiplied as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad
from torch.nn.utils import skip_init

from pysolve.errors import PysolveError
from pysolve.forms import Integers
from pysolve.nn.layers.integers import can_multiply, multiplied, restored, torchao_tensor
from pysolve.nn.layers.quant_weight import QuantWeight, check_form, made_dense


class QuantLinear(QuantWeight):
    """y = W x + b with W of small whole numbers: takes the place of an ``nn.Linear``.

    With ``dynamic``, the inputs of each row are rounded to 8 bits as well, between the least of them and the
    greatest, zero included; then whole numbers are multiplied, in float32 on a CPU that does this exactly.
    Elsewhere, and where a gradient goes to the inputs, the rounded inputs are multiplied by the decoded
    weight, which gives the same up to float rounding; the gradient is that of unrounded inputs.

    torch.compile runs it as it is, between two graphs. A program of torch.export or torch.onnx needs nothing
    of this package: it holds the codes, and decodes them in each call.
    """

    def __init__(self, layer: nn.Linear, form: Integers) -> None:
        super().__init__(layer, form)
        self.dynamic = form.dynamic

    @classmethod
    def from_form(cls, layer: nn.Linear, form: Integers) -> QuantLinear:
        """A layer with a dense one's bias. PysolveError if it is of another kind or shape."""
        check_form(layer, nn.Linear, form)
        return cls(layer, form)

    def form(self) -> Integers:
        """Codes, scales and zeros."""
        form = super().form()
        return Integers(form.codes, form.scales, form.zeros, form.bits, form.group, self.dynamic)

    def to_dense(self) -> nn.Linear:
        """The same layer with a dense weight; inputs are no longer rounded."""
        return made_dense(nn.Linear, self, self.shape[1], self.shape[0], self.bias is not None)  # type: ignore[no-any-return]

    def computed(self, x: Tensor) -> Tensor:
        if not self.dynamic or not self.columns:
            return linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x + (restored(x.detach()) - x).detach(), self.weight, self.bias)
        if self.scales.dtype != torch.float32 or not can_multiply(x, self.codes):
            return linear(restored(x), self.weight, self.bias)
        rows, sums = x.reshape(-1, x.shape[-1]), self.kept("sums", self._sums)
        y = multiplied(rows, self.codes, self.scales.flatten(), sums, self.bias)
        return y.reshape(*x.shape[:-1], self.shape[0])

    def traced(self, x: Tensor) -> Tensor:
        return linear(restored(x) if self.dynamic and self.columns else x, self.decoded(), self.bias)

    def to_torchao(self) -> nn.Linear:
        """A Linear with the same codes and scales as torchao's tensor, whose inputs torchao rounds.

        Raises ImportError without torchao, and PysolveError where ``dynamic`` is off.
        """
        if not self.dynamic:
            raise PysolveError(
                "only layers whose inputs are rounded have a form in torchao: take to_dense()."
            )
        layer = skip_init(nn.Linear, self.shape[1], self.shape[0], False, device="meta")  # type: ignore[no-untyped-call]
        layer.weight = nn.Parameter(torchao_tensor(self.codes, self.scales.detach()), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)  # type: ignore[no-any-return]

    def _sums(self) -> Tensor:
        return self.codes.sum(1, dtype=torch.int32).float()

    def extra_repr(self) -> str:
        return super().extra_repr() + f", dynamic={self.dynamic}"


class QuantConv2d(QuantWeight):
    """A 2-d convolution with a weight of small whole numbers: takes the place of an ``nn.Conv2d``.

    Of any stride, padding, dilation and groups; runs by the decoded weight. As ``QuantLinear`` otherwise.
    """

    def __init__(self, layer: nn.Conv2d, form: Integers) -> None:
        super().__init__(layer, form)
        self.groups, self.padding_mode = layer.groups, layer.padding_mode
        self.stride: Any = layer.stride
        self.padding: Any = layer.padding
        self.dilation: Any = layer.dilation
        self.margins: list[int] = list(layer._reversed_padding_repeated_twice)

    @classmethod
    def from_form(cls, layer: nn.Conv2d, form: Integers) -> QuantConv2d:
        """A layer with a dense one's bias. PysolveError if it is of another kind or shape."""
        check_form(layer, nn.Conv2d, form)
        return cls(layer, form)

    def to_dense(self) -> nn.Conv2d:
        """The same layer with a dense weight."""
        h, c, *kernel = self.shape
        shape = (tuple(kernel), self.stride, self.padding, self.dilation, self.groups)
        bias = self.bias is not None
        return made_dense(nn.Conv2d, self, c * self.groups, h, *shape, bias, self.padding_mode)  # type: ignore[no-any-return]

    def computed(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight)

    def traced(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.decoded())

    def _convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = pad(x, self.margins, mode=self.padding_mode), 0
        return conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


def quantized(layer: nn.Module, form: Integers) -> QuantLinear | QuantConv2d:
    """The layer of whole numbers that takes the place of a dense one.

    Raises
    ------
    PysolveError
        When the layer is neither a Linear nor a Conv2d, or its weight has another shape.
    """
    if type(layer) is nn.Conv2d:
        return QuantConv2d.from_form(layer, form)
    return QuantLinear.from_form(layer, form)  # type: ignore[arg-type]


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Layers of a network do not round their inputs inside."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear) and layer.dynamic]
    for layer in layers:
        layer.dynamic = False
    try:
        yield
    finally:
        for layer in layers:
            layer.dynamic = True
