"""A network as a graph of tensor operators, by torch.export."""

from __future__ import annotations

import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from pysolve.errors import PysolveError
from pysolve.nn.running import Batch, arguments, evaluating, few_samples, in_training, without_classes

_TORCH, _NN = Path(torch.__file__).parent, Path(__file__).parents[1]
# Where networks are called from, which is not where their errors come from.
_CALLERS = {str(_NN / name) for name in ("graph/export.py", "graph/sites.py", "running.py")}
# Layers of this package that stand for torch's.
_LAYERS = {str(_NN / "layers" / name) for name in ("sparse.py", "products.py")}
# A frame of a stack trace: file, line, and its code where that is known.
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*(?:\n(?!\s*File ")(.*))?')


@dataclass(frozen=True, eq=False)
class Graph:
    """The operators that a network runs, in order, with its parameters and inputs as placeholders.

    Parameters
    ----------
    module : GraphModule
        ``module.graph.nodes`` are the operators; ``node.meta["val"]`` the example's (fake) result.
    parameters : {placeholder: str}
        State-dict names of the placeholders that stand for parameters and buffers; of a layer that has
        several names, by the first.
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

    @property
    def takes_any_batch(self) -> bool:
        """Whether the number of samples is free."""
        values = [node.meta.get("val") for node in self.inputs]
        sizes: list[object] = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim]
        return all(isinstance(n, torch.SymInt) and n.node.maybe_as_int() is None for n in sizes)

    @property
    def used(self) -> set[str]:
        """State-dict names of the parameters and buffers that an operator reads."""
        return {name for node, name in self.parameters.items() if node.users}

    def bind(self, batch: Batch) -> dict[Node, Any]:
        """Values of the input placeholders for one batch."""
        args, kwargs = arguments(batch)
        if set(kwargs) != set(self._keys):
            raise PysolveError(f"a batch has {sorted(kwargs)}, but the first one had {sorted(self._keys)}.")
        leaves = pytree.tree_leaves((args, {key: kwargs[key] for key in self._keys}))
        return dict(zip(self.inputs, leaves, strict=True))


def trace(
    model: nn.Module,
    batch: Batch,
    *,
    free_sizes: bool = True,
    fixed_sizes: bool = True,
    training: bool = False,
) -> Graph:
    """Export a network in evaluation mode.

    Parameters
    ----------
    model : nn.Module
    batch : one batch
        In the forms that ``gather`` takes.
    free_sizes : bool
        Leave sizes free to change wherever the code does, so that other batches fit the graph.
    fixed_sizes : bool
        Where that is not tried or fails: make a graph for this batch alone, which takes a fraction of the
        time.
    training : bool
        In training mode instead.

    Raises
    ------
    PysolveError
        When torch.export cannot follow the network: names the line.
    """
    args, kwargs = arguments(batch)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if (free_sizes or training) and all(t.ndim and len(t) == 1 for t in tensors):
        # torch.export takes a size of 1 for fixed, and batch norms do not train on one sample.
        args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.repeat_interleave(2, 0), (args, kwargs))
    with (in_training if training else evaluating)(model), _without_cache(model), _without_classes(model):
        program = _export(model, args, kwargs, free_sizes, fixed_sizes)
    signature = program.graph_signature
    given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {key: _first_name(model, name) for key, name in given.items()}
    constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_lifted_custom_objs}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return Graph(
        module=program.graph_module,
        parameters={placeholders[key]: name for key, name in names.items()},
        constants={placeholders[key]: program.constants[name] for key, name in constants.items()},
        inputs=tuple(node for key, node in placeholders.items() if key not in {*names, *constants}),
        _keys=tuple(kwargs),
    )


def trace_once(model: nn.Module, batch: Batch) -> tuple[Graph, Batch]:
    """The graph of a network with free sizes, and the part of a batch that it was traced with.

    Two samples are enough, unless the network's code takes batches of one size alone.
    """
    few = few_samples(batch)
    if few is not batch:
        with suppress(PysolveError):
            graph = trace(model, few, fixed_sizes=False)
            if graph.takes_any_batch:
                return graph, few
    return trace(model, batch), batch


def where(node: Node) -> str:
    """The line of the network's code that a node comes from: ``file:line: code``."""
    frames = _FRAME.findall(node.stack_trace or "")
    for file, line, code in reversed(frames):
        if not _of_torch(file):
            return f"{Path(file).name}:{line}: {code.strip()}".removesuffix(": ")
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    return f"layer {stack[-1][0]}" if stack and stack[-1][0] else str(node.target)


def code_line(error: BaseException) -> str:
    """The innermost line outside of torch that an error comes from, in brackets; nothing if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _of_torch(frame.filename) and frame.filename not in _CALLERS:
            return f" ({Path(frame.filename).name}:{frame.lineno}: {frame.line})"
    return ""


def _first_name(model: nn.Module, name: str) -> str:
    """A parameter's name by the first name of its layer."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    return next(f"{first}.{leaf}" for first, one in model.named_modules() if one is layer).removeprefix(".")


def _of_torch(file: str) -> bool:
    return file.startswith(str(_TORCH)) or file in _LAYERS


def _export(model: nn.Module, args: Any, kwargs: Any, free_sizes: bool, fixed_sizes: bool) -> ExportedProgram:
    def free(value: Any) -> Any:
        return dict.fromkeys(range(value.ndim), Dim.AUTO) if isinstance(value, Tensor) else None

    dynamic = pytree.tree_map(free, args or kwargs)
    problem: Exception | None = None
    for attempt in [dynamic] * free_sizes + [None] * fixed_sizes:
        try:
            with _quiet():
                return torch.export.export(model, args, kwargs, dynamic_shapes=attempt, strict=False)
        # torch.export lets through whatever the network's code raises.
        except Exception as error:
            problem = error
    assert problem is not None
    what = next(filter(None, map(str.strip, str(problem).splitlines())), repr(problem)).rstrip(".")
    raise PysolveError(
        f"{type(model).__name__} cannot be traced{code_line(problem)}: {what}. Take out what depends on "
        "values or leaves torch, or give a list of Site, written by hand, instead."
    ) from problem


@contextmanager
def _quiet() -> Iterator[None]:
    """No prints, warnings and log messages from tracing: what goes wrong is in the error."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _without_classes(model: nn.Module) -> Iterator[None]:
    """Outputs in dataclasses, which torch.export refuses, are mappings here."""
    handle = model.register_forward_hook(lambda module, args, output: without_classes(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Hugging Face decoders return a cache object, which torch.export cannot; they run without it here."""
    config: Any = getattr(model, "config", None)
    with ExitStack() as stack:
        if getattr(config, "use_cache", False):
            stack.callback(setattr, config, "use_cache", config.use_cache)
            config.use_cache = False
        yield
