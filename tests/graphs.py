"""One graph for all networks of one structure: to trace a small network takes longer than all the rest.

What verbs find in a graph and count of a network's calls is shared by those of the same values, too.
"""

import hashlib
import sys
import weakref
from itertools import chain
from traceback import FrameSummary, StackSummary

import pytest
import torch
from torch import Tensor, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree
from torch.utils._traceback import CapturedTraceback

from pysolve.errors import PysolveError
from pysolve.nn.cost import counting
from pysolve.nn.graph import export, sites
from pysolve.nn.graph.export import Graph
from pysolve.nn.running import Inputs, arguments

_GRAPHS, _SITES, _CALLS = {}, {}, {}
# As they are before anything stands in their place.
_trace, _export = export.trace, export._export
_sites_in, _calls = sites.sites_in, counting.calls
_extract = CapturedTraceback.extract


_PLAIN = Tensor, nn.Parameter


class _UnknownError(Exception):
    """Something whose part in the graph cannot be told."""


def traced(model, batch, *, fixed_sizes=True, **options):
    """``trace``, but of networks of one structure the first alone is traced."""
    try:
        asked = _structure(model), _shapes(batch), tuple(sorted(options.items()))
    except _UnknownError:
        return _trace(model, batch, fixed_sizes=fixed_sizes, **options)
    key, other = (*asked, fixed_sizes), _GRAPHS.get((*asked, not fixed_sizes))
    if key not in _GRAPHS and isinstance(other, Graph) and other.takes_any_batch:
        # Free sizes are tried first, in any case.
        _GRAPHS[key] = other
    if key not in _GRAPHS:
        try:
            _GRAPHS[key] = _trace(model, batch, fixed_sizes=fixed_sizes, **options)
        except PysolveError as error:
            # What the network itself refuses may depend on values.
            if type(error) is PysolveError:
                _GRAPHS[key] = error.args
            raise
    if isinstance(_GRAPHS[key], tuple):
        raise PysolveError(*_GRAPHS[key])
    return _GRAPHS[key]


class _Stack(CapturedTraceback):
    """The frames below an export; torch lists those of pytest as well, with the code of all of them."""

    __slots__ = ()

    @staticmethod
    def extract(*, script=False, cpp=False, skip=0):
        if script or cpp:
            return _extract(script=script, cpp=cpp, skip=skip)
        frame, found = sys._getframe(1 + skip), []
        while frame is not None and frame.f_code is not exported.__code__:
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return _Stack(found)

    def summary(self):
        frames = reversed(self.tb or ())
        return StackSummary.from_list([FrameSummary(*frame, lookup_line=False) for frame in frames])


def exported(*given):
    """``_export``; torch writes down the stack at each operator, and the code of graphs on their way."""
    with pytest.MonkeyPatch.context() as patch, _use_lazy_graph_module(True):
        patch.setattr(CapturedTraceback, "extract", _Stack.extract)
        return _export(*given)


def sites_in(model, graph, batch, *, ignore=(), heads=False):
    """``sites_in``, but of equal networks of one graph those of the first."""
    try:
        key = graph, heads, _content(model, batch), _plain(tuple(ignore), {})
    except _UnknownError:
        return _sites_in(model, graph, batch, ignore=ignore, heads=heads)
    if key not in _SITES:
        _SITES[key] = _sites_in(model, graph, batch, ignore=ignore, heads=heads)
    return [*_SITES[key]]


def calls(model, batch):
    """``calls``, but equal networks are counted once."""
    try:
        key = _content(model, batch)
    except _UnknownError:
        return _calls(model, batch)
    if key not in _CALLS:
        _CALLS[key] = _calls(model, batch)
    return [*_CALLS[key]]


def _content(model, batch):
    """A network with its values and a batch, as a key."""
    digest = hashlib.blake2b()
    held = [(*module._parameters.values(), *module._buffers.values()) for module in model.modules()]
    for one in (*chain(*held), *pytree.tree_leaves(arguments(batch))):
        if isinstance(one, Tensor):
            if one.device.type != "cpu" or one.layout is not torch.strided or type(one) not in _PLAIN:
                raise _UnknownError
            digest.update(one.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return _structure(model), _shapes(batch), digest.digest()


def _shapes(batch):
    leaves, form = pytree.tree_flatten(arguments(batch))
    shared = batch.shared if isinstance(batch, Inputs) else None
    return (
        *(str(form), shared),
        *((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in leaves),
    )


def _structure(model):
    """All of a network but its values: classes, code, plain attributes, shapes, and what is shared."""
    found, numbers = [], {}
    modules = [*model.named_modules(remove_duplicate=False)]
    for name, module in modules:
        own = (*module._parameters.items(), *module._buffers.items())
        found.append((name, type(module), numbers.setdefault(id(module), len(numbers))))
        found += [(key, _tensor(value, numbers)) for key, value in own]
    for _, module in modules:
        hidden = {"_parameters", "_buffers", "_modules", "training"}
        found += [(key, _plain(value, numbers)) for key, value in vars(module).items() if key not in hidden]
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


def _plain(value, numbers):
    if value is None or isinstance(value, bool | int | float | str | type):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *(_plain(one, numbers) for one in value)
    if isinstance(value, set):
        return type(value), frozenset(_plain(one, numbers) for one in value)
    # Hooks may do anything.
    if isinstance(value, dict) and not any(map(callable, value.values())):
        return type(value), *((key, _plain(one, numbers)) for key, one in value.items())
    if isinstance(value, weakref.ref):
        return weakref.ref, _plain(value(), numbers)
    if hasattr(value, "to_json_string"):
        # A configuration of transformers; how attention and experts run is not among its fields.
        hidden = [getattr(value, f"_{name}_implementation", None) for name in ("attn", "experts")]
        return type(value), value.to_json_string(use_diff=False), *hidden
    # Of other tensors the values are in the graph.
    if id(value) in numbers:
        return numbers[id(value)]
    if hasattr(value, "__code__"):
        cells = [_plain(cell.cell_contents, numbers) for cell in value.__closure__ or ()]
        return value.__module__, value.__code__, _plain(value.__defaults__, numbers), *cells
    if callable(value) and not isinstance(value, nn.Module) and value.__hash__:
        return value
    raise _UnknownError
