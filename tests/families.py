"""Small networks of transformers, one of each family that others open, with a batch for each."""

from contextlib import suppress

import torch

from pysolve.nn.pretrained import reopen

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
TEXT = {"vocab_size": 30, "max_position_embeddings": 16}
GROUPED = {"num_key_value_heads": 2}
IDS = torch.arange(12).view(2, 6)


def bert(t):
    return t.BertModel(t.BertConfig(**TEXT, **SMALL)), {"input_ids": IDS}


def gpt2(t):
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = t.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=4, **ends)
    return t.GPT2LMHeadModel(config), {"input_ids": IDS}


def llama(t):
    config = t.LlamaConfig(**TEXT, **GROUPED, **SMALL, tie_word_embeddings=True)
    return t.LlamaForCausalLM(config), {"input_ids": IDS}


def qwen2(t):
    return t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, **GROUPED, **SMALL)), {"input_ids": IDS}


def qwen3(t):
    return t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, **GROUPED, **SMALL, head_dim=6)), {"input_ids": IDS}


def mistral(t):
    config = t.MistralConfig(**TEXT, **GROUPED, **SMALL, sliding_window=4)
    return t.MistralForCausalLM(config), {"input_ids": IDS}


def gemma(t):
    return t.GemmaForCausalLM(t.GemmaConfig(**TEXT, **GROUPED, **SMALL, head_dim=6)), {"input_ids": IDS}


def gemma2(t):
    more = {"head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 6}
    return t.Gemma2ForCausalLM(t.Gemma2Config(**TEXT, **GROUPED, **SMALL, **more)), {"input_ids": IDS}


def vit(t):
    config = t.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return t.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def t5(t):
    config = t.T5Config(
        **{"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 4},
        decoder_start_token_id=0,
    )
    return t.T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def whisper(t):
    config = t.WhisperConfig(
        **{"vocab_size": 30, "num_mel_bins": 4, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        **{"encoder_ffn_dim": 12, "decoder_ffn_dim": 12},
        **{"max_source_positions": 8, "max_target_positions": 16},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    features = {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": IDS}
    return t.WhisperForConditionalGeneration(config), features


def mixtral(t):
    config = t.MixtralConfig(**TEXT, **GROUPED, **SMALL, num_local_experts=4)
    return t.MixtralForCausalLM(config), {"input_ids": IDS}


def qwen3_moe(t):
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [0]}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **GROUPED, **SMALL, **more)), {"input_ids": IDS}


def deepseek(t, **more):
    """Experts in two groups, of which the better one is looked at."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = t.DeepseekV3Config(
        **{**TEXT, **sizes, "num_key_value_heads": 2, "moe_intermediate_size": 8},
        **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        **{"v_head_dim": 4, "first_k_dense_replace": 1},
    )
    return t.DeepseekV3ForCausalLM(config), {"input_ids": IDS}


def gpt_oss(t):
    """Biases of experts and of the router."""
    more = {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = t.GptOssConfig(**TEXT, **GROUPED, **SMALL, **more)
    return t.GptOssForCausalLM(config), {"input_ids": IDS}


def opt(t):
    config = t.OPTConfig(
        **{"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"ffn_dim": 12, "max_position_embeddings": 16, "word_embed_proj_dim": 16},
    )
    return t.OPTForCausalLM(config), {"input_ids": IDS}


FAMILIES = {
    **{one.__name__: one for one in (bert, gpt2, llama, qwen2, qwen3, mistral, gemma, gemma2, vit, t5)},
    **{one.__name__: one for one in (whisper, mixtral, qwen3_moe, opt)},
}

# Mixtures of experts.
MIXTURES = {one.__name__: one for one in (mixtral, qwen3_moe, deepseek, gpt_oss)}


def made(t, name, seed=0):
    """A family's network in evaluation mode, and its batch; ``t`` is the library."""
    torch.manual_seed(seed)
    model, batch = {**FAMILIES, **MIXTURES}[name](t)
    return model.eval(), batch


def batches(batch, count=4, size=16, seed=1):
    """Random batches like one."""
    drawn = torch.Generator().manual_seed(seed)

    def like(value):
        shape = (size, *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(shape, generator=drawn)
        return torch.randint(30, shape, generator=drawn)

    return [{name: like(value) for name, value in batch.items()} for _ in range(count)]


def opened_here(jobs):
    """Open folders in this process, in the place of a fresh one that imports torch and the library again."""
    # It complains of this process once all outputs are written.
    with suppress(ImportError):
        reopen.main(str(jobs))
