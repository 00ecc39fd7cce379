"""A network as a graph of tensor operators, by torch.export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from pysolve.errors import PysolveError
from pysolve.nn.network import arguments, evaluating


@dataclass(frozen=True, eq=False)
class Graph:
    """The operators that a network runs, in order, with its parameters and inputs as placeholders.

    Parameters
    ----------
    module : GraphModule
        ``module.graph.nodes`` are the operators; ``node.meta["val"]`` the example's (fake) result.
    parameters : {placeholder: str}
        State-dict names of the placeholders that stand for parameters and buffers.
    constants : {placeholder: tensor}
        What the placeholders hold that are neither parameters nor inputs.
    inputs : tuple of Node
        The placeholders of the user's inputs, in order.
    """

    module: GraphModule
    parameters: Mapping[Node, str]
    constants: Mapping[Node, Any]
    inputs: tuple[Node, ...]
    _keys: tuple[str, ...]

    def bind(self, batch: Any) -> dict[Node, Any]:
        """Values of the input placeholders for one batch."""
        args, kwargs = arguments(batch)
        if set(kwargs) != set(self._keys):
            raise PysolveError(f"a batch has {sorted(kwargs)}, but the first one had {sorted(self._keys)}.")
        leaves = pytree.tree_leaves((args, {key: kwargs[key] for key in self._keys}))
        return dict(zip(self.inputs, leaves, strict=True))


def trace(model: nn.Module, batch: Any) -> Graph:
    """Export a network in evaluation mode, with sizes free to change wherever the code leaves them free.

    Parameters
    ----------
    model : nn.Module
    batch : one batch
        In the forms that ``gather`` takes.

    Raises
    ------
    PysolveError
        When torch.export cannot follow the network: names the line.
    """
    args, kwargs = pytree.tree_map(_at_least_two(batch), arguments(batch))
    with evaluating(model), _without_cache(model):
        program = _export(model, args, kwargs)
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_lifted_custom_objs}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return Graph(
        module=program.graph_module,
        parameters={placeholders[key]: name for key, name in names.items()},
        constants={placeholders[key]: program.constants[name] for key, name in constants.items()},
        inputs=tuple(node for key, node in placeholders.items() if key not in {*names, *constants}),
        _keys=tuple(kwargs),
    )


def where(node: Node) -> str:
    """The line of the network's code that a node comes from: ``file:line: code``."""
    lines = [line.strip() for line in (node.stack_trace or "").strip().splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith("File ") and "/torch/nn/" not in line]
    if not places:
        return str(node.target)
    file, line = lines[places[-1]].split('"')[1], lines[places[-1]].split("line ")[1].split(",")[0]
    code = lines[places[-1] + 1] if places[-1] + 1 < len(lines) else ""
    return f"{file.rpartition('/')[2]}:{line}: {code}".removesuffix(": ")


def _export(model: nn.Module, args: Any, kwargs: Any) -> ExportedProgram:
    def free(value: Any) -> Any:
        return dict.fromkeys(range(value.ndim), Dim.AUTO) if isinstance(value, Tensor) else None

    shapes = pytree.tree_map(free, {**{f"*{i}": a for i, a in enumerate(args)}, **kwargs})
    dynamic = (*(shapes.pop(f"*{i}") for i in range(len(args))),) if args and not kwargs else shapes
    problem: Exception | None = None
    for attempt in (dynamic, None):
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=attempt, strict=False)
        except Exception as error:
            problem = error
    raise PysolveError(f"{type(model).__name__} cannot be traced: {_summary(problem)}") from problem


def _summary(problem: Exception | None) -> str:
    """What went wrong in one line, and in which line of the network's code."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    trail = problem.__traceback__ if problem else None
    place = ""
    while trail:
        file = trail.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<") and not __file__.endswith(file):
            place = f" ({file.rpartition('/')[2]}:{trail.tb_lineno})"
        trail = trail.tb_next
    return (lines[0] if lines else repr(problem)) + place


def _at_least_two(batch: Any) -> Any:
    """torch.export takes a size of 1 for fixed, so a batch of one sample is doubled."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments(batch)) if isinstance(leaf, Tensor)]
    single = bool(tensors) and all(t.ndim and len(t) == 1 for t in tensors)
    return lambda leaf: leaf.repeat_interleave(2, 0) if single and isinstance(leaf, Tensor) else leaf


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Hugging Face decoders return a cache object, which torch.export cannot; they run without it here."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before
