"""No part of a transformer is out of reach: small ones of every family shrink to a seventh."""

import pytest
import torch

import pysolve as ps

transformers = pytest.importorskip("transformers")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = 80


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=WORDS, **SHAPE))


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SHAPE)
    return transformers.ViTForImageClassification(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=WORDS, num_key_value_heads=2, tie_word_embeddings=True, **SHAPE
    )
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


# The output of these encoders is as wide as their embeddings, which ranks alone can shrink.
RANKS = {("params", bert), ("params", t5)}


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("make", [bert, vit, llama, t5, gpt2])
def test_a_seventh_is_reached(make, measure):
    torch.manual_seed(0)
    model = make().eval()
    words = [{"input_ids": torch.randint(WORDS, (24, 16))} for _ in range(8)]
    images = [{"pixel_values": torch.randn(24, 3, 16, 16)} for _ in range(8)]
    data, how = images if make is vit else words, {"latency": False, "progress": False}
    if (measure, make) in RANKS:
        with pytest.raises(ps.PysolveError, match=r"low_rank\(prune=True\)"):
            ps.compress(model, data, target={measure: 0.15}, **how)
        how |= {"prune": True, "layout": "factored", "unseen": "approximate"}
    verb = ps.low_rank if "prune" in how else ps.compress
    report = verb(model, data, target={measure: 0.15}, **how).report
    assert report.after[measure] <= 0.15 * report.before[measure]
    assert report.divergence >= 0
