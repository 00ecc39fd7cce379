"""Networks in which every layer is one of torch's own again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.quantized import QuantLinear, QuantWeight
from pysolve.nn.layers.runtime import substitute
from pysolve.nn.layers.sparse import SparseWeight

_KINDS = (SparseWeight, Factored, QuantWeight)


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
    return _replaced(model, _KINDS, lambda layer: layer.to_dense())


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
        Without torchao: pip install 'pysolve[quant]'.
    """
    return _replaced(model, (QuantLinear,), lambda layer: layer.to_torchao() if layer.dynamic else layer)


def _replaced(model: nn.Module, kinds: tuple[type, ...], make: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy of a network with other layers in the place of those of some kinds."""
    other = copy.deepcopy(model)
    # Inside out: the parts of a factored layer may be sparse or factored themselves.
    for layer in [one for one in reversed([*other.modules()]) if isinstance(one, kinds)]:
        other = substitute(other, layer, make(layer))
    return other
