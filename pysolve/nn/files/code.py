"""A compressed network as plain Python: its original, made anew, with the smaller layers in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from io import BytesIO
from pprint import pformat
from textwrap import indent

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from pysolve.compressed import Compressed
from pysolve.errors import PysolveError, path_of
from pysolve.nn.batches.items import example_of
from pysolve.nn.graph.export import program_of
from pysolve.nn.outputs import tensors_of
from pysolve.nn.refusal import output_of, sentence
from pysolve.nn.running import Batch, device_of, evaluating
from pysolve.whole_files import replacing

_CODE = '''"""{about}

Needs torch and safetensors{more}; the weights are in {weights} beside this file.
"""

from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import nn
{imported}

def make() -> nn.Module:
    """The network, with random weights."""
{body}


def load(path: str | Path = Path(__file__).with_name("{weights}")) -> nn.Module:
    """The network with the weights in a file, in evaluation mode."""
    model = make()
    load_model(model, path)
    return model.eval()
'''
_PROGRAM = '''"""{about}

Needs torch alone: layers and weights are in {weights} beside this file.
"""

from pathlib import Path

import torch


def load(path: str | Path = Path(__file__).with_name("{weights}")) -> torch.nn.Module:
    """The network; it takes inputs like those that it was exported with."""
    return torch.export.load(path).module()
'''
# What the code calls its own.
_NAMES = {"Path", "load", "load_model", "make", "model", "nn", "torch"}
_PLAIN = (bool, int, float, str, type(None))


class _Beyond(Exception):
    """What code of this kind cannot say."""


@dataclass(frozen=True, eq=False)
class _Source:
    """Where the original comes from: a function that makes it, and the code that imports and calls it."""

    make: Callable[[], nn.Module]
    imported: str
    call: str


def export_code(
    compressed: Compressed,
    path: str | os.PathLike[str],
    *,
    make: str | Callable[[], nn.Module] | None = None,
    example_inputs: Batch | None = None,
) -> None:
    """Write a compressed network as Python code without pysolve, ``small.py``, and its weights beside it.

    The code makes the original and puts the smaller layers in, ``small.safetensors`` is the state dict, and
    ``small.load()`` returns the network. Where layers run in forms that PyTorch has no layer for (factored,
    sparse, quantised), or the original cannot be made again, the network is exported with
    ``example_inputs``, and ``load`` reads that program from ``small.pt2``.

    Parameters
    ----------
    compressed : Compressed
    path : str or path
        Ends in ``.py``. Files of the same names are replaced.
    make : str or callable, optional
        ``package.module:factory``, or that function or class itself: what makes the original without
        arguments. By default its class, if that can be imported and needs no arguments; an ``nn.Sequential``
        of PyTorch's layers is written out.
    example_inputs : one batch, optional
        As ``inspect`` takes it. Outputs of the network that the code makes are compared with it, too.

    Raises
    ------
    TypeError
        What is given is no result, or ``make`` no function.
    PysolveError
        The code does not make this network, and there are no example inputs to export it with.
    ValueError
        ``path`` does not end in ``.py``.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> ps.export_code(ps.compress(model, batches, keep=0.5, latency=False), "small.py")
    """
    path = path_of("path", path)
    if path.suffix != ".py":
        raise ValueError(f"path must end in .py, got {path}.")
    if not isinstance(compressed, Compressed):
        raise TypeError(
            f"compressed must be what compress or prune returned, got {type(compressed).__name__}."
        )
    if make is not None and not isinstance(make, str):
        if not callable(make) or not hasattr(make, "__qualname__"):
            raise TypeError(f'make must be "package.module:factory", or a function, got {make!r}.')
        make = f"{make.__module__}:{make.__qualname__}"
    model, kind = compressed.model, type(compressed.model).__name__
    batch = None if example_inputs is None else example_of(example_inputs)
    shares = ", ".join(
        f"{compressed.report.share(m):.1%} of the {name}"
        for m, name in (("params", "parameters"), ("macs", "MACs"))
        if m in compressed.report.before
    )
    about = f"{kind}, made smaller: {shares}." if shares else f"{kind}, made smaller."
    try:
        code = _code(model, make, about, path.with_suffix(".safetensors").name)
        made = _made(code)
        _compare(made, model)
        if batch is not None:
            _compare_outputs(made, model, batch)
    except _Beyond as why:
        if batch is None:
            raise PysolveError(
                f"plain code cannot make this {kind}: {why}. Give example_inputs to export it instead."
            ) from None
        program = program_of(model, batch)
        content = BytesIO()
        try:
            torch.export.save(program, content)
        # Whatever torch has no words for, such as classes of outputs that it does not know.
        except Exception as error:
            raise PysolveError(
                f"the exported program of {kind} cannot be written: {sentence(error)}. Let it return "
                "tensors, tuples and dicts, or give make=, a function that makes the original."
            ) from error
        with replacing(path.with_suffix(".pt2"), content.tell()) as part:
            part.write_bytes(content.getvalue())
        code = _PROGRAM.format(about=about, weights=path.with_suffix(".pt2").name)
    else:
        with replacing(path.with_suffix(".safetensors")) as part:
            save_model(model, str(part))
    with replacing(path) as part:
        part.write_text(code, "utf-8")


def _code(model: nn.Module, make: str | None, about: str, weights: str) -> str:
    """The module's code."""
    source = _source_of(model, make)
    if source is None:
        body, imported, more = f"return {_written(model)}", "", ""
    else:
        lines = [f"model = {source.call}", *_changes(model, source.make()), "return model"]
        body, imported = "\n".join(lines), f"\n{source.imported}\n"
        more = f", and {source.imported.split()[1]} for the code of its parts"
    dtypes = {tensor.dtype for tensor in model.parameters()}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        body += f".to({dtypes.pop()})"
    text = _CODE.format(
        about=about, more=more, weights=weights, imported=imported, body=indent(body, " " * 4)
    )
    return text if "torch." in body else text.replace("import torch\nfrom safe", "from safe")


