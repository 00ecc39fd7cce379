"""One graph for all networks of one structure: to trace a small network takes longer than all the rest."""

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.nn.graph.export import trace_once
from pysolve.nn.running import arguments, few_samples

_GRAPHS = {}


class _UnknownError(Exception):
    """Something whose part in the graph cannot be told."""


def traced_once(model, batch):
    """``trace_once``, but of networks of one structure the first alone is traced."""
    try:
        structure = _structure(model)
    except _UnknownError:
        return trace_once(model, batch)
    for part in (few_samples(batch), batch):
        graph = _GRAPHS.get((structure, _shapes(part)))
        if graph is not None and (part is batch or graph.takes_any_batch):
            return graph, part
    graph, part = trace_once(model, batch)
    _GRAPHS[structure, _shapes(part)] = graph
    return graph, part


def _shapes(batch):
    leaves, form = pytree.tree_flatten(arguments(batch))
    return str(form), tuple((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in leaves)


def _structure(model):
    """All of a network but its values: classes, code, plain attributes, shapes, and what is shared."""
    found, numbers = [], {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = (*module._parameters.items(), *module._buffers.items())
        found.append((name, type(module), numbers.setdefault(id(module), len(numbers))))
        found += [(key, _tensor(value, numbers)) for key, value in own]
        hidden = {"_parameters", "_buffers", "_modules", "training"}
        found += [(key, _plain(value)) for key, value in vars(module).items() if key not in hidden]
    return tuple(found)


def _tensor(value, numbers):
    if value is None:
        return None
    return (
        value.shape,
        value.dtype,
        value.requires_grad,
        type(value),
        numbers.setdefault(id(value), len(numbers)),
    )


def _plain(value):
    if value is None or isinstance(value, bool | int | float | str | type):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *map(_plain, value)
    if isinstance(value, dict | set) and not value:
        return type(value)
    if hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__code__, _plain(value.__defaults__), *map(_plain, cells)
    if callable(value) and not isinstance(value, nn.Module) and value.__hash__:
        return value
    raise _UnknownError
