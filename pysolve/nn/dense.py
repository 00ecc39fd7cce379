"""Networks with sparse layers made dense again."""

from __future__ import annotations

import copy

from torch import nn

from pysolve.nn.layers import SparseConv2d, SparseLinear
from pysolve.nn.surgery import substitute


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a network with a Linear for each ``SparseLinear``, a Conv2d for each ``SparseConv2d``.

    For what runs dense anyway: exported programs, other devices, half precision. A network with sparse
    layers can be exported too; such a program holds their entries alone, so that at 90 % zeros it takes a
    fifth of the space, but makes the dense weights anew in every call. ONNX Runtime does so once, when it
    loads a model.

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
