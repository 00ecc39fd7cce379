"""One operator call of a network, with labels in the place of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Node

from pysolve.nn.gathering.products import Product, product
from pysolve.nn.graph.classes import Attended, Ledger, along, complete, labelled, lean, squashed
from pysolve.nn.graph.export import Value, where
from pysolve.nn.layer_kinds import CONVOLUTIONS, inputs_first, plain
from pysolve.plan import Norm

# Labels of an operator's result: one tensor of them or several.
Labels: TypeAlias = Tensor | list[Tensor]

# Operators that swap the two dimensions of a matrix, with their arguments.
_TURNS: list[tuple[object, ...]] = [
    ("transpose", 0, 1),
    ("transpose", 1, 0),
    ("transpose", -1, -2),
    ("transpose", -2, -1),
]
_TURNS += [("permute", [1, 0])]
# Operators that leave values as they are, and that pick some along a dimension.
_SAME = {"to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "requires_grad"}
_ALONG = {"select", "slice", "index_select", "unbind", "narrow"}
# Operators that fill a value with one number, and those that leave it so.
_FILLED = {f"{kind}{name}" for name in ("zeros", "ones", "full") for kind in ("", "new_")}
_FILLED |= {"zeros_like", "ones_like", "full_like"}
_STILL = {"expand", "broadcast_to", "repeat", "view", "reshape", "unsqueeze", "squeeze", "to", "_to_copy"}


@dataclass(frozen=True, eq=False)
class Network:
    """Data about the network that rules read, and their findings.

    Parameters
    ----------
    modules : {str: Module}
        Under all their names.
    names : {Module: str}
        The first name of each.
    state : {str: Tensor}
        Parameters and buffers.
    ties : {Module: str}
        For a module that shares values with another one, their name there.
    twins : {Module: tuple of Module}
        Layers that share their weight, and nothing else, with other ones.
    parameters : {Node: str}
        State-dict names of the nodes of parameters and buffers; grows with inner graphs.
    unseen : collection of str
        Of a graph in training mode: the names that the graph in evaluation mode does not use.
    opaque : {Node: str}
        Operators without a rule, and their names.
    elsewhere : {layer: str}
        Layers whose parameters are used outside of them, and where.
    trained : list of (labels, str)
        Labels that meet an unseen parameter, and where.
    lines : {Node: int}
        Of views that lay channels out in a grid: the dimension along which they must stay together, the first
        or the last of those along which labels vary (0, −1).
    grids : {Node: labels}
        Of all such views.
    norms : {weight: Norm}
        Norms over all channels of a value.
    inner : bool
        Follow the dimensions of attention heads instead of whole heads.
    scored : {Node: (labels, labels)}
        Products of queries and keys, where their dimensions are followed.
    attended : list of Attended
        Attention, where its dimensions are followed.
    ledger : Ledger
    """

    modules: Mapping[str, nn.Module]
    names: Mapping[nn.Module, str]
    state: Mapping[str, Tensor]
    ties: Mapping[nn.Module, str]
    twins: Mapping[nn.Module, tuple[nn.Module, ...]]
    parameters: dict[Node, str]
    unseen: Collection[str] = ()
    opaque: dict[Node, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    trained: list[tuple[Tensor, str]] = field(default_factory=list)
    lines: Mapping[Node, int] = field(default_factory=dict)
    grids: dict[Node, Tensor] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    inner: bool = False
    scored: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attended: list[Attended] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call, with labels where the network has tensors and numbers where it has sizes.

    Parameters
    ----------
    node : Node
    args, sources : {name: value}
        Arguments by the names of the operator's schema, defaults included, and the graph's nodes or values in
        their places.
    given : (tuple, dict)
        Positional and keyword arguments as they were given.
    result : Tensor or list of Tensor
        Labels of no channel in the shape of the result.
    network : Network
    """

    node: Node
    args: Mapping[str, Value]
    sources: Mapping[str, Value]
    given: tuple[tuple[Value, ...], Mapping[str, Value]]
    result: Value
    network: Network

    @property
    def name(self) -> str:
        """The operator's name, without the underscore of in-place ones."""
        return operator_name(self.node)

    @property
    def first(self) -> Tensor:
        """Labels of the first argument."""
        value: Tensor = next(iter(self.args.values()))
        return value

    @property
    def ledger(self) -> Ledger:
        """The network's ledger of labels."""
        return self.network.ledger

    @property
    def tensors(self) -> list[tuple[Tensor, Node]]:
        """Labels of all tensor arguments, and their nodes."""
        found: list[tuple[Tensor, Node]] = []
        for name, value in self.args.items():
            source = self.sources[name]
            pairs = zip(value, source, strict=True) if isinstance(value, list | tuple) else [(value, source)]
            found += [(one, node) for one, node in pairs if isinstance(one, Tensor)]
        return found

    @property
    def module(self) -> nn.Module | None:
        """The innermost module whose forward makes this call."""
        stack = [*self.node.meta.get("nn_module_stack", {}).values()]
        return self.network.modules.get(stack[-1][0].partition("@")[0]) if stack else None

    def says(self, text: str) -> str:
        """A reason: what the operator does, and the line of the network's code."""
        return f"{self.name} {text} ({where(self.node)})"

    def opaque(self, reason: str) -> Labels:
        """Pin all channels of the arguments; the result has none."""
        self.network.opaque[self.node] = self.name
        for value, _ in self.tensors:
            self.ledger.pin(value, reason)
        result: Labels = self.result
        return result


