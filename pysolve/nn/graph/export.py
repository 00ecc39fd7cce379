"""A network as a graph of tensor operators, by torch.export."""

from __future__ import annotations

import inspect
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.distributions import Distribution
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from pysolve.errors import PysolveError
from pysolve.nn.hooks import acting_hooks
from pysolve.nn.outputs import tensors_of
from pysolve.nn.overrides import Args, Kwargs
from pysolve.nn.refusal import code_line, of_torch, output_of, sentence
from pysolve.nn.running import Batch, Inputs, arguments, evaluating, few_samples, in_training, same_draws

# An operator's argument or result: a tensor or what stands for it, several of them, or a plain value.
Value: TypeAlias = Any
# torch traces one network at a time, and what is printed meanwhile is the whole process's.
_TRACING = threading.RLock()
# More samples than any batch has.
_MANY = 2**40
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
    shared : set of int
        Which of them hold no samples, but the same for all.
    """

    module: GraphModule
    parameters: Mapping[Node, str]
    constants: Mapping[Node, Value]
    inputs: tuple[Node, ...]
    shared: frozenset[int]
    _keys: tuple[str, ...]
    _layers: tuple[tuple[nn.Module, int], ...]

    @property
    def takes_any_batch(self) -> bool:
        """Whether the number of samples is free."""
        values = [node.meta.get("val") for i, node in enumerate(self.inputs) if i not in self.shared]
        sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim]
        return all(admits(size, count) for size in sizes for count in (2, _MANY))

    def is_of(self, model: nn.Module) -> bool:
        """Whether this network was traced: the same layer objects, with as many hooks."""
        return self._layers == _layers(model)

    @property
    def used(self) -> set[str]:
        """State-dict names of the parameters and buffers that an operator reads."""
        return {name for node, name in self.parameters.items() if node.users}

    def bind(self, batch: Batch) -> dict[Node, Value]:
        """Values of the input placeholders for one batch."""
        args, kwargs = arguments(batch)
        if set(kwargs) != set(self._keys):
            raise PysolveError(f"a batch has {sorted(kwargs)}, but the first one had {sorted(self._keys)}.")
        leaves = pytree.tree_leaves((args, {key: kwargs[key] for key in self._keys}))
        return dict(zip(self.inputs, leaves, strict=True))


def admits(size: object, count: int) -> bool:
    """Whether a graph stands for ``count`` in the place of a size of its example.

    Where the code compares a size, as in  ``if x.shape[0] > 10``,  the graph holds one of the branches.
    """
    if not isinstance(size, torch.SymInt):
        return bool(size == count)
    fixed = size.node.maybe_as_int()
    bounds = size.node.shape_env.var_to_range.get(size.node.expr)
    if fixed is not None or bounds is None:
        return fixed is None or fixed == count
    # torch.export takes sizes of 0 and 1 for special everywhere, whatever the code does.
    return bool(bounds.upper >= count and (bounds.lower <= 2 or bounds.lower <= count))


def trace(
    model: nn.Module,
    batch: Batch,
    *,
    free_sizes: bool = True,
    every_size: bool = False,
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
        Leave the number of samples free to change where the code does, so that other batches fit the graph.
    every_size : bool
        Leave all sizes free: of images that differ, of texts. Of deep networks that halve their images this
        takes minutes, or fails.
    fixed_sizes : bool
        Where that is not tried or fails: make a graph for this batch alone, which takes a fraction of the
        time.
    training : bool
        In training mode instead.

    Raises
    ------
    DataError
        When the network itself refuses the batch.
    PysolveError
        When torch.export cannot follow the network: names the line.
    """
    args, kwargs = _several(batch) if free_sizes or training else arguments(batch)
    with _TRACING, (in_training if training else evaluating)(model):
        if not training:
            with _quiet(), same_draws(model):
                output_of(model, batch)
        with acting_hooks(model, batch), _exportable(model):
            free = [None if every_size else 1] * free_sizes + [0] * fixed_sizes
            program = _export(model, args, kwargs, free)
    signature = program.graph_signature
    given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {key: _first_name(model, name) for key, name in given.items()}
    constants = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_lifted_custom_objs}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    _drop_unread(program.graph_module, {placeholders[key] for key in names})
    return Graph(
        module=program.graph_module,
        parameters={placeholders[key]: name for key, name in names.items()},
        constants={placeholders[key]: program.constants[name] for key, name in constants.items()},
        inputs=tuple(node for key, node in placeholders.items() if key not in {*names, *constants}),
        shared=batch.shared if isinstance(batch, Inputs) else frozenset(),
        _keys=tuple(kwargs),
        _layers=_layers(model),
    )


def program_of(model: nn.Module, batch: Batch) -> ExportedProgram:
    """A network in evaluation mode as torch.export has it, for any number of samples where its code allows.

    Raises
    ------
    PysolveError
        When torch.export cannot follow the network: names the line.
    """
    with _TRACING, evaluating(model):
        return _export(model, *_several(batch), [1, 0])


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
        if not of_torch(file):
            return f"{Path(file).name}:{line}: {code.strip()}".removesuffix(": ")
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    return f"layer {stack[-1][0]}" if stack and stack[-1][0] else str(node.target)


