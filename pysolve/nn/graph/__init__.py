"""Sites of a network: which channels can be removed together, and how that is known.

export       the network as a graph of tensor operators
labels       channel labels run through that graph, by the rules in calls, operators and layer_rules
classes      labels that belong together
integers     integers in modules of the network that count channels
sites        classes to sites, which are tested by removing channels
branches     the layers of the graph and what follows them
"""
