"""Operators that multiply an input with a weight, in running code as in graphs: what they are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from pysolve.nn.layer_kinds import CONVOLUTIONS, LINEAR, TRANSPOSED, inputs_first, plain
from pysolve.nn.layer_matrix import Layer

# A tensor, or the node of a graph that stands for one.
Operand: TypeAlias = Any
_MOVES = ("stride", "padding", "dilation")
_CONV = ("x", "weight", "bias", *_MOVES, "groups")
_TURNED = ("x", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
# Arguments in their order; of convolutions torch's functions and operators agree.
_ARGUMENTS = {
    "linear": ("x", "weight", "bias"),
    "addmm": ("bias", "x", "weight"),
    **dict.fromkeys(("matmul", "__matmul__", "mm"), ("x", "weight")),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _CONV),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TURNED),
}
_WORDS = {"input": "x", "self": "x", "mat1": "x", "mat2": "weight", "other": "weight", "tensor": "x"}


@dataclass(frozen=True, eq=False)
class Product:
    """One call of such an operator, with tensors or with the nodes of a graph.

    Parameters
    ----------
    name : str
        The operator's.
    x, weight, bias : Operand, bias None without one
    how : {name: value}
        Further arguments of a convolution that were given.
    """

    name: str
    x: Operand
    weight: Operand
    bias: Operand
    how: Mapping[str, object]

    @property
    def takes_inputs_first(self) -> bool:
        """Whether the first dimension of the weight that a linear operator takes are inputs."""
        return self.name != "linear"

    def of(self, layer: nn.Module) -> bool:
        """Whether this is the operator of such a layer, weights aside."""
        kinds = CONVOLUTIONS if self.name.startswith("conv") else LINEAR
        if not isinstance(layer, kinds) or plain(layer) not in kinds:
            return False
        if kinds is LINEAR:
            return True
        turned = "_transpose" if isinstance(layer, TRANSPOSED) else ""
        wanted = f"conv{turned}{layer.weight.ndim - 2}d"
        return self.name == wanted and self.how.get("groups", 1) == layer.groups


def product(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Product | None:
    """What an operator of this name is called with; None if it multiplies with no weight as a layer does."""
    if name not in _ARGUMENTS:
        return None
    given = {_WORDS.get(key, key): value for key, value in kwargs.items()}
    if name == "addmm":
        words = {"input": "bias", "self": "bias"} | {key: _WORDS[key] for key in ("mat1", "mat2")}
        given = {words.get(key, key): value for key, value in kwargs.items()}
    given = {**dict(zip(_ARGUMENTS[name], args, strict=False)), **given}
    if given.pop("alpha", 1) != 1 or given.pop("beta", 1) != 1 or not {"x", "weight"} <= given.keys():
        return None
    how = {key: value for key, value in given.items() if key not in ("x", "weight", "bias")}
    return Product(name, given["x"], given["weight"], given.get("bias"), how)


def as_called(layer: Layer, call: Product) -> Layer | None:
    """A layer as its operator runs, which need not pad as the layer says; None where sizes are computed.

    Shares the layer's parameters.
    """
    if isinstance(layer, LINEAR):
        return layer
    n = layer.weight.ndim - 2
    names = (*_MOVES, *(["output_padding"] if inputs_first(layer) else []))
    usual = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    how = {name: _spread(call.how.get(name, usual[name]), n) for name in names}
    if any(not isinstance(one, int) for value in how.values() if isinstance(value, tuple) for one in value):
        return None
    if layer.padding_mode == "zeros" and all(_spread(getattr(layer, name), n) == how[name] for name in names):
        return layer
    other = copy(layer)
    other.__dict__.update(how, padding_mode="zeros")
    return other


def _spread(value: object, n: int) -> str | tuple[object, ...]:
    """A number for each dimension; "same" and "valid" as they are."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values
