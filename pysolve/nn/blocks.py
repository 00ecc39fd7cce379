"""Llamas whose MLPs are of different widths, as the ``block_configs`` that DeciLM has published."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from pysolve.nn.stock import NotStockError, Stock, shapes_of, stock_of

# Widths of that format are multiples of it.
BLOCK = 256
_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.")


def blocks_of(network: nn.Module) -> tuple[Stock, dict[str, object]]:
    """A configuration of Llama for all but the MLPs, and what a file of it has besides.

    A width is a factor of the hidden size there, rounded up to a multiple of ``BLOCK``.

    Raises
    ------
    NotStockError
        It is no such network, or a width is no such multiple.
    """
    config: Any = network.config
    if type(network).__name__ != "LlamaForCausalLM" or config.hidden_act != "silu":
        raise NotStockError("it is no Llama")
    shapes = shapes_of(network)
    if any(f"model.layers.{i}.mlp.down_proj.weight" not in shapes for i in range(config.num_hidden_layers)):
        raise NotStockError("its layers have other weights")
    ours = {name: _MLP.sub("model.layers.0.mlp.", name) for name in shapes if _MLP.match(name)}
    first = {name: shapes[same] for name, same in ours.items() if same in shapes}
    widths = [shapes[f"model.layers.{i}.mlp.down_proj.weight"][1] for i in range(config.num_hidden_layers)]
    if odd := [width for width in widths if width % BLOCK]:
        raise NotStockError(f"widths of MLPs must be multiples of {BLOCK} in block_configs, got {odd[0]}")
    found = stock_of(network, {**shapes, **first})
    heads, groups = found.config.num_attention_heads, found.config.num_key_value_heads
    hidden = found.config.hidden_size
    if hidden != heads * found.config.head_dim or found.config.mlp_bias or found.config.attention_bias:
        raise NotStockError("block_configs have no biases, and heads share the hidden size evenly")
    plain = {"no_op": False, "replace_with_linear": False, "sparsify": None}
    blocks = [
        {
            "attention": {**plain, "n_heads_in_group": heads // groups},
            "ffn": {**plain, "ffn_mult": 1.5 * width / hidden},
        }
        for width in widths
    ]
    kind = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}
    return found, {**kind, "block_configs": blocks}