def _source_of(model: nn.Module, make: str | None) -> _Source | None:
    """Where the original comes from; None for what is written out."""
    if make is None and type(model) is nn.Sequential:
        return None
    kind = type(model)
    module, _, name = make.partition(":") if make else (kind.__module__, "", kind.__qualname__)
    if module == "__main__" or "<locals>" in name:
        raise _Beyond(f"{name} cannot be imported; give make='package.module:factory'")
    try:
        factory = import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise _Beyond(f"{make or name} cannot be imported ({error})") from error
    if not callable(factory):
        raise _Beyond(f"{make} is no function")
    needed = [p for p in signature(factory).parameters.values() if p.default is p.empty]
    if any(p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in needed):
        raise _Beyond(f"{name} needs the arguments {', '.join(p.name for p in needed)}; give make=")
    outer, *inner = name.split(".")
    own = f"_{outer}" if outer in _NAMES else outer
    alias = "" if own == outer else f" as {own}"
    return _Source(factory, f"from {module} import {outer}{alias}", f"{'.'.join((own, *inner))}()")


def _changes(model: nn.Module, original: nn.Module) -> Iterator[str]:
    """Statements that put the smaller layers into the original."""
    before = dict(original.named_modules(remove_duplicate=False))
    replaced: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        old = before.get(name)
        if old is None or type(old) is not type(layer) or (_is_stock(layer) and _facts(old) != _facts(layer)):
            if not _is_stock(layer):
                raise _Beyond(f"{name or 'the network'} is a {type(layer).__name__} now")
            yield f'model.set_submodule("{name}", {_written(layer)})'
            replaced.add(name)
            continue
        target = f'model.get_submodule("{name}")' if name else "model"
        for leaf, value in layer.named_parameters(recurse=False):
            other = getattr(old, leaf, None)
            if not isinstance(other, Tensor) or other.shape != value.shape:
                yield f"{target}.{leaf} = nn.Parameter(torch.empty({tuple(value.shape)}))"
                replaced.add(name)
        for leaf, value in layer.named_buffers(recurse=False):
            other = getattr(old, leaf, None)
            if not isinstance(other, Tensor) or other.shape != value.shape:
                empty = f"torch.empty({tuple(value.shape)}, dtype={value.dtype})"
                yield f'{target}.register_buffer("{leaf}", {empty})'
        for leaf, value in _attributes(layer).items():
            if leaf in vars(old) and vars(old)[leaf] != value:
                yield f"{target}.{leaf} = {value!r}"
    first: dict[int, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        same = first.setdefault(id(value), name)
        if same != name and {owner, same.rpartition(".")[0]} & replaced:
            source, _, tied = same.rpartition(".")
            yield f'model.get_submodule("{owner}").{leaf} = model.get_submodule("{source}").{tied}'


def _is_stock(layer: nn.Module) -> bool:
    """Whether a layer is PyTorch's own, and what it prints is a call that makes it."""
    if not type(layer).__module__.startswith("torch.nn.modules") or not hasattr(nn, type(layer).__name__):
        return False
    return not [*layer.children()] or type(layer) is nn.Sequential


def _written(layer: nn.Module) -> str:
    """The call that makes a layer of PyTorch."""
    if not _is_stock(layer):
        raise _Beyond(f"it holds a {type(layer).__name__}")
    if type(layer) is nn.Sequential and any(n != str(i) for i, (n, _) in enumerate(layer.named_children())):
        raise _Beyond("its layers have names of their own, or are missing")
    if type(layer) is nn.Sequential:
        parts = "".join(_written(part) + ",\n" for part in layer)
        return f"nn.Sequential(\n{indent(parts, ' ' * 4)})"
    return f"nn.{layer!r}"


def _made(code: str) -> nn.Module:
    """The network that the code makes."""
    names: dict[str, object] = {"__file__": "small.py", "__name__": "small"}
    try:
        exec(compile(code, "small.py", "exec"), names)
        make = names["make"]
        assert callable(make)
        model = make()
    except Exception as error:
        raise _Beyond(f"the code for it fails ({type(error).__name__}: {error})") from error
    assert isinstance(model, nn.Module)
    return model


def _compare(made: nn.Module, model: nn.Module) -> None:
    """Refuse a network that differs from what it should be in anything but its values and modes."""
    found, wanted = (dict(one.named_modules(remove_duplicate=False)) for one in (made, model))
    for name in found.keys() | wanted.keys():
        one, other = found.get(name), wanted.get(name)
        if one is None or other is None or _facts(one) != _facts(other):
            raise _Beyond(f"{name or 'the network'} would differ from what it is")
    if _ties(made) != _ties(model):
        raise _Beyond("its layers share weights in another way")


def _compare_outputs(made: nn.Module, model: nn.Module, batch: Batch) -> None:
    """Refuse a network whose outputs are others, with the same weights."""
    made.load_state_dict(model.state_dict())
    with evaluating(made), evaluating(model):
        found, wanted = (tensors_of(output_of(one, batch, device_of(model))) for one in (made, model))
    if not all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)):
        raise _Beyond("its outputs would differ")


def _facts(layer: nn.Module) -> tuple[object, ...]:
    """Class, attributes, and tensors' shapes of one layer, without those in it."""
    tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    shapes = {name: (value.shape, value.dtype) for name, value in tensors}
    return type(layer), _attributes(layer), shapes, _rest(layer)


def _attributes(layer: nn.Module) -> dict[str, object]:
    """What a layer holds in plain values, which code can set."""
    return {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training" and _plain(v)}


def _rest(layer: nn.Module) -> dict[str, str]:
    """What a layer holds in objects of other kinds, as far as these show it."""
    rest = {k: v for k, v in vars(layer).items() if not k.startswith("_") and not _plain(v)}
    shown = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in rest.items()}
    return {k: pformat(v) for k, v in shown.items() if isinstance(v, Mapping | list | tuple | set)}


def _plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_plain, value)))


def _ties(model: nn.Module) -> set[frozenset[str]]:
    """Names that share a parameter."""
    groups: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
