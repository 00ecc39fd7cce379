"""Label rules of layers: Linear layers and convolutions read and write labels, norms pass them on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from pysolve.nn.graph.calls import (
    Call,
    Labels,
    is_of,
    meet,
    operator_name,
    product_of,
    read_along,
    source,
    stack_of,
    stored,
)
from pysolve.nn.graph.classes import along, complete, labelled, lean, spread, squashed
from pysolve.nn.graph.export import where
from pysolve.nn.graph.norms import through_norm
from pysolve.nn.graph.operators import Rule, biased_matmul, einsum, matmul, pool
from pysolve.nn.layer_kinds import CONVOLUTIONS, LINEAR, PADS, WHOLE_NORMS, plain, sides
from pysolve.nn.layers.base import weight_of
from pysolve.nn.layers.masking import permanent_by

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def linear(call: Call) -> Labels:
    """Reads the last dimension and writes it."""
    if (stack := stack_of(call, call.sources["weight"])) is not None:
        return _stacked(call, stack, call.tensors[0], -1, "oi", call.tensors[2:])
    return _weighted(call, -1, LINEAR)


def convolution(call: Call) -> Labels:
    """Reads and writes the channel dimension, or passes whole groups of it."""
    dim = 1 - call.args["weight"].ndim
    sizes = {call.args["weight"].shape[0], call.first.shape[dim], call.result.shape[dim]}
    if not isinstance(call.module, CONVOLUTIONS) and sizes == {call.args["groups"]}:
        return pool(call) if sizes == {1} else _filtered(call, dim)
    return _weighted(call, dim, CONVOLUTIONS)


def _filtered(call: Call, dim: int) -> Tensor:
    """Every channel alone is filtered, by values that no layer holds."""
    read = read_along(call, call.first, dim)
    for value, node in call.tensors[1:]:
        if not _repeats(node):
            _tie(call, value, node, read, call.says("filters them by values that vary"))
    return spread(read, dim, call.result.shape)


def _repeats(node: Node) -> bool:
    """Whether a value is one row, over and over."""
    before = node.args[0] if operator_name(node) in ("expand", "repeat", "tile") else None
    return isinstance(before, Node) and before.meta["val"].shape[:1] == (1,)


def _tie(call: Call, value: Tensor, node: Node, read: Tensor, reason: str) -> None:
    """Tie the rows of a value to channels, or pin these, blaming the tensor that the value comes from."""
    if complete(value) and squashed(value).numel() == len(value):
        call.ledger.unite(along(value, 0), read)
    else:
        blamed = [(name, len(read)) for name in [source(call, node)] if name]
        call.ledger.pin(torch.cat([read, value.flatten()]), reason, blamed)


def product(call: Call) -> Labels:
    """As ``linear`` where a matrix is the weight of the module that multiplies; else rows times columns."""
    if _is_own(call):
        return _weighted(call, -1, LINEAR)
    biased = call.name in ("addmm", "baddbmm")
    bias, (left, right) = call.tensors[:biased], call.tensors[biased : biased + 2]
    if left[0].ndim > 1 and (stack := stack_of(call, right[1])) is not None:
        return _stacked(call, stack, left, -1, "io", bias)
    if right[0].ndim > 1 and (stack := stack_of(call, left[1])) is not None:
        return _stacked(call, stack, right, -2, "oi", bias)
    if not any(labelled(value) for value, _ in call.tensors):
        result: Labels = call.result
        return result
    return biased_matmul(call) if biased else matmul(call)


def grouped_product(call: Call) -> Labels:
    """Rows of a matrix times the matrix of their group; the fast kernels want rows of whole 16 bytes."""
    x, weights = call.tensors[:2]
    stack = stack_of(call, weights[1])
    if stack is None:
        return call.opaque(call.says("is not understood"))
    return _stacked(call, stack, x, -1, "io", call.tensors[3:], block=16 // x[1].meta["val"].itemsize)


def einsum_of_stack(call: Call) -> Labels:
    """As ``linear`` where one operand are matrices of a parameter; else as ``einsum``."""
    terms, _, output = call.args["equation"].replace(" ", "").partition("->")
    inputs, stacks = terms.split(","), [stack_of(call, node) for _, node in call.tensors]
    if len(inputs) == 2 and output and "." not in terms and any(stacks):
        own = next(i for i, stack in enumerate(stacks) if stack)
        term, other = inputs[own], inputs[1 - own]
        read, made = ({*term[-2:]} & {*letters} for letters in (other, output))
        if len(read) == len(made) == 1 and read != made and len({*other}) == len(other):
            (k,), (o,), stack = read, made, stacks[own]
            assert stack is not None
            order, x = ("oi" if term.endswith(o + k) else "io"), call.tensors[1 - own]
            return _stacked(call, stack, x, other.index(k), order, [], made=output.index(o))
    return einsum(call)


def _stacked(
    call: Call,
    stack: tuple[str, bool],
    x: tuple[Tensor, Node],
    dim: int,
    order: str,
    added: list[tuple[Tensor, Node]],
    *,
    made: int | None = None,
    block: int = 1,
) -> Labels:
    """Reads ``x`` along one dimension with matrices of a parameter, and writes that dimension, or ``made``.

    ``order`` of outputs and inputs as the operator takes them; ``block`` neighbours stay together.
    """
    (name, turned), read = stack, read_along(call, x[0], dim)
    name = f"{name}:{order[::-1] if turned else order}"
    made = dim if made is None else made
    own = call.ledger.member(name, "readers", len(read))
    call.ledger.unite(own, read)
    rows = call.ledger.member(name, "writers", call.result.shape[made])
    for labels in (own, rows):
        if len(labels) % block == 0:
            call.ledger.mix(labels.reshape(-1, block), (1,), call.says("takes rows of whole 16 bytes"))
    result = spread(rows, made, call.result.shape)
    return meet(call, [(result, call.node), *added]) if added else result


def _is_own(call: Call) -> bool:
    """Whether a product is that of its module's weight, and its bias the module's."""
    found, layer = product_of(call.node), call.module
    if found is None or not isinstance(layer, LINEAR) or not isinstance(found.weight, Node):
        return False
    weight, given = stored(found.weight)[0], call.network.parameters
    values = [call.network.state.get(given.get(node, "")) for node in (weight, found.bias)]
    own = values[0] is layer.weight and values[1] is layer.bias
    return own and is_of(found, layer, weight)


def _weighted(call: Call, dim: int, kinds: tuple[type[nn.Module], ...]) -> Labels:
    layer = call.module
    if not isinstance(layer, kinds):
        return call.opaque(_stranger(call, layer))
    found = product_of(call.node)
    at = next((i for i, (_, node) in enumerate(call.tensors) if found and node is found.x), 0)
    name, x = call.network.names[layer], call.tensors[at][0]
    read, groups = read_along(call, x, dim), call.args.get("groups", 1)
    if groups == 1:
        own = call.ledger.member(name, "readers", len(read))
        call.ledger.unite(own, read)
        if layer in call.network.twins:
            call.ledger.pin(own[read < 0], call.says("reads channels that are fixed"))
        rows = call.ledger.member(name, "writers", call.result.shape[dim])
        made = torch.cat([own, rows])
    else:
        made = rows = call.ledger.member(name, "passed", call.result.shape[dim])
        inputs, outputs = read.reshape(groups, -1), rows.reshape(groups, -1)
        call.ledger.pin(outputs[(inputs < 0).any(1)], call.says("reads channels that are fixed"))
        call.ledger.unite(outputs, inputs[:, :1])
        call.ledger.mix(inputs, (1,), call.says("mixes the channels of a group"))
    _pin_problem(call, layer, kinds, made, at)
    return spread(rows, dim, call.result.shape)


def _stranger(call: Call, layer: nn.Module | None) -> str:
    """Reason to pin the channels of a layer's operator that runs in a module of another kind."""
    if layer is None or layer is call.network.modules[""]:
        return call.says("runs outside of a layer of its own")
    reader = f"`{call.network.names[layer]}`, a {type(layer).__name__},"
    return f"{reader} works on them as a whole ({where(call.node)})"


