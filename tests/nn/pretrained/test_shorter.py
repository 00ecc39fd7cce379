"""Layers that add nothing are counted out of the configurations of transformers."""

import copy
from functools import cache

import pytest
import torch
from families import GROUPED, SMALL, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pysolve.nn.layers.idle import Constant, Empty, PassedBy
from pysolve.nn.pretrained.blocks import blocks_of
from pysolve.nn.pretrained.shorter import partly_idle, without_idle_layers
from pysolve.nn.pretrained.stock import NotStockError, stock_of

transformers = pytest.importorskip("transformers")

LAYERS, IDS = 4, torch.arange(16).view(2, 8)
SIZES = {**TEXT, **GROUPED, **SMALL, "num_hidden_layers": LAYERS}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [0, 2]}


@cache
def network(name):
    t, more = transformers, {}
    torch.manual_seed(0)
    if name == "Qwen2":
        more = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 3}
    elif name == "SmolLM3":
        more = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "no_rope_layers": [1, 0, 1, 0]}
    elif name == "Qwen3Moe":
        more = MOE
    elif name == "DeepseekV3":
        more = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}
        more |= {"moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        more |= {"qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 2, "num_key_value_heads": 4}
    config = getattr(t, f"{name}Config")(**{**SIZES, **more})
    model = getattr(t, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))
    return model


def constant(values=None):
    return Constant(nn.Parameter(torch.zeros(16) if values is None else values))


def without(model, layers, *, heads=True, mlps=True, left=None):
    """The network without the branches of some layers, as a compression leaves it."""
    model = copy.deepcopy(model)
    for i in layers:
        layer = model.model.layers[i]
        if heads:
            layer.self_attn = PassedBy("o_proj", constant(), "hidden_states", 2, 0)
            layer.input_layernorm = nn.Identity()
        if mlps:
            mlp = nn.Module()
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(x)
            mlp.gate_proj = mlp.up_proj = Empty(torch.zeros(0, 16))
            mlp.down_proj = constant(left)
            layer.mlp, layer.post_attention_layernorm = mlp, nn.Identity()
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def words(model, *, cached=True):
    """Without caches where a layer that is passed by would have to keep one."""
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, "pad_token_id": 0}
    return model.generate(IDS[:, :4], **options)


def opened(shorter):
    """What the class makes of the configuration, with the tensors that are left."""
    config = stock_of(shorter).config
    made = type(shorter)(config).eval()
    made.load_state_dict(shorter.state_dict())
    return made


SOME = st.sets(st.integers(1, LAYERS - 1), min_size=1, max_size=LAYERS - 1)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "SmolLM3"])
@given(SOME)
@settings(max_examples=4, deadline=None)
def test_the_class_makes_the_same_network_of_fewer_layers(name, gone):
    model = without(network(name), gone)
    shorter = without_idle_layers(model)
    assert shorter.config.num_hidden_layers == LAYERS - len(gone)
    made = opened(shorter)
    assert torch.equal(logits(made), logits(model))
    assert torch.equal(words(made), words(model, cached=False))
    # The network itself stays, and shares its tensors with the shorter one.
    assert len(model.model.layers) == model.config.num_hidden_layers == LAYERS
    assert shorter.lm_head.weight is model.lm_head.weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Qwen3Moe", "DeepseekV3"])
@pytest.mark.parametrize("gone", [(1,), (1, 3), (2, 3)])
def test_other_families_too(name, gone):
    model = without(network(name), gone)
    made = opened(without_idle_layers(model))
    assert torch.equal(logits(made), logits(model))
    assert torch.equal(words(made), words(model, cached=False))


def test_lists_of_layers_and_numbers_of_them_follow():
    config = without_idle_layers(without(network("Qwen2"), [1])).config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    config = without_idle_layers(without(network("SmolLM3"), [1, 2])).config
    assert config.no_rope_layers == [1, 0]
    config = without_idle_layers(without(network("Qwen3Moe"), [1])).config
    assert (config.mlp_only_layers, config.num_hidden_layers) == ([0, 1], 3)
    config = without_idle_layers(without(network("DeepseekV3"), [1])).config
    assert (config.first_k_dense_replace, config.num_hidden_layers) == (1, 3)


def test_numbers_of_layers_are_renewed():
    shorter = without_idle_layers(without(network("Llama"), [1]))
    assert [layer.self_attn.layer_idx for layer in shorter.model.layers] == [0, 1, 2]


def test_whole_networks_are_themselves():
    model = network("Llama")
    assert without_idle_layers(model) is model
    partly = without(model, [1], heads=False)
    assert without_idle_layers(partly) is partly
    assert partly_idle(partly) == "model.layers.1"
    assert partly_idle(model) is None


@given(SOME)
@settings(max_examples=4, deadline=None)
def test_constants_become_biases_in_front(gone):
    left = torch.linspace(-1, 1, 16)
    model = without(network("Llama"), gone, left=left)
    shorter = without_idle_layers(model)
    assert not hasattr(network("Llama").model.layers[0].mlp.down_proj.bias, "shape")
    torch.testing.assert_close(logits(shorter), logits(model))
    found = stock_of(shorter)
    assert found.config.mlp_bias
    made = type(shorter)(found.config).eval()
    zeros = {name: torch.zeros(shape) for name, shape in found.zeros.items()}
    made.load_state_dict({**shorter.state_dict(), **zeros})
    torch.testing.assert_close(logits(made), logits(model))


def test_a_constant_of_the_first_layer_has_no_place():
    with pytest.raises(NotStockError, match=r"layers\.0 is gone and leaves a constant.*widths=\"uniform\""):
        without_idle_layers(without(network("Llama"), [0], left=torch.ones(16)))


def test_some_layer_must_be_left():
    with pytest.raises(NotStockError, match=r"no layer of model\.layers is left"):
        without_idle_layers(without(network("Llama"), range(LAYERS)))


@cache
def wide():
    """A Llama whose widths the format of blocks can say."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "intermediate_size": 256})
    return transformers.LlamaForCausalLM(config).eval()


def test_blocks_say_which_branches_do_nothing():
    model = without(without(wide(), [1], heads=False), [3], mlps=False)
    found, record = blocks_of(model)
    assert found.config.num_hidden_layers == LAYERS
    ffn = [one["ffn"]["no_op"] for one in record["block_configs"]]
    heads = [one["attention"]["no_op"] for one in record["block_configs"]]
    assert (ffn, heads) == ([False, True, False, False], [False, False, False, True])
    assert record["block_configs"][1]["ffn"]["ffn_mult"] is None
    assert record["block_configs"][3]["attention"]["n_heads_in_group"] is None


def test_blocks_have_no_constants():
    model = without(wide(), [1], heads=False, left=torch.ones(16))
    with pytest.raises(NotStockError, match=r"a branch of model\.layers\.1 has left a constant"):
        blocks_of(model)


def test_blocks_need_layers_with_equal_heads():
    model = copy.deepcopy(wide())
    model.model.layers[2].self_attn.q_proj.weight = nn.Parameter(torch.zeros(8, 16))
    with pytest.raises(NotStockError):
        blocks_of(model)
