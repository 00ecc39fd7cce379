"""Networks with sparse layers made dense again."""

from __future__ import annotations

import copy

from torch import nn

from pysolve.nn.layers import SparseConv2d, SparseLinear
from pysolve.nn.surgery import substitute


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a network with a Linear for each ``SparseLinear``, a Conv2d for each ``SparseConv2d``.

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
    if isinstance(dense, SparseLinear | SparseConv2d):
        return dense.to_dense()
    for layer in [one for one in dense.modules() if isinstance(one, SparseLinear | SparseConv2d)]:
        substitute(dense, layer, layer.to_dense())
    return dense
