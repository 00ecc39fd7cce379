"""Layers whose weight is small integers: decoded once, or multiplied as they are by inputs of 8 bits."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pysolve.errors import PysolveError
from pysolve.forms import Integers
from pysolve.nn.layers.base import Geometry, TwoWay, answers_of, check_shape, dense_layer, seen

# Steps between the least and the greatest input of a row.
_STEPS = 255


class QuantWeight(TwoWay):
    """A weight of (codes − zeros) · scales, and a bias.

    The bias is trained, and the scales only after ``requires_grad_()``: they are so small that a learning
    rate for weights would undo them. The decoded weight is kept from the first call on, outside of the state
    dict and of copies; it follows what an optimiser does to the scales. In memory such a layer is then larger
    than a dense one; in a file it is a quarter of it, or less.
    """

    codes: Tensor
    scales: nn.Parameter
    zeros: Tensor | None
    bias: nn.Parameter | None

    # The dense layer that it replaces.
    kind: type[nn.Linear] | type[nn.Conv2d]

    def __init__(self, layer: nn.Linear | nn.Conv2d, form: Integers) -> None:
        super().__init__()
        self.bits, self.group, self.dynamic = form.bits, form.group, form.dynamic
        # Plain numbers: sizes that a trace asks tensors for are part of its program.
        self.shape = form.shape
        self.answers = answers_of(layer)
        self.columns = math.prod(form.shape[1:])
        weight = layer.weight
        self.register_buffer("codes", torch.tensor(form.codes, device=weight.device))
        zeros = None if form.zeros is None else torch.tensor(form.zeros, device=weight.device)
        self.register_buffer("zeros", zeros)
        scales = torch.tensor(form.scales, dtype=weight.dtype, device=weight.device)
        self.scales = nn.Parameter(scales, requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self._kept: dict[str, tuple[object, Tensor]] = {}
        self.train(layer.training)

    @classmethod
    def from_form(cls, layer: nn.Module, form: Integers) -> Self:
        """A layer with a dense one's bias; PysolveError when that is of another kind or shape."""
        check_integers(layer, form, cls.kind)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return cls(layer, form)

    def decoded(self) -> Tensor:
        """The weight in the precision of the scales; gradients go to the scales."""
        steps = self.codes.flatten(1).to(self.scales.dtype)
        if self.zeros is not None:
            steps = steps - self._spread(self.zeros.to(self.scales.dtype))
        return (steps * self._spread(self.scales)).reshape(self.shape)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for code that asks a layer for it."""
        return seen(self.decoded() if torch.compiler.is_exporting() else self.in_use())

    def in_use(self) -> Tensor:
        """The decoded weight: kept from call to call, unless gradients are to go through it."""
        if torch.is_grad_enabled() and self.scales.requires_grad:
            return self.decoded()
        return self.kept("weight", self.decoded)

    def nonzeros(self) -> int:
        """Number of weights that are not zero."""
        zeros = self.codes.new_zeros(1) if self.zeros is None else self._spread(self.zeros)
        return int((self.codes.flatten(1) != zeros).sum())

    def form(self) -> Integers:
        """Codes, scales and zeros."""
        zeros = None if self.zeros is None else self.zeros.cpu().numpy()
        scales = self.scales.detach().float().cpu().numpy()
        return Integers(self.codes.cpu().numpy(), scales, zeros, self.bits, self.group, self.dynamic)

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made of codes and scales, made anew when one of them has changed."""
        key = [
            (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in (self.codes, self.scales)
        ]
        if name not in self._kept or self._kept[name][0] != key:
            # A tensor of inference mode could never take part in a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[name] = (key, make())
        return self._kept[name][1]

    def _spread(self, values: Tensor) -> Tensor:
        """A value for every input, or one for all of a row."""
        if self.group is None or self.group >= self.columns:
            return values
        return values.repeat_interleave(self.group, 1)[:, : self.columns]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._kept = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}

    def extra_repr(self) -> str:
        group = "" if self.group is None else f", group={self.group}"
        return f"{self.shape}, bits={self.bits}{group}, bias={self.bias is not None}"


