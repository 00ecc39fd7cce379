"""Label rules of recurrent layers and their cells: hidden units go with all of their gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from pysolve.nn.cut.bare import GATES
from pysolve.nn.graph.calls import Call, Labels, read_along
from pysolve.nn.graph.classes import labelled, spread
from pysolve.nn.graph.operators import Rule


def recurrent(call: Call) -> Labels:
    """Reads the last dimension and writes hidden units: the same number in all layers and both directions.

    The unit of a number goes from all of them together, for a module has one size.
    """
    names = _own_names(call, call.sources["params"])
    if names is None:
        return call.opaque(call.says("is not understood"))
    each, ways = 4 if call.args["has_biases"] else 2, 2 if call.args["bidirectional"] else 1
    x, made = read_along(call, call.args["input"], -1), list[Tensor]()
    for first in range(0, len(names), each):
        if first % (each * ways) == 0 and made:
            x = torch.cat(made[-ways:])
        rows = _units(call, names[first : first + each], x)
        if made:
            call.ledger.unite(rows, made[0])
        made.append(rows)
    _take_states(call, made[0])
    shapes = [one.shape for one in call.result]
    last = spread(torch.cat(made[-ways:]), -1, shapes[0])
    kept = [spread(made[0], -1, shape) for shape in shapes[1:]]
    return [last, *kept]


def cell(call: Call) -> Labels:
    """One step of a recurrent layer."""
    given = [call.sources[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    names = _own_names(call, [one for one in given if one is not None])
    if names is None:
        return call.opaque(call.says("is not understood"))
    rows = _units(call, names, read_along(call, call.args["input"], -1))
    _take_states(call, rows)
    several = isinstance(call.result, list)
    made = [spread(rows, -1, one.shape) for one in (call.result if several else [call.result])]
    return made if several else made[0]


def _own_names(call: Call, nodes: Sequence[Node]) -> list[str] | None:
    """Names of the weights and biases of a recurrent layer that can lose units; None of another one."""
    layer = cast(nn.RNNBase, call.module)
    names = [call.network.parameters.get(node, "") for node in nodes]
    if type(layer) not in GATES or getattr(layer, "proj_size", False) or layer in call.network.ties:
        return None
    own = call.network.names[layer]
    return names if all(name and name.rpartition(".")[0] == own for name in names) else None


def _units(call: Call, names: Sequence[str], x: Tensor) -> Tensor:
    """(h,) labels of the hidden units of one layer in one direction, which all of its gates share."""
    layer = cast(nn.RNNBase, call.module)
    by_input, by_state, *biases = names
    call.ledger.unite(call.ledger.member(f"{by_input}:oi", "readers", len(x)), x)
    rows = call.ledger.member(f"{by_input}:oi", "writers", layer.hidden_size)
    for role in ("writers", "readers"):
        call.ledger.unite(rows, call.ledger.member(f"{by_state}:oi", role, layer.hidden_size))
    gates = GATES[type(layer)]
    for bias in biases:
        for part in call.ledger.member(bias, "passed", gates * layer.hidden_size).chunk(gates):
            call.ledger.unite(rows, part)
    return rows


def _take_states(call: Call, rows: Tensor) -> None:
    """States that are given are hidden units, too."""
    states = call.args["hx"]
    for value in states if isinstance(states, list | tuple) else [states]:
        if labelled(value):
            call.ledger.unite(rows, read_along(call, value, -1))


_NAMES: dict[Rule, str] = {
    recurrent: "lstm gru rnn_tanh rnn_relu",
    cell: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
