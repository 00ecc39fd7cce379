"""A layer in the form in which its weight runs."""

from __future__ import annotations

from torch import nn

from pysolve.errors import PysolveError
from pysolve.forms import Integers, LowRank, RuntimeForm
from pysolve.nn.layers.base import Dense, check_shape
from pysolve.nn.layers.factored import Factored, check_factors
from pysolve.nn.layers.quantized import QuantConv2d, QuantLinear, check_integers, quantized
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear
from pysolve.nn.running import as_tensor


def check_form(layer: nn.Module, form: RuntimeForm) -> None:
    """Refuse a form that a layer's weight cannot take with a PysolveError."""
    if isinstance(form, LowRank):
        check_factors(layer, form)
    elif isinstance(form, Integers):
        check_integers(layer, form)
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
    check_form(layer, form)
    if isinstance(form, LowRank):
        assert isinstance(layer, Dense)
        return Factored.from_form(layer, form)
    if isinstance(form, Integers):
        return quantized(layer, form)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = as_tensor(form.dense()).to(layer.weight)
    if isinstance(layer, nn.Linear):
        return SparseLinear.from_dense(layer, weight)
    return SparseConv2d.from_dense(layer, weight)


def substitute(model: nn.Module, layer: nn.Module, other: nn.Module) -> nn.Module:
    """Put a layer in another's place in a network, under all its names; the network, or what replaces it."""
    if layer is model:
        return other
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if child is layer:
                setattr(owner, name, other)
    return model