class QuantLinear(QuantWeight):
    """y = W x + b with W of small integers: takes the place of an ``nn.Linear``.

    With ``dynamic``, the inputs of each row are rounded to 8 bits as well, between the least of them and the
    greatest, zero included; then integers are multiplied, in float32 on a CPU that does this exactly.
    Elsewhere, and where a gradient goes to the inputs, the rounded inputs are multiplied by the decoded
    weight, which gives the same up to float rounding; the gradient is that of unrounded inputs.

    torch.compile runs it as it is, between two graphs. A program of torch.export or torch.onnx needs nothing
    of this package: it holds the codes, and decodes them in each call.
    """

    kind = nn.Linear

    def to_dense(self) -> nn.Linear:
        """The same layer with a dense weight; inputs are no longer rounded."""
        h, d = self.shape
        return dense_layer(nn.Linear, self.in_use(), self.bias, (d, h)).train(self.training)

    def computed(self, x: Tensor) -> Tensor:
        if not self.dynamic or not self.columns:
            return linear(x, self.in_use(), self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x + (restored(x.detach()) - x).detach(), self.in_use(), self.bias)
        if self.scales.dtype != torch.float32 or not can_multiply(x, self.codes):
            return linear(restored(x), self.in_use(), self.bias)
        sums = self.kept("sums", lambda: self.codes.sum(1, dtype=torch.int32).float())
        rows = x.reshape(-1, x.shape[-1])
        y = multiplied(rows, self.codes, self.scales.flatten(), sums, self.bias)
        return y.reshape(*x.shape[:-1], self.shape[0])

    def traced(self, x: Tensor) -> Tensor:
        return linear(restored(x) if self.dynamic and self.columns else x, self.decoded(), self.bias)

    def to_torchao(self) -> nn.Linear:
        """A Linear with the same codes and scales as torchao's tensor, whose inputs torchao rounds.

        Raises ImportError without torchao, and PysolveError where ``dynamic`` is off.
        """
        if not self.dynamic:
            raise PysolveError("only layers that round their inputs have a form in torchao: take to_dense().")
        layer = nn.Linear(self.shape[1], self.shape[0], False, device="meta")
        layer.weight = nn.Parameter(torchao_tensor(self.codes, self.scales.detach()), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", dynamic={self.dynamic}"


class QuantConv2d(QuantWeight):
    """A 2-d convolution with a weight of small integers: takes the place of an ``nn.Conv2d``.

    Of any stride, padding, dilation and groups; runs by the decoded weight. As ``QuantLinear`` otherwise.
    """

    kind = nn.Conv2d

    def __init__(self, layer: nn.Conv2d, form: Integers) -> None:
        super().__init__(layer, form)
        self.geometry = Geometry.of(layer)

    def to_dense(self) -> nn.Conv2d:
        """The same layer with a dense weight."""
        return self.geometry.dense(self.in_use(), self.bias).train(self.training)

    def computed(self, x: Tensor) -> Tensor:
        return self.geometry.convolved(x, self.in_use(), self.bias)

    def traced(self, x: Tensor) -> Tensor:
        return self.geometry.convolved(x, self.decoded(), self.bias)


def check_integers(layer: nn.Module, form: Integers, *kinds: type[nn.Module]) -> None:
    """Refuse a layer of another kind, and a form of another shape, with a PysolveError."""
    if type(layer) not in (kinds or (nn.Linear, nn.Conv2d)):
        raise PysolveError(f"only Linear and Conv2d have a form of integers, got {type(layer).__name__}.")
    check_shape(layer, form)
    if form.dynamic and type(layer) is not nn.Linear:
        raise PysolveError("only the inputs of a Linear are rounded: give convolutions dynamic=False.")


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Inside, no layer of a network rounds its inputs."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear) and layer.dynamic]
    for layer in layers:
        layer.dynamic = False
    try:
        yield
    finally:
        for layer in layers:
            layer.dynamic = True


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of inputs, (…, d), as integers: x ≈ steps · width + middle.

    The steps, in the data type of ``x``, lie within −128 … 127, which stand for the least and the greatest of
    the row and of zero; they are off by half a width, (…, 1), at most. A row with an entry that is not finite
    has a width that is not, either.
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

    ``x`` is (n, d) in float32, ``codes`` (h, d) in int8; W is codes · scales, and ``sums`` are those of the
    codes.
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
    ImportError when torchao is not installed, or too old to have such tensors.
    """
    try:
        with _quietly():
            from torchao.quantization import Int8Tensor, PerRow
            from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs
    except ImportError as error:
        raise ImportError(
            "this form of a layer comes with torchao 0.18 or later, which is not installed: pip install "
            "'pysolve-compress[quant]', or run the layer as it is."
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
