"""The half of pysolve that needs torch: networks to correlations, plans to smaller networks.

zoo          the reference networks of the demo, the examples and the tests
network      finding a network's layers and running it without changing it
masking      weights that stay zero while a network is trained; surgeon moves the masks
sharing      weights that share few values meanwhile; snapping has the parametrisations

What a network is made of
    graph        what can shrink: the network as a graph, channel labels, sites
    costs        parameters, MACs and bytes at any width; inspect shows them

What its layers do
    rows         a layer as y = M x + b, samples in rows; windows cuts them out
    gather       network and batches to correlations
    calibration  samples kept at hand while the batches stream by
    walk         the graph in two networks at once; lockstep refits on the way
    divergence   how far outputs are from the original's; sensitivity, what an error at a layer does to them

Making it smaller
    slicing      one layer made narrower
    layers       layers that run in another form: products computes sparse ones, factored are two, quantized
                 ones are quant_weight, their products integers, dense turns all of them back
    values       new parameters, checked
    surgery      network and plan to a smaller network
    verify       whether two networks compute the same
    checkpoint   save and load: architecture and modes are what tensors do not tell, packing and compact put
                 a state dict into little space (coded, decoded, distinct: one row of it; zipped: by
                 deflate), storage into a file
    evaluate     accuracy, parameters, bytes, MACs, latency; profile has them layer by layer
    nonzeros     what is left of every tensor
"""

from pysolve.nn.layers.dense import to_dense, to_torchao
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.quantized import QuantConv2d, QuantLinear
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
