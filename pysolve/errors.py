"""The exceptions that are pysolve's own; plain wrong arguments are ValueError or TypeError."""


class PysolveError(Exception):
    """Something about a network, its data or a file that pysolve cannot work with."""


class LayerNotFoundError(PysolveError):
    """A layer name that the network does not have."""


class CollapseError(PysolveError):
    """Channels that cannot be removed from this network without changing what it computes."""


class DataError(PysolveError):
    """A data file or a batch that is missing, empty or malformed."""
