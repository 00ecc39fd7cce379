"""A weight of small whole numbers in a layer: what it stands for, decoded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.utils import skip_init

from pysolve.errors import PysolveError
from pysolve.forms import Integers
from pysolve.nn.layers.factored import check_shape


class QuantWeight(nn.Module):
    """A weight of (codes − zeros) · scales, and a bias.

    The bias is trained, and the scales where they are told to be with ``requires_grad_()``: they are so small
    that a learning rate for weights would undo them. The decoded weight is kept beside them from the first
    call on, outside of the state dict and of copies; it follows what an optimiser does to the scales. In
    memory such a layer is then larger than a dense one; in a file it is a quarter of it, or less.
    """

    codes: Tensor
    scales: nn.Parameter
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: Any, form: Integers) -> None:
        super().__init__()
        self.bits, self.group = form.bits, form.group
        # Plain numbers: sizes that a trace asks tensors for are part of its program.
        self.shape = form.shape
        self.columns = math.prod(form.shape[1:])
        weight = layer.weight
        self.register_buffer("codes", torch.tensor(form.codes, device=weight.device))
        zeros = None if form.zeros is None else torch.tensor(form.zeros, device=weight.device)
        self.register_buffer("zeros", zeros)
        scales = torch.tensor(form.scales, dtype=weight.dtype, device=weight.device)
        self.scales = nn.Parameter(scales, requires_grad=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self._kept: dict[str, tuple[Any, Tensor]] = {}
        self.train(layer.training)

    def decoded(self) -> Tensor:
        """The weight in the precision of the scales; gradients go to the scales."""
        steps = self.codes.flatten(1).to(self.scales.dtype)
        if self.zeros is not None:
            steps = steps - self._spread(self.zeros.to(self.scales.dtype))
        return (steps * self._spread(self.scales)).reshape(self.shape)

    @property
    def weight(self) -> Tensor:
        """The decoded weight: kept from call to call, unless gradients are to go through it."""
        if torch.is_grad_enabled() and self.scales.requires_grad:
            return self.decoded()
        return self.kept("weight", self.decoded)

    def nonzeros(self) -> int:
        """How many weights the codes say are not zero."""
        zeros: Any = 0 if self.zeros is None else self._spread(self.zeros)
        return int((self.codes.flatten(1) != zeros).sum())

    def form(self) -> Integers:
        """Codes, scales and zeros."""
        zeros = None if self.zeros is None else self.zeros.cpu().numpy()
        scales = self.scales.detach().float().cpu().numpy()
        return Integers(self.codes.cpu().numpy(), scales, zeros, self.bits, self.group)

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What was made of codes and scales, made anew when one of them has changed."""
        key = [
            (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in (self.codes, self.scales)
        ]
        if name not in self._kept or self._kept[name][0] != key:
            # A tensor of inference mode could never take part in a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[name] = (key, make())
        return self._kept[name][1]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self.traced(x)
        return _apart(self, x) if torch.compiler.is_compiling() else self.computed(x)

    def computed(self, x: Tensor) -> Tensor:
        """The layer's output, as it runs."""
        raise NotImplementedError

    def traced(self, x: Tensor) -> Tensor:
        """The layer's output in torch's own operators, from the codes."""
        raise NotImplementedError

    def _spread(self, values: Tensor) -> Tensor:
        """A value for every input, or one for all of a row."""
        if self.group is None or self.group >= self.columns:
            return values
        return values.repeat_interleave(self.group, 1)[:, : self.columns]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = {}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def extra_repr(self) -> str:
        group = "" if self.group is None else f", group={self.group}"
        return f"{self.shape}, bits={self.bits}{group}, bias={self.bias is not None}"


def check_form(layer: Any, kind: type[nn.Module], form: Integers) -> None:
    """Refuse a layer of another kind, or a form of another shape, with a PysolveError."""
    found: type = type(layer)
    if found is not kind:
        raise PysolveError(f"only Linear and Conv2d have a form of integers, got {found.__name__}.")
    check_shape(layer, form)
    if form.dynamic and kind is not nn.Linear:
        raise PysolveError("only the inputs of a Linear are rounded: give convolutions dynamic=False.")


def made_dense(kind: Any, layer: QuantWeight, *args: Any) -> Any:
    """A dense layer with the decoded weight."""
    home = {"device": layer.scales.device, "dtype": layer.scales.dtype}
    dense: Any = skip_init(kind, *args, **home)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
            dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense.train(layer.training)


# What torch.compiler.disable does, which would import torch's compiler, for a second, with this module.
@_disable_dynamo
def _apart(layer: QuantWeight, x: Tensor) -> Tensor:
    return layer.computed(x)
