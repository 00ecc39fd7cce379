"""Networks: from a network to correlations, and from a plan to a smaller network.

zoo                     reference networks of the demo, the examples and the tests
running                 finding layers, running a network without changing it
items                   the user's items become batches
calibration             calibration samples, kept while the batches stream by
graph/                  the network as a graph, and the sites whose channels can be removed
layer_matrix            a layer as y = M x + b
gather, walk, lockstep  correlations of layers; the original and the smaller network side by side
divergence, sensitivity  distance of outputs from the original's, and its increase per error of a layer
costs, evaluate, profile, inspect, nonzeros  sizes, MACs, latency, accuracy

slicing, values, apply, verify  a plan carried out: narrower layers, new values, other forms, one check
layers/                 layers that run sparse, factored, in integers, masked or with shared values
files/                  save and load
"""

from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.quantized import QuantConv2d, QuantLinear
from pysolve.nn.layers.runtime import to_dense, to_torchao
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear

__all__ = [
    "Factored",
    "QuantConv2d",
    "QuantLinear",
    "SparseConv2d",
    "SparseLinear",
    "to_dense",
    "to_torchao",
]
