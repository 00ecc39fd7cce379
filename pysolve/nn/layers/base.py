"""Common parts of layers that run in another form of their weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.functional import conv2d, pad
from torch.nn.utils import skip_init
from torch.utils import _pytree as pytree

from pysolve.errors import PysolveError
from pysolve.forms import Form
from pysolve.nn.layer_kinds import Turned
from pysolve.nn.layer_matrix import margins
from pysolve.nn.overrides import Args, Function
from pysolve.nn.state import copy_of

Dense = nn.Linear | Turned | nn.Conv1d | nn.Conv2d | nn.Conv3d
# What code may ask a layer for; those that stand in its place answer for it.
ASKED = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding"),
    *("dilation", "groups", "padding_mode", "transposed", "output_padding"),
)
# Where hooks on calls are kept, which belong to a place in a network more than to the layer there.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
# Torch's context of an autograd function, which holds whatever is kept for the backward pass.
Context = Any
T = TypeVar("T", bound=Dense)
_HOW = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class TwoWay(nn.Module):
    """A layer that is computed in one way when it runs, and in another when it is traced.

    ``answers`` are the attributes of the layer in whose place it is, such as its stride, for code that asks
    for them.
    """

    answers: Mapping[str, object] = MappingProxyType({})

    def __getattr__(self, name: str) -> Any:
        return self.answers[name] if name in self.answers else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self.traced(x)
        return _apart(self, x) if torch.compiler.is_compiling() else self.computed(x)

    def computed(self, x: Tensor) -> Tensor:
        """The layer's output as it runs; torch.compile leaves this as it is, between two graphs."""
        raise NotImplementedError

    def traced(self, x: Tensor) -> Tensor:
        """What torch.export and torch.jit.trace follow: torch's own operators on the layer's state.

        So exported programs run without this package.
        """
        raise NotImplementedError


# What torch.compiler.disable does, which would import torch's compiler, for a second, with this module.
@_disable_dynamo
def _apart(layer: TwoWay, x: Tensor) -> Tensor:
    return layer.computed(x)


class Seen(Tensor):
    """A layer's weight as code outside of the layer sees it: for its type and shape, and its values.

    Torch's encoder layers take no such tensors into products of their own, but call the layer. What is
    computed from it is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: object,
        args: Args = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = pytree.tree_map_only(cls, lambda t: t.as_subclass(Tensor), (args, kwargs or {}))
            return func(*args, **kwargs)


def seen(weight: Tensor) -> Tensor:
    """The weight for code outside of its layer; traces follow the tensor itself."""
    return weight if torch.compiler.is_exporting() else weight.as_subclass(Seen)


@dataclass(frozen=True)
class Geometry:
    """Attributes of an ``nn.Conv2d``; ``margins`` is its padding as ``torch.nn.functional.pad`` takes it."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    margins: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Geometry:
        """The geometry of a layer."""
        return cls(**{name: getattr(layer, name) for name in _HOW}, margins=margins(layer))

    def dense(self, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
        """A layer with this geometry and these values; see ``dense_layer``."""
        how = {name: getattr(self, name) for name in _HOW}
        return dense_layer(nn.Conv2d, weight, bias, (weight.shape[1] * self.groups, len(weight)), how)

    def padded(self, x: Tensor) -> Tensor:
        """The inputs with their padding around them."""
        return pad(x, self.margins, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of the inputs with a weight."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = self.padded(x), (0, 0)
        return conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def dense_layer(
    kind: type[T],
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[int, int],
    how: Mapping[str, object] | None = None,
    *,
    trained: bool = True,
) -> T:
    """A layer of torch's own with copies of these values, where and of the type that the weight is.

    No random number is drawn. ``sizes`` are input and output channels; its bias is trained where this one is.
    """
    place = {"device": weight.device, "dtype": weight.dtype}
    made: T = skip_init(kind, *sizes, bias=bias is not None, **place, **(how or {}))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
            made.bias.requires_grad_(bias.requires_grad)
    made.weight.requires_grad_(trained)
    return made


def answers_of(layer: nn.Module) -> dict[str, object]:
    """The attributes that code may ask a layer for."""
    return {name: getattr(layer, name) for name in ASKED if hasattr(layer, name)}


def like(layer: T, weight: Tensor, bias: Tensor | None) -> T:
    """A copy of a layer, its class and its code, with another weight, of fewer outputs maybe, and bias.

    Without the layer's hooks, which what takes its place gets.
    """
    made = copy_of(layer)
    for name in HOOKS:
        getattr(made, name).clear()
    made.weight = nn.Parameter(weight.to(layer.weight), layer.weight.requires_grad)
    made.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
    setattr(made, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(weight))
    return made


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer that has one."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def check_shape(layer: nn.Module, form: Form) -> None:
    """Refuse a form of another shape than the layer's weight."""
    if form.shape != (shape := tuple(weight_of(layer).shape)):
        raise PysolveError(f"expected a form of shape {shape}, got {form.shape}.")