def _pin_problem(
    call: Call, layer: nn.Module, kinds: tuple[type[nn.Module], ...], labels: Tensor, at: int = 0
) -> None:
    """Pin the labels of a layer that cannot be narrowed, and those that its weight is computed from.

    ``at``: which of the tensors the layer reads.
    """
    name = call.network.names[layer]
    for value, _ in [*call.tensors[:at], *call.tensors[at + 1 :]]:
        call.ledger.pin(value, call.says("takes them for weights or positions"))
    for part in ("weight", "bias", "running_mean", "running_var"):
        source = call.sources.get(part)
        stored = call.network.state.get(call.network.parameters.get(source, "")) if source else None
        if source is not None and (stored is None or stored is not getattr(layer, part)):
            remedy = permanent_by(layer)
            return call.ledger.pin(labels, f"the {part} of `{name}` is computed from other values: {remedy}")
    if plain(layer) not in kinds:
        kind = next(kind.__name__ for kind in kinds if isinstance(layer, kind))
        call.ledger.pin(labels, f"`{name}` is a {type(layer).__name__}, not a plain {kind}")
    if layer in call.network.ties:
        reason = f"`{name}` shares its values with `{call.network.ties[layer]}`"
        if layer in call.network.twins:
            _unite_twins(call, layer, reason)
        else:
            call.ledger.pin(labels, reason)


def _unite_twins(call: Call, layer: nn.Module, reason: str) -> None:
    """Layers with one weight keep the same of its rows and columns; what one cannot lose, none can."""
    group = (layer, *call.network.twins[layer])
    for dim, size in enumerate(weight_of(layer).shape):
        roles = [(call.network.names[one], (sides(one) or ("", ""))[dim]) for one in group]
        labels = [call.ledger.member(name, role, size) for name, role in roles if role]
        if labels:
            call.ledger.unite(*labels)
        if 0 < len(labels) < len(group):
            call.ledger.pin(labels[0], reason)


