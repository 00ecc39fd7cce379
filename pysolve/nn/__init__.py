"""Networks: from a network to correlations, and from a plan to a smaller network.

running                 finding layers, running a network without changing it
batches/                the user's items become batches; samples of them; padding; what cannot be fitted to
graph/                  the network as a graph, and the sites whose channels can be removed
gathering/              correlations of layers, summed while the batches stream by
layer_matrix            a layer as y = M x + b
divergence, sensitivity  distance of outputs from the original's, and its increase per error of a layer
cost/                   parameters, MACs, bytes and times, also at other widths
refit/                  the original and the smaller network side by side, layer after layer refitted
cut/                    a plan carried out: narrower layers, new values, other forms, one check
layers/                 layers that run sparse, factored, in integers, masked or with shared values; attention
files/                  save and load
pretrained/             networks of transformers: configurations, and folders that its own classes open
inspect, evaluate       what can shrink before any work starts; accuracy, size, latency
"""

from pysolve.nn.layers.attention import Attention
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.factored_recurrent import FactoredRecurrent
from pysolve.nn.layers.quantized import QuantConv2d, QuantLinear
from pysolve.nn.layers.runtime import to_dense, to_torchao
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear

__all__ = [
    "Attention",
    "Factored",
    "FactoredRecurrent",
    "QuantConv2d",
    "QuantLinear",
    "SparseConv2d",
    "SparseLinear",
    "to_dense",
    "to_torchao",
]
