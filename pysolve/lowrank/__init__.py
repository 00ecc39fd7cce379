"""Layers that become two smaller ones.

methods      ``low_rank``: one function for all ways
spectrum     the best approximation of a matrix, or of a layer on what it reads, at every rank
spatial      a convolution as one along its height and one along its width
layer        one layer at one rank; single is ``reduced_rank``, the same on matrices
candidates   which layers of a network could become two, and what that does to it
ranks        what a layer loses and costs at every rank; shares, ranks and channels under one budget
choose       which layers become two, and why the others do not
factoring    the network, layer after layer on what those before it leave; the result and its report
"""
