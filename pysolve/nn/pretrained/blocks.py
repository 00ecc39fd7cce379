"""Llamas whose MLPs are of different widths, or that lack branches, as DeciLM's ``block_configs``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pysolve.nn.layers.idle import Constant
from pysolve.nn.pretrained.shorter import constants_of
from pysolve.nn.pretrained.stock import (
    NotStockError,
    PretrainedConfig,
    PretrainedModel,
    Shapes,
    Stock,
    shapes_of,
    stock_of,
)

# Widths of that format are multiples of it.
BLOCK = 256
# By a branch's last projection, the parts of a layer that a layer without this branch has not.
_BRANCHES = {
    "self_attn.o_proj": ("self_attn", "input_layernorm"),
    "mlp.down_proj": ("mlp", "post_attention_layernorm"),
}
_ATTENTION, _MLP = _BRANCHES


def blocks_of(network: PretrainedModel) -> tuple[Stock, dict[str, object]]:
    """A configuration of Llama for all but what differs in layers, and what a file of it has besides.

    A width is a factor of the hidden size there, rounded up to a multiple of ``BLOCK``; a branch that is gone
    is one that does nothing (``no_op``), without a norm in front of it.

    Raises
    ------
    NotStockError
        It is no such network, a width is no such multiple, or a branch has left a constant.
    """
    config: PretrainedConfig = network.config
    if type(network).__name__ != "LlamaForCausalLM" or config.hidden_act != "silu":
        raise NotStockError("it is no Llama")
    model: PretrainedModel = network.model
    layers = [{path: part.get_submodule(path) for path in _BRANCHES} for part in model.layers]
    shapes = shapes_of(network)
    if any(
        f"model.layers.{i}.{path}.weight" not in shapes
        for i, one in enumerate(layers)
        for path in _whole(one)
    ):
        raise NotStockError("its layers have other weights")
    widths = [one[_MLP].in_features if _MLP in _whole(one) else None for one in layers]
    if odd := [width for width in widths if width is not None and width % BLOCK]:
        raise NotStockError(f"widths of MLPs must be multiples of {BLOCK} in block_configs, got {odd[0]}")
    for i, layer in enumerate(model.layers):
        if any(one.bias.detach().any() for one in constants_of(layer).values()):
            raise NotStockError(
                f"block_configs have no biases, and a branch of model.layers.{i} has left a constant: "
                'widths="uniform" leaves none'
            )
    found = stock_of(network, _as_if_alike(shapes, layers))
    heads, groups = found.config.num_attention_heads, found.config.num_key_value_heads
    hidden = found.config.hidden_size
    if hidden != heads * found.config.head_dim or found.config.mlp_bias or found.config.attention_bias:
        raise NotStockError("block_configs have no biases, and heads share the hidden size evenly")
    plain = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    nothing = {**plain, "no_op": True}
    with_heads = {**plain, "n_heads_in_group": heads // groups}
    blocks = [
        {
            "attention": with_heads if _ATTENTION in _whole(one) else {**nothing, "n_heads_in_group": None},
            "ffn": {**nothing, "ffn_mult": None}
            if width is None
            else {**plain, "ffn_mult": 1.5 * width / hidden},
        }
        for one, width in zip(layers, widths, strict=True)
    ]
    kind = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
    return found, {**kind, "block_configs": blocks}


def _whole(ends: Mapping[str, nn.Module]) -> list[str]:
    """Branches of a layer that are there, by their last projections."""
    return [path for path, one in ends.items() if not isinstance(one, Constant)]


def _as_if_alike(shapes: Shapes, layers: list[dict[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a network with all branches, and MLPs as wide as the first."""
    found = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.")}
    for path, parts in _BRANCHES.items():
        there = [i for i, one in enumerate(layers) if path in _whole(one)]
        if not there:
            raise NotStockError(f"no layer has its {parts[0]}")
        first = f"model.layers.{there[0]}."
        like = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
        like = {name: shape for name, shape in like.items() if name.partition(".")[0] in parts}
        for i in range(len(layers)):
            own = {name: shapes.get(f"model.layers.{i}.{name}", shape) for name, shape in like.items()}
            own = own if path == _ATTENTION and i in there else like
            found |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return found