def operator_name(node: Node) -> str:
    """Name of an operator without namespace, overload and the underscore of in-place ones."""
    schema = getattr(node.target, "_schema", None)
    name = str(schema.name if schema else getattr(node.target, "__name__", node.target)).split("::")[-1]
    return name if name.endswith("__") else name.removesuffix("_")


def product_of(node: Node) -> Product | None:
    """What a node multiplies with a weight."""
    return product(operator_name(node), node.args, node.kwargs)


def stored(node: Node) -> tuple[Node, bool]:
    """The node whose dimensions a node swaps, and whether it swaps any."""
    name, rest = operator_name(node), node.args[1:]
    turns = name in ("t", "numpy_T", "mT") or (name, *rest) in _TURNS
    source = node.args[0] if turns and isinstance(node.args[0], Node) else None
    return (node, False) if source is None else (source, True)


def is_of(call: Product, layer: nn.Module, weight: Node) -> bool:
    """Whether an operator is a layer's, with the layer's weight the way round that it is stored."""
    if not isinstance(call.weight, Node) or not call.of(layer):
        return False
    own, turned = (call.weight, False) if call.weight is weight else stored(call.weight)
    linear = not isinstance(layer, CONVOLUTIONS)
    return own is weight and turned == (linear and call.takes_inputs_first != inputs_first(layer))


def stack_of(call: Call, node: object) -> tuple[str, bool] | None:
    """Name of the parameter whose matrices a value holds, all or some, and whether it swaps their dimensions.

    A matrix, or several of them, of the network's own, not the weight of a layer, which has no other name.
    """
    if not isinstance(node, Node):
        return None
    node, turned = holder(node)
    name = call.network.parameters.get(node, "")
    tensor = call.network.state.get(name)
    if not isinstance(tensor, nn.Parameter) or tensor.ndim < 2 or not is_own(call.network, name):
        return None
    owner = call.network.modules[name.rpartition(".")[0]]
    added = plain(owner) is type(owner) or getattr(owner, "weight", None) is not tensor
    return (name, turned) if added else None


def holder(node: Node) -> tuple[Node, bool]:
    """The value whose matrices a node holds, all or some of them, and whether it swaps their dimensions."""
    turned = False
    while node.args and isinstance(node.args[0], Node):
        swaps = _swaps(node)
        if not swaps and not _picks_matrices(node):
            break
        node, turned = node.args[0], turned ^ swaps
    return node, turned


def _swaps(node: Node) -> bool:
    """Whether a node swaps the last two dimensions of its operand."""
    name, value = operator_name(node), node.meta.get("val")
    if name in ("t", "numpy_T", "mT", "adjoint"):
        return True
    if not isinstance(value, Tensor) or name not in ("transpose", "swapaxes", "swapdims", "permute"):
        return False
    given: Value = node.args[1] if name == "permute" else node.args[1:]
    dims, n = [dim % value.ndim for dim in given], value.ndim
    return dims == [*range(n - 2), n - 1, n - 2] if name == "permute" else {*dims} == {n - 2, n - 1}


def _picks_matrices(node: Node) -> bool:
    """Whether a node holds whole matrices of its operand, one, some or all of them."""
    name, given = operator_name(node), node.args
    if name in _SAME or name == "getitem":
        return True
    value = given[0].meta.get("val") if given and isinstance(given[0], Node) else None
    if not isinstance(value, Tensor) or name not in {"index", *_ALONG}:
        return False
    where: Value = given[1] if len(given) > 1 else 0
    return len(where) <= value.ndim - 2 if name == "index" else where % value.ndim < value.ndim - 2


def is_own(network: Network, name: str) -> bool:
    """Whether a tensor is of the network's own, not a layer's of torch, and is no other one as well."""
    owner, place = network.modules[name.rpartition(".")[0]], network.state[name].data_ptr()
    lists = nn.ParameterList | nn.ParameterDict
    if type(owner).__module__.startswith("torch.") and not isinstance(owner, lists):
        return False
    same = [other for other, tensor in network.state.items() if tensor.data_ptr() == place]
    return len({(network.modules[o.rpartition(".")[0]], o.rpartition(".")[2]) for o in same}) == 1


