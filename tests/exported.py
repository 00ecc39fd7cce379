"""Exports of networks of one structure, made once: most of the time of the tests would go into them."""

from types import BuiltinFunctionType, FunctionType

import torch
from small import Net
from torch import nn
from torch.utils import _pytree as pytree

import pysolve.nn.graph.export
from pysolve.nn import zoo

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, BuiltinFunctionType)


class _Unknown(Exception):
    """Something whose part in the graph cannot be told."""


def shared(export):
    """``export`` with one result for all networks of one structure and inputs of one shape."""
    known = {}

    def exported(model, args, kwargs, free_sizes):
        try:
            key = _structure(model), _shapes((args, kwargs)), free_sizes, torch.is_grad_enabled()
        except _Unknown:
            return export(model, args, kwargs, free_sizes)
        if key not in known:
            program = export(model, args, kwargs, free_sizes)
            if program.constants:
                return program
            known[key] = program
        return known[key]

    return exported


def share_exports(monkeypatch):
    export = pysolve.nn.graph.export
    monkeypatch.setattr(export, "_export", shared(export._export))


def _shapes(inputs):
    leaves, spec = pytree.tree_flatten(inputs)
    return str(spec), *(_tensor(leaf) if isinstance(leaf, torch.Tensor) else _value(leaf) for leaf in leaves)


def _tensor(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _structure(model):
    """All that code of a network depends on but for numbers in tensors, which it may not depend on."""
    modules = {id(module): i for i, module in enumerate(model.modules())}
    tensors, parts = {}, []
    for module in model.modules():
        if not _is_known(type(module)):
            raise _Unknown
        own = [(name, modules.get(id(child))) for name, child in module._modules.items()]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                own.append((name, tensors.setdefault(id(tensor), len(tensors)), *_tensor(tensor)))
        held = {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}
        if any(value for name, value in vars(module).items() if "_hooks" in name):
            raise _Unknown
        rest = sorted((name, _value(value)) for name, value in held.items())
        parts.append((type(module), module.training, *own, *rest))
    return tuple(parts)


def _is_known(kind):
    """Whether code of a network's class depends on nothing but what an instance holds."""
    return kind is Net or kind.__module__.startswith("torch.nn.modules.") or kind.__module__ == zoo.__name__


def _value(value):
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, tuple | list):
        return type(value).__name__, *map(_value, value)
    if isinstance(value, FunctionType):
        around = [cell.cell_contents for cell in value.__closure__ or ()]
        # Lists around a function are what it writes to.
        if value.__kwdefaults__ or any(isinstance(one, list) for one in around):
            raise _Unknown
        code = value.__code__
        return code, code.co_filename, _value(value.__defaults__), *map(_value, around)
    raise _Unknown
