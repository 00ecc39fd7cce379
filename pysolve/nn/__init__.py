"""The half of pysolve that needs torch: networks to correlations, plans to smaller networks.

zoo        the reference networks of the demo, the examples and the tests
network    finding a network's layers and running it without changing it
train      one plain fit loop
gather     network and batches to correlations
verify     whether two networks compute the same
surgery    network and plan to a smaller network
evaluate   accuracy, parameters, bytes, MACs, latency
"""