def pointwise(call: Call) -> Tensor:
    """Labels of an elementwise function of all tensor arguments."""
    return meet(call, call.tensors)


def meet(call: Call, operands: list[tuple[Tensor, Node]]) -> Tensor:
    """Unite labels that meet, and pin those that meet values without channels, unless these are broadcast.

    Channels that all meet every channel of a larger value stay, as one gate or score of positions does, or
    the factor of an outer product; those of the larger value can go one by one.
    """
    ndim = max((value.ndim for value, _ in operands), default=0)
    aligned = [value[(None,) * (ndim - value.ndim)] for value, _ in operands]
    for fixed, (_, node) in zip(aligned, operands, strict=True):
        # One number everywhere may be as wide as the code makes it, which a trial tells.
        if not complete(fixed) and (not is_filled(node) or _writes_into_view(call, node)):
            for value in aligned:
                if value is not fixed and labelled(value):
                    _pin_fixed(call, value, fixed, node)
    beside = _beside_the_largest(aligned)
    several = [value for i, (value, _) in enumerate(operands) if i not in beside]
    if not beside:
        return call.ledger.unite(*several, reason=call.says("mixes these channels"))
    for i in beside:
        one = squashed(lean(aligned[i])).numel() == 1
        call.ledger.pin(
            aligned[i],
            call.says("reads it for several channels" if one else "mixes these channels with others"),
        )
    shape = torch.broadcast_shapes(*(value.shape for value, _ in operands))  # type: ignore[no-untyped-call]
    return call.ledger.unite(*several, reason=call.says("mixes these channels")).expand(shape)


def _writes_into_view(call: Call, node: Node) -> bool:
    """Whether an operator writes into a view: the value itself, which has no channels, is used later."""
    mutable = call.node.target._schema.is_mutable  # type: ignore[union-attr]
    return mutable and node is call.tensors[0][1] and operator_name(node) not in _FILLED


def is_filled(node: Node) -> bool:
    """Whether a value is one number at all places."""
    while operator_name(node) not in _FILLED:
        before = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
        still = operator_name(node) in _STILL or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not still or len(before) != 1:
            return False
        node = before[0]
    return True


def _beside_the_largest(aligned: list[Tensor]) -> list[int]:
    """Which values vary along none of the dimensions along which the one with most channels does."""
    cores = {i: squashed(lean(value)) for i, value in enumerate(aligned) if labelled(value)}
    varying = {i: {dim for dim, size in enumerate(core.shape) if size > 1} for i, core in cores.items()}
    largest = max(cores, key=lambda i: cores[i].numel(), default=None)
    if largest is None or not varying[largest]:
        return []
    return [i for i, dims in varying.items() if not dims & varying[largest]]


def _pin_fixed(call: Call, value: Tensor, fixed: Tensor, node: Node) -> None:
    core = squashed(value)
    dims = [dim for dim, size in enumerate(fixed.shape) if size > 1 and core.shape[dim] > 1]
    if dims:
        reason = f"{origin(call, node)} meets these channels directly ({where(call.node)})"
        name = source(call, node)
        for dim in dims:
            blamed = [(name, fixed.shape[dim])] if name else ()
            call.ledger.pin_varying(core, (dim,), reason, among=squashed(fixed) < 0, blamed=blamed)
    schema = call.node.target._schema  # type: ignore[union-attr]
    if schema.is_mutable and node is call.tensors[0][1]:
        call.ledger.pin(value, call.says("writes them over values that have no channels"))


def origin(call: Call, node: Node) -> str:
    """What a value without channels comes from: the nearest parameter or operator without a rule."""
    found = _before(call, node)
    if found in call.network.parameters:
        name = call.network.parameters[found]
        kind = "parameter" if isinstance(call.network.state[name], nn.Parameter) else "buffer"
        return f"the {kind} `{name}`"
    return "an input or constant" if found is None else f"the result of {call.network.opaque[found]}"


def source(call: Call, node: Node) -> str | None:
    """Name of the nearest parameter or buffer before a value without channels."""
    found = _before(call, node)
    return None if found is None else call.network.parameters.get(found)


def _before(call: Call, node: Node) -> Node | None:
    """The nearest parameter, buffer or operator without a rule before a value."""
    queue, seen = [node], {node}
    for one in queue:
        if one in call.network.parameters or one in call.network.opaque:
            return one
        # Of what is filled with one number, values before it give but the type.
        inputs = [] if operator_name(one) in _FILLED else one.all_input_nodes
        new = [before for before in inputs if before not in seen]
        seen.update(new)
        queue.extend(new)
    return None


def read_along(call: Call, x: Tensor, dim: int) -> Tensor:
    """(n,) labels along one dimension of a value; those at its other positions go with them."""
    reason = f"channel labels differ across positions ({where(call.node)})"
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    call.ledger.mix(x, others, reason, wildcard=True)
    return along(x, dim)