def embedding(call: Call) -> Labels:
    """Writes the last dimension."""
    layer = call.module
    if not isinstance(layer, nn.Embedding):
        return call.opaque(_stranger(call, layer))
    rows = call.ledger.member(call.network.names[layer], "writers", call.result.shape[-1])
    _pin_problem(call, layer, (nn.Embedding,), rows)
    return spread(rows, -1, call.result.shape)


def channel_norm(call: Call) -> Labels:
    """Batch and instance norms, and PReLU: channel by channel."""
    kinds = {"batch_norm": _BATCH_NORMS, "instance_norm": _INSTANCE_NORMS, "prelu": (nn.PReLU,)}[call.name]
    if call.name == "prelu" and call.args["weight"].numel() == 1:
        return call.first
    _passed(call, call.first, kinds)
    return call.first


def group_norm(call: Call) -> Labels:
    """Mixes the channels of each group."""
    x = call.first
    blocks = read_along(call, x, 1).reshape(call.args["num_groups"], -1)
    call.ledger.mix(blocks, (1,), call.says("mixes the channels of a group"))
    _passed(call, x, (nn.GroupNorm,))
    return x


def last_norm(call: Call) -> Labels:
    """A layer's norm over the last dimension can do with fewer channels; else it unites them."""
    layer = call.module
    if not labelled(call.first):
        return call.first
    if not isinstance(layer, WHOLE_NORMS) or call.first.ndim < 2 or not through_norm(call):
        dims = range(-len(call.args["normalized_shape"]), 0)
        call.ledger.mix(call.first, tuple(dims), call.says("mixes these channels"))
        return call.first
    rows = call.ledger.member(call.network.names[layer], "passed", call.first.shape[-1])
    call.ledger.unite(rows, along(call.first, -1))
    _pin_problem(call, layer, WHOLE_NORMS, rows)
    return call.first


def _passed(call: Call, x: Tensor, kinds: tuple[type[nn.Module], ...]) -> None:
    """Tie the rows of the layer to the channels that pass it."""
    layer, read = call.module, read_along(call, x, 1)
    if isinstance(layer, kinds):
        rows = call.ledger.member(call.network.names[layer], "passed", len(read))
        call.ledger.unite(rows, read)
        _pin_problem(call, layer, kinds, rows)
        return
    for value, node in call.tensors[1:]:
        _tie(call, value, node, read, _stranger(call, layer))


def pad(call: Call) -> Labels:
    """New positions take the labels of their neighbours; new channels get labels of their own."""
    labels, sizes = call.first, call.args["pad"]
    plain = call.args.get("mode", "constant") == "constant"
    for i, pair in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        dim = labels.ndim - 1 - i
        if not plain:
            call.ledger.pin_varying(labels, (dim,), call.says("repeats these channels"))
        if any(pair):
            added = plain and squashed(labels).shape[dim] > 1 and min(pair) >= 0
            labels = _channels_added(call, labels, dim, pair) if added else _grown(labels, dim, pair)
    return labels


def _grown(labels: Tensor, dim: int, pair: tuple[int, int]) -> Tensor:
    """New places along one dimension take their neighbours' labels; negative padding crops."""
    places = torch.arange(-pair[0], labels.shape[dim] + pair[1])
    return lean(labels.index_select(dim, places.clamp(0, labels.shape[dim] - 1)))


def _channels_added(call: Call, labels: Tensor, dim: int, pair: tuple[int, int]) -> Tensor:
    """New channels: of the padding layer, which can add fewer, or fixed where code adds them."""
    (front, back), layer = pair, call.module
    last = 2 * (labels.ndim - dim)
    if isinstance(layer, PADS) and not any(call.args["pad"][last:]):
        rows = call.ledger.member(call.network.names[layer], "passed", front + back)
    else:
        rows = call.ledger.fresh(front + back)
        kind = "constant" if call.args["value"] else "zero"
        call.ledger.pin(rows, f"{kind} channels are padded in ({where(call.node)})")
    shape = list(labels.shape)
    shape[dim] = front
    first = spread(rows[:front], dim, shape)
    shape[dim] = back
    return torch.cat([first, labels, spread(rows[front:], dim, shape)], dim)


_NAMES: dict[Rule, str] = {
    linear: "linear",
    product: "matmul mm bmm addmm baddbmm",
    grouped_product: "_grouped_mm grouped_mm grouped_mm_fallback",
    einsum_of_stack: "einsum",
    convolution: "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    embedding: "embedding",
    channel_norm: "batch_norm instance_norm prelu",
    group_norm: "group_norm",
    last_norm: "layer_norm rms_norm",
    pad: "pad constant_pad_nd",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
