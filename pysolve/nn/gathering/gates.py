"""Zeros added to the gates of recurrent layers, whose gradients are those of the gates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pysolve.nn.gathering.recurrent import recurrent_layers
from pysolve.nn.layers.factored_recurrent import with_weights
from pysolve.plan import tensor_name

# Names of weights that read inputs, and what was added to the gates that they make.
Offsets = list[tuple[str, Tensor]]


@contextmanager
def watching_gates(model: nn.Module, names: Collection[str], offsets: Offsets) -> Iterator[None]:
    """Add zeros to the gates of recurrent layers, and record them; ``names`` are those of their weights.

    Torch's kernels show no gate. So the layers of a stack run one by one, each with more inputs: the zeros,
    for which the weights are the identity. (Of a GRU's new gate they are added to what inputs make of it,
    which the reset gate does not touch.)
    """
    owners = {name.rpartition(".")[0] for name in names}
    with ExitStack() as context:
        for owner, layer in recurrent_layers(model):
            if owner in owners and "forward" not in vars(layer):
                vars(layer)["forward"] = partial(_run, layer, owner, offsets)
                context.callback(vars(layer).pop, "forward")
        yield


def _run(layer: nn.RNNBase, owner: str, offsets: Offsets, input: Any, hx: Any = None) -> tuple[Any, Any]:
    """What the layer returns."""
    kind, ways, ends = type(layer), 2 if layer.bidirectional else 1, []
    before = [*hx] if isinstance(hx, tuple) else [] if hx is None else [hx]
    for i in range(layer.num_layers):
        suffixes = [f"_l{i}", f"_l{i}_reverse"][:ways]
        x = input.data if isinstance(input, PackedSequence) else input
        G = len(layer.get_parameter(f"weight_ih_l{i}"))
        added = [x.new_zeros(*x.shape[:-1], G).requires_grad_() for _ in suffixes]
        named = [tensor_name(owner, f"weight_ih{suffix}") for suffix in suffixes]
        offsets += zip(named, added, strict=True)
        x = torch.cat([x, *added], -1)
        given = PackedSequence(x, *input[1:]) if isinstance(input, PackedSequence) else x
        wide = _widened(layer, suffixes, x.shape[-1])
        states = [one[i * ways : (i + 1) * ways] for one in before]
        input, end = kind.forward(wide, given, tuple(states) if isinstance(hx, tuple) else [*states, None][0])
        ends.append(end)
    if isinstance(ends[0], tuple):
        return input, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
    return input, torch.cat(ends)


def _widened(layer: nn.RNNBase, suffixes: Sequence[str], width: int) -> Any:
    """One layer of a stack that adds further inputs to its gates, one direction's behind the other's."""
    biases, projections = ("bias_ih", "bias_hh") if layer.bias else (), ("weight_hr",) * bool(layer.proj_size)
    leaves = ("weight_ih", "weight_hh", *biases, *projections)
    names = [f"{leaf}{suffix}" for suffix in suffixes for leaf in leaves]
    weights: list[Tensor] = [layer.get_parameter(name) for name in names]
    for way, place in enumerate(range(0, len(names), len(leaves))):
        old = weights[place]
        G = len(old)
        eye = torch.eye(G * len(suffixes), dtype=old.dtype, device=old.device)
        weights[place] = torch.cat([old, eye[way * G : (way + 1) * G]], 1)
    own = {"num_layers": 1, "input_size": width, "_flat_weights_names": names}
    return with_weights(type(layer), {**vars(layer), **own}, weights)
