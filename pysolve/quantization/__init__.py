"""Weights of few bits, and the fewest bytes that they can be written in.

single      ``quantize_layer``: one layer on a grid or a codebook, from matrices

Which values a weight may take
    grids       evenly spaced ones, for every output or group of inputs
    codebooks   a few shared ones for the whole layer
    clusters    optimal k-means on a line, which they begin with
    rates       shared ones that cost as many bits as entropy coding takes for them

Which of them it takes
    targets     what they should come close to, and in which metric
    rounding    in the metric of what the layer reads: with feedback of the errors, then by descent

How that is stored
    forms       codes and what they stand for
    coding      entropy coding of codes and gaps: asymmetric numeral systems, or huffman

Whole networks
    methods     ``quantize``: what may be asked for
    recipe      how it is carried out
    network     all layers, one after the other
    worth       what a bit is worth in each layer
    within      one price of a bit, for a file of so many bytes
    retraining  shared values, trained to give the original's outputs
    layout      how quantised layers run, and the report
    deep        ``deep_compress``: channels, zeros and bits
    pipeline    its stages
"""
