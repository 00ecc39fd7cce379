"""Correlations of layers, summed while batches go through a network."""
