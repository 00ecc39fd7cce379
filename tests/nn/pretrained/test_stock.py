"""Configurations are read back from shapes alone, whatever fields made them."""

import copy

import pytest
import torch
from families import made

from pysolve.errors import PysolveError
from pysolve.nn.pretrained.blocks import blocks_of
from pysolve.nn.pretrained.stock import (
    NotStockError,
    describe,
    fields_of,
    is_pretrained,
    shapes_of,
    stock_of,
    with_fields,
)

transformers = pytest.importorskip("transformers")


def pretending(name, changes):
    """A network made with other fields that still has the configuration of before."""
    model, batch = made(transformers, name)
    other = type(model)(with_fields(model.config, changes)).eval()
    other.config = model.config
    return model, other, batch


CHANGES = [
    ("bert", {"intermediate_size": 7}),
    ("bert", {"hidden_size": 12, "intermediate_size": 9, "vocab_size": 25}),
    ("gpt2", {"n_inner": 40}),
    ("gpt2", {"n_embd": 12, "n_inner": 64}),
    ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("llama", {"head_dim": 2}),
    ("llama", {"head_dim": 2, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("llama", {"hidden_size": 12, "intermediate_size": 5, "rms_norm_eps": 1.3e-6}),
]
OTHER_FAMILIES = [
    ("qwen3", {"head_dim": 4, "hidden_size": 10}),
    ("gemma2", {"hidden_size": 12, "head_dim": 4}),
    ("vit", {"intermediate_size": 5, "patch_size": 2}),
    ("t5", {"d_ff": 5, "num_heads": 2}),
    ("t5", {"d_kv": 2, "d_model": 10}),
    ("whisper", {"decoder_ffn_dim": 5, "d_model": 12}),
    ("mixtral", {"num_local_experts": 3, "intermediate_size": 8}),
    ("qwen3_moe", {"num_local_experts": 3, "moe_intermediate_size": 4}),
]


@pytest.mark.parametrize(
    ("name", "changes"),
    [*CHANGES, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHER_FAMILIES)],
)
def test_fields_are_found_again(name, changes):
    _, other, _ = pretending(name, changes)
    found = stock_of(other).config
    assert shapes_of(type(other)(copy.deepcopy(found))) == shapes_of(other)
    record = found.to_dict()
    assert {path: record[path] for path in changes} == changes


def test_what_followed_from_other_fields_is_written_out():
    model, _ = made(transformers, "qwen2")
    assert stock_of(model).config.to_dict()["head_dim"] == 4
    model, _ = made(transformers, "gpt2")
    assert stock_of(model).config.n_inner == 64


def test_heads_and_their_size_are_told_apart_by_numbers_in_modules():
    model, other, _ = pretending("llama", {"num_attention_heads": 2, "num_key_value_heads": 1})
    fields = fields_of(model)
    assert describe(other, shapes_of(other), fields).changes == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model, other, _ = pretending("llama", {"head_dim": 2})
    assert describe(other, shapes_of(other), fields).changes == {"head_dim": 2}


def test_layers_of_different_widths_are_named_with_their_field():
    model, _ = made(transformers, "mistral")
    layer = model.model.layers[1].mlp
    for one in (layer.gate_proj, layer.up_proj):
        one.weight = torch.nn.Parameter(one.weight[:7])
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight[:, :7])
    with pytest.raises(NotStockError) as error:
        stock_of(model)
    assert "intermediate_size would be 7 (model.layers.1.mlp.gate_proj" in str(error.value)
    assert "12 (model.layers.0.mlp.gate_proj" in str(error.value)
    with pytest.raises(PysolveError, match="no Llama"):
        blocks_of(model)


def test_norms_must_agree():
    model, _ = made(transformers, "llama")
    model.model.norm.variance_epsilon = 3e-6
    with pytest.raises(NotStockError, match=r"model\.norm\.variance_epsilon is 3e-06"):
        stock_of(model)


def test_new_biases_need_a_field_for_them():
    model, _ = made(transformers, "llama")
    model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(16))
    found = stock_of(model)
    assert found.config.mlp_bias
    assert len(found.zeros) == 5
    model, _ = made(transformers, "mistral")
    model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(NotStockError, match=r"no model\.layers\.1\.mlp\.down_proj\.bias: .* given a bias"):
        stock_of(model)


def test_ties_follow_the_network():
    model, _ = made(transformers, "llama")
    assert stock_of(model).config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert not stock_of(model).config.tie_word_embeddings


def test_blocks_count_widths_in_256():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    model = transformers.LlamaForCausalLM(config)
    narrow = transformers.LlamaForCausalLM(with_fields(config, {"intermediate_size": 256}))
    model.model.layers[1].mlp = narrow.model.layers[1].mlp
    found, record = blocks_of(model)
    assert found.config.intermediate_size == 512
    assert [one["ffn"]["ffn_mult"] for one in record["block_configs"]] == [48.0, 24.0]
    narrow = transformers.LlamaForCausalLM(with_fields(config, {"intermediate_size": 200}))
    model.model.layers[1].mlp = narrow.model.layers[1].mlp
    with pytest.raises(NotStockError, match="multiples of 256 in block_configs, got 200"):
        blocks_of(model)


def test_only_networks_of_the_library_have_configurations():
    assert not is_pretrained(torch.nn.Linear(2, 2))
    assert is_pretrained(made(transformers, "vit")[0])


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_layer_norms_bring_their_eps(name):
    model, _ = made(transformers, name)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 3e-5
    found = type(model)(stock_of(model).config)
    assert {one.eps for one in found.modules() if isinstance(one, torch.nn.LayerNorm)} == {3e-5}


def test_what_the_configuration_refuses_is_said():
    model, _ = made(transformers, "llama")
    shapes = shapes_of(model)
    narrow = {
        name: tuple(15 if size == 16 and "_proj" not in name else size for size in shape)
        for name, shape in shapes.items()
    }
    for name in narrow:
        if (
            "q_proj" in name
            or "gate_proj" in name
            or "up_proj" in name
            or "k_proj" in name
            or "v_proj" in name
        ):
            narrow[name] = (shapes[name][0], 15)
        if "o_proj" in name or "down_proj" in name:
            narrow[name] = (15, shapes[name][1])
    with pytest.raises(NotStockError, match="LlamaConfig refuses hidden_size = 15"):
        describe(model, narrow, fields_of(model))