def is_in_place(node: Node) -> bool:
    """Whether an operator writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _drop_unread(module: GraphModule, parameters: Set[Node]) -> None:
    """Take out operators whose results nothing reads: weights of attention that are returned and left.

    Not those of parameters, whose layers run and must fit their inputs, nor those in which values that are
    needed elsewhere meet these, and must fit them.
    """

    def needed(node: Node) -> bool:
        return len(node.users) > 1 or not parameters.isdisjoint(node.all_input_nodes)

    for node in reversed(module.graph.nodes):
        if node.users or not isinstance(node.target, OpOverload) or node.is_impure():
            continue
        # Random numbers that are drawn later would be others.
        draws = torch.Tag.nondeterministic_seeded in node.target.tags
        inputs = node.all_input_nodes
        meet = torch.Tag.pointwise in node.target.tags and len(inputs) > 1 and all(map(needed, inputs))
        if not draws and not meet and parameters.isdisjoint(inputs):
            module.graph.erase_node(node)


def _layers(model: nn.Module) -> tuple[tuple[nn.Module, int], ...]:
    """All layers and how many hooks each has."""
    return tuple((m, len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in model.modules())


def _several(batch: Batch) -> tuple[Args, Kwargs]:
    """Arguments of a batch, of one sample twice.

    torch.export takes a size of 1 for fixed, and batch norms do not train on one sample.
    """
    given = arguments(batch)
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if not all(t.ndim and len(t) == 1 for t in tensors):
        return given
    args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf.repeat_interleave(2, 0), given)
    return args, kwargs


def _first_name(model: nn.Module, name: str) -> str:
    """A parameter's name by the first name of its layer."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    return next(f"{first}.{leaf}" for first, one in model.named_modules() if one is layer).removeprefix(".")


def _export(model: nn.Module, args: Args, kwargs: Kwargs, free: Sequence[int | None]) -> ExportedProgram:
    """The first export that succeeds with so many leading dimensions free; None: all."""
    problem: Exception | None = None
    # By the names that forward has for them: what it takes as *args is one of these.
    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    for way in (nullcontext, _as_not_compiled):
        for dims in free:
            # torch.export marks the tensors that it is given, and takes them for free ever after.
            fresh = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            try:
                with _quiet(), _masks_as_given(), way():
                    return torch.export.export(
                        model, *fresh, dynamic_shapes=_dynamic(named, dims), strict=False
                    )
            # torch.export lets through whatever the network's code raises.
            except Exception as error:
                problem = problem if way is _as_not_compiled else error
        if type(problem).__module__.startswith("torch."):
            break
    assert problem is not None
    raise PysolveError(
        f"{type(model).__name__} cannot be traced{code_line(problem)}: {_reason(problem)}. Take out what "
        "depends on values or leaves torch, or give a list of Site, written by hand, instead."
    ) from problem


def _reason(problem: Exception) -> str:
    """What torch says, or means where it asks to be told of it."""
    said = sentence(problem)
    lifted = re.search(r"fake tensor in the exported .* attribute: (?:(.*)\.)?lifted_tensor", said)
    if lifted is None:
        return said
    where = f"`{lifted[1]}`" if lifted[1] else "its code"
    return f"{where} sets .data, or asks torch.autograd for gradients, which no graph can hold"


@contextmanager
def _as_not_compiled() -> Iterator[None]:
    """Code that asks whether it is compiled goes the way that it goes otherwise.

    Some networks make masks only where it is not, and fail without them.
    """
    names = ("is_compiling", "is_exporting")
    before = {name: getattr(torch.compiler, name) for name in names}
    for name in names:
        setattr(torch.compiler, name, lambda: False)
    try:
        yield
    finally:
        for name, asked in before.items():
            setattr(torch.compiler, name, asked)


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Torch's encoders and decoders take masks as they are, and do not look whether one is causal.

    Its values would decide that, which no graph can follow; the mask says the same.
    """
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = before


def _dynamic(given: Kwargs, dims: int | None) -> Kwargs | None:
    """The leading dimensions of every tensor to leave free, as torch.export wants them."""

    def free(value: object) -> dict[int, object] | None:
        return dict.fromkeys(range(value.ndim)[:dims], Dim.AUTO) if isinstance(value, Tensor) else None

    return pytree.tree_map(free, given) if dims != 0 else None


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
def _exportable(model: nn.Module) -> Iterator[None]:
    """Outputs as a tuple of tensors, whatever holds them, and no checks of values in distributions."""
    checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    handle = model.register_forward_hook(lambda _, given, output: tuple(tensors_of(output)))
    try:
        yield
    finally:
        handle.remove()
        Distribution.set_default_validate_args(checked)
