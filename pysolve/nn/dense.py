"""Networks with sparse and factored layers made dense again."""

from __future__ import annotations

import copy

from torch import nn

from pysolve.nn.factored import Factored
from pysolve.nn.layers import SparseConv2d, SparseLinear
from pysolve.nn.surgery import substitute

_KINDS = (SparseLinear, SparseConv2d, Factored)


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a network with one dense layer for each sparse layer, and for each that became two.

    For other devices and half precision, and for exporting. A network with sparse layers can be exported,
    too: at 90 % zeros such a program takes a fifth of a dense one's space, but makes the dense weights anew
    in each call, for single samples several times as long as the products take. ONNX Runtime makes them
    once, when it loads the model.

    Parameters
    ----------
    model : nn.Module
        Not changed.
    """
    dense = copy.deepcopy(model)
    # Inside out: what a factored layer is made of may be sparse or factored itself.
    for layer in [one for one in reversed([*dense.modules()]) if isinstance(one, _KINDS)]:
        if layer is dense:
            return layer.to_dense()
        substitute(dense, layer, layer.to_dense())
    return dense
