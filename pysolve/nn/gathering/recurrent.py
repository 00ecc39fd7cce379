"""What the weights of recurrent layers read: inputs of every step, and the hidden units of the step before.

The gates of a step are  W_ih x_t + b_ih + W_hh h_{t-1} + b_hh : two linear layers, whose inputs are those of
the layer and its own outputs, one step later. Layers of a stack, and directions, run one by one for that.
Where states are projected,  h = W_hr s , a third one reads what the gates make of the cells, s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from pysolve.correlations import Correlations
from pysolve.nn.gathering.sums import Sums
from pysolve.nn.running import Batch, device_of, evaluating, forward, hooked, same_draws
from pysolve.plan import tensor_name

_KINDS = (nn.LSTM, nn.GRU, nn.RNN)
_RUN: Mapping[str, Any] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def recurrent_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of recurrent layers of torch's own that read inputs or hidden units, by state-dict name.

    Not those of layers whose weights are computed.
    """
    return {
        tensor_name(owner, leaf): weight
        for owner, layer in recurrent_layers(model)
        for leaf, weight in layer.named_parameters(recurse=False)
        if leaf.startswith("weight_")
    }


def bias_of(model: nn.Module, name: str) -> str | None:
    """The state-dict name of the bias that is added to what a recurrent weight makes, if there is one."""
    owner, _, leaf = name.rpartition(".")
    layer = dict(recurrent_layers(model)).get(owner) if leaf.startswith("weight_") else None
    if layer is None or not layer.bias or leaf.startswith("weight_hr"):
        return None
    return tensor_name(owner, leaf.replace("weight_", "bias_"))


def gather_recurrent(
    model: nn.Module, batches: Sequence[Batch], names: Collection[str]
) -> dict[str, Correlations]:
    """Correlations of recurrent weights, of those that ran; outputs are their own, with their biases.

    Parameters
    ----------
    model : nn.Module
    batches : sequence of batches
    names : collection of str
        Of ``recurrent_weights``.
    """
    sums = dict[str, Sums]()
    asked = {
        owner: layer for owner, layer in recurrent_layers(model) if any(_is_of(owner, name) for name in names)
    }
    hooks = (
        layer.register_forward_pre_hook(partial(_record, sums, owner, names), with_kwargs=True)
        for owner, layer in asked.items()
    )
    with hooked(hooks), evaluating(model), same_draws(model):
        for batch in batches if asked else ():
            forward(model, batch, device_of(model))
    return {name: one.correlations() for name, one in sums.items()}


def recurrent_layers(model: nn.Module) -> Iterator[tuple[str, nn.RNNBase]]:
    """Recurrent layers of torch's own whose weights can be fitted, with their names."""
    for name, layer in model.named_modules():
        if type(layer) in _KINDS and not layer._buffers and "weight_ih_l0" in layer._parameters:
            yield name, layer


def _is_of(owner: str, name: str) -> bool:
    return name.rpartition(".")[0] == owner


def _record(
    sums: dict[str, Sums],
    owner: str,
    names: Collection[str],
    layer: nn.RNNBase,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Add what the weights of a layer read in one call."""
    given, states = (*args, *kwargs.values(), None)[:2]
    for x, hx in _sequences(layer, given, states):
        for leaf, read in _read(layer, x, hx):
            name = tensor_name(owner, leaf)
            if name in names:
                weight, bias = getattr(layer, leaf), getattr(layer, leaf.replace("weight_", "bias_"), None)
                rows = read.flatten(0, -2)
                made = linear(rows, weight, bias)
                sums.setdefault(name, Sums.zeros(rows.shape[1], made.shape[1], rows.device)).add(rows, made)


def _sequences(layer: nn.RNNBase, given: Any, states: Any) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(T, B, d) inputs and the (layers · directions, B, H) states before them; of packed ones, one by one."""
    hx = [*states] if isinstance(states, tuple) else [] if states is None else [states]
    if isinstance(given, PackedSequence):
        for b, x in enumerate(unpack_sequence(given)):
            yield x[:, None], [one[:, b : b + 1] for one in hx]
    elif given.dim() == 2:
        yield given[:, None], [one[:, None] for one in hx]
    else:
        yield given.transpose(0, 1) if layer.batch_first else given, hx


def _read(layer: nn.RNNBase, x: Tensor, hx: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights by name, and the rows that they read."""
    directions = 2 if layer.bidirectional else 1
    if not hx:
        sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
        states = [x.new_zeros(layer.num_layers * directions, x.shape[1], size) for size in sizes]
        hx = states[: 2 if isinstance(layer, nn.LSTM) else 1]
    for i in range(layer.num_layers):
        made = []
        for reverse in range(directions):
            suffix = f"_l{i}{'_reverse' * reverse}"
            z, before = x.flip(0) if reverse else x, [one[[i * directions + reverse]] for one in hx]
            y = _run(layer, suffix, z, before)
            if layer.proj_size:
                yield f"weight_hr{suffix}", y
                y = linear(y, layer.get_parameter(f"weight_hr{suffix}"))
            yield f"weight_ih{suffix}", z
            yield f"weight_hh{suffix}", torch.cat([before[0], y[:-1]])
            made.append(y.flip(0) if reverse else y)
        x = torch.cat(made, -1)


def _run(layer: nn.RNNBase, suffix: str, x: Tensor, hx: Sequence[Tensor]) -> Tensor:
    """(T, B, H) hidden units of one layer in one direction, before they are projected."""
    leaves = [f"{what}{suffix}" for what in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    weights = [getattr(layer, leaf) for leaf in leaves[: 4 if layer.bias else 2]]
    if layer.proj_size:
        # The same without a projection, as it is linear; states that are given are those of some s.
        project = layer.get_parameter(f"weight_hr{suffix}")
        weights[1] = weights[1] @ project
        hx = [hx[0] @ torch.linalg.pinv(project).T, *hx[1:]]
    before: Any = [*hx] if layer.mode == "LSTM" else hx[0]
    y: Tensor = _RUN[layer.mode](x, before, weights, layer.bias, 1, 0.0, False, False, False)[0]
    return y
