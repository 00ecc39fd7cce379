"""Every pruning method of the field: which weights or channels go, and what becomes of the others.

methods      ``prune``: one function, one vocabulary
weights      single weights of a whole network; channels, whole channels of it
training     pruning while a network is trained

Which weights stay
    masks        by a score of each weight, or a pattern; lamp shares a number out over layers
    obs          by what a layer's outputs lose: optimal brain surgeon, on correlations
    searches     its three ways to look for a mask; supports, the refit on one; row_paths, every size at once
    scores       of whole channels

In a network
    selected     the pruned weights of all layers, by scores or by data
    reconstruct  layer after layer, on what the pruned network leaves
    layout       dense or sparse, whichever is faster and smaller; the result and its report
"""
