"""A layer in the form in which its weight runs, and networks in which all are torch's own again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

from pysolve.errors import PysolveError
from pysolve.forms import Integers, LowRank, RuntimeForm
from pysolve.nn.layers.base import HOOKS, Dense, check_shape
from pysolve.nn.layers.factored import Factored, check_factors
from pysolve.nn.layers.factored_embedding import FactoredEmbedding, check_table, table_of
from pysolve.nn.layers.factored_recurrent import FactoredRecurrent
from pysolve.nn.layers.quantized import QuantConv2d, QuantLinear, QuantWeight, check_integers
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear, SparseWeight
from pysolve.nn.running import as_tensor, check_model
from pysolve.nn.state import copy_of

# A layer that runs in a form of its own.
Own: TypeAlias = SparseWeight | Factored | FactoredRecurrent | QuantWeight


def check_form(layer: nn.Module, form: RuntimeForm) -> None:
    """Refuse a form that a layer's weight cannot take with a PysolveError."""
    if isinstance(form, LowRank):
        (check_table if isinstance(layer, nn.Embedding) else check_factors)(layer, form)
    elif isinstance(form, Integers):
        check_integers(layer, form)
    elif type(layer) not in (nn.Linear, nn.Conv2d):
        raise PysolveError(f"only Linear and Conv2d have a sparse form, got {type(layer).__name__}.")
    else:
        check_shape(layer, form)


def in_form(
    layer: nn.Module, form: RuntimeForm
) -> SparseLinear | SparseConv2d | Factored | QuantLinear | QuantConv2d:
    """The layer that takes the place of a dense one; PysolveError when its weight cannot take the form."""
    check_form(layer, form)
    if isinstance(form, LowRank):
        if isinstance(layer, nn.Embedding):
            return FactoredEmbedding.of_table(layer, form)
        assert isinstance(layer, Dense)
        return Factored.from_form(layer, form)
    if isinstance(form, Integers):
        return (QuantLinear if type(layer) is nn.Linear else QuantConv2d).from_form(layer, form)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = as_tensor(form.dense()).to(layer.weight)
    if isinstance(layer, nn.Linear):
        return SparseLinear.from_dense(layer, weight)
    return SparseConv2d.from_dense(layer, weight)


def substitute(model: nn.Module, layer: nn.Module, other: nn.Module) -> nn.Module:
    """Put a layer in another's place in a network, under all its names; the network, or what replaces it.

    It takes the other's hooks.
    """
    for name in HOOKS:
        getattr(other, name).update(getattr(layer, name))
    other._is_full_backward_hook = layer._is_full_backward_hook
    if layer is model:
        return other
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if child is layer:
                setattr(owner, name, other)
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a network with one dense layer for each sparse, quantised or factored one.

    For other devices and half precision, and for exporting. A network with sparse layers can be exported,
    too: at 90 % zeros such a program takes a fifth of a dense one's space, but makes the dense weights anew
    in each call, for single samples several times as long as the products take. ONNX Runtime makes them
    once, when it loads the model. The same holds of codes of quantised layers. Inputs that these round are
    no longer rounded.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    """
    tables = dict[nn.Parameter, nn.Parameter]()

    def dense(layer: Own) -> nn.Module:
        made: nn.Module = layer.to_dense()
        shared = None if isinstance(layer, FactoredRecurrent) else table_of(layer)
        # Heads go on sharing the weight of an embedding.
        if shared is not None and isinstance(made.weight, nn.Parameter):
            made.weight = tables.setdefault(shared, made.weight)
        return made

    return _replaced(model, (SparseWeight, Factored, FactoredRecurrent, QuantWeight), dense)


def without_sparse(model: nn.Module) -> nn.Module:
    """A copy of a network with a dense layer for each sparse one; the network itself where none is sparse."""
    found = any(isinstance(layer, SparseWeight) for layer in model.modules())
    return _replaced(model, (SparseWeight,), lambda layer: layer.to_dense()) if found else model


def to_torchao(model: nn.Module) -> nn.Module:
    """A copy of a network whose layers that round their inputs are run by torchao.

    Each becomes an ``nn.Linear`` whose weight is torchao's ``Int8Tensor`` of the same codes and scales: for
    GPUs and torch.compile. On a CPU without torch.compile the layers are faster as they are: torchao calls
    the same kernel, with more around it. It rounds inputs symmetrically about zero, in wider steps; on a
    CPU without VNNI its sums of large products overflow, which those of the layers as they are never do.

    Parameters
    ----------
    model : nn.Module
        Not changed.

    Raises
    ------
    ImportError
        Without torchao: pip install 'pysolve-compress[quant]'.
    """

    def made(layer: Own) -> nn.Module:
        return layer.to_torchao() if isinstance(layer, QuantLinear) and layer.dynamic else layer

    return _replaced(model, (QuantLinear,), made)


def _replaced(model: nn.Module, kinds: tuple[type[Own], ...], make: Callable[[Own], nn.Module]) -> nn.Module:
    """A copy of a network with other layers in the place of those of some kinds."""
    check_model("model", model)
    other = copy_of(model)
    # Inside out: the parts of a factored layer may be sparse or factored themselves.
    for layer in [one for one in reversed([*other.modules()]) if isinstance(one, kinds)]:
        other = substitute(other, layer, make(layer))
    return other
