"""Small networks of many architectures with random weights: transformers', and plain torch.

A configuration is made from its class's defaults, with every size that ``SMALL`` names made small, in the
configurations inside it as well; ``CHANGES`` has what an architecture needs besides. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

VOCABULARY, IMAGE_TOKEN, SAMPLES = 99, 98, 4

_SIZES = {
    0: "pad_token_id",
    1: "bos_token_id decoder_start_token_id",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth decoder_num_hidden_layers num_key_value_heads num_kv_heads n_groups
        num_experts_per_tok moe_k num_experts_per_token n_head_kv top_k_experts mamba_n_groups moe_topk""",
    3: "eos_token_id",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        decoder_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        qformer_num_attention_heads attention_heads mamba_n_heads mamba_num_heads""",
    8: """head_dim d_kv mamba_d_head mamba_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim patch_size
        mamba_d_state ssm_state_size d_state attention_head_dim linear_key_head_dim linear_value_head_dim""",
    32: """hidden_size d_model n_embd dim embed_dim emb_dim embedding_size projection_dim hidden_dim d_embed
        attention_hidden_size decoder_hidden_size q_lora_rank kv_lora_rank moe_intermediate_size
        expert_ffn_hidden_size qformer_hidden_size state_size conv_dim text_embed_dim lru_width
        cross_attention_dim word_embed_proj_dim mm_hidden_size head_hidden_size out_hidden_size
        encoder_hidden_dim fusion_hidden_size shared_expert_intermediate_size image_size""",
    64: """intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim dim_feedforward
        ffn_hidden_size d_inner feed_forward_size max_position_embeddings n_positions max_source_positions
        max_target_positions encoder_intermediate_size d_expert qformer_intermediate_size mamba_d_inner
        decoder_intermediate_size n_ctx inner_dim shared_intermediate_size ffn_embed_dim""",
    VOCABULARY: "vocab_size entity_vocab_size",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}


def _tokens(length: int) -> Tensor:
    return torch.randint(4, IMAGE_TOKEN, (SAMPLES, length))


def _with_places(count: int) -> dict[str, Tensor]:
    """Text behind the places of an image's patches."""
    places = torch.full((SAMPLES, count), IMAGE_TOKEN)
    return {"input_ids": torch.cat([places, _tokens(6)], 1), "pixel_values": torch.randn(SAMPLES, 3, 32, 32)}


# One batch of each kind of input.
INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tokens": lambda: {"input_ids": _tokens(12)},
    "two texts": lambda: {"input_ids": _tokens(12), "decoder_input_ids": _tokens(8)},
    "image": lambda: {"pixel_values": torch.randn(SAMPLES, 3, 32, 32)},
    "image 64": lambda: {"pixel_values": torch.randn(SAMPLES, 3, 64, 64)},
    "video": lambda: {"pixel_values": torch.randn(SAMPLES, 2, 3, 32, 32)},
    "wave": lambda: {"input_values": torch.randn(SAMPLES, 2000)},
    "spectrogram": lambda: {"input_values": torch.randn(SAMPLES, 64, 32)},
    "features": lambda: {"input_features": torch.randn(SAMPLES, 80, 128)},
    "frames": lambda: {"input_features": torch.randn(SAMPLES, 64, 80)},
    "features, text": lambda: {**INPUTS["features"](), "decoder_input_ids": _tokens(8)},
    "frames, text": lambda: {**INPUTS["frames"](), "decoder_input_ids": _tokens(8)},
    "text, image": lambda: {"input_ids": _tokens(12), "pixel_values": torch.randn(SAMPLES, 3, 32, 32)},
    "image in text": lambda: _with_places(16),
    "pooled image in text": lambda: _with_places(4),
    "series": lambda: {"past_values": torch.randn(SAMPLES, 32, 7)},
    "x": lambda: {},
}

# Architectures by family and kind of input.
TABLE: dict[tuple[str, str], str] = {
    ("language", "tokens"): """
        GPT2LMHeadModel LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
        GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM
        BloomForCausalLM FalconForCausalLM GPTNeoXForCausalLM GPTJForCausalLM GPTBigCodeForCausalLM
        OPTForCausalLM MptForCausalLM Olmo2ForCausalLM StableLmForCausalLM Starcoder2ForCausalLM
        CohereForCausalLM GlmForCausalLM GraniteForCausalLM PersimmonForCausalLM NemotronForCausalLM
        DiffLlamaForCausalLM OpenAIGPTLMHeadModel XGLMForCausalLM BioGptForCausalLM XLNetLMHeadModel
        SmolLM3ForCausalLM DeepseekV2ForCausalLM BertForMaskedLM RobertaForMaskedLM AlbertForMaskedLM
        DistilBertForMaskedLM ElectraForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM MPNetForMaskedLM
        ModernBertForMaskedLM RoFormerForMaskedLM ConvBertForMaskedLM FNetForMaskedLM
        SqueezeBertForMaskedLM MobileBertForMaskedLM IBertForMaskedLM LongformerForMaskedLM
        BigBirdForMaskedLM NystromformerForMaskedLM YosoForMaskedLM XLMWithLMHeadModel EsmForMaskedLM
        NomicBertForMaskedLM FunnelForMaskedLM""",
    ("mixture of experts", "tokens"): """
        MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM GptOssForCausalLM
        DeepseekV3ForCausalLM GraniteMoeForCausalLM PhimoeForCausalLM JetMoeForCausalLM
        Ernie4_5_MoeForCausalLM Llama4ForCausalLM""",
    ("state space", "tokens"): """
        MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM RwkvForCausalLM JambaForCausalLM
        BambaForCausalLM RecurrentGemmaForCausalLM Lfm2ForCausalLM Qwen3NextForCausalLM
        NemotronHForCausalLM""",
    ("encoder-decoder", "two texts"): """
        T5ForConditionalGeneration MT5ForConditionalGeneration UMT5ForConditionalGeneration
        LongT5ForConditionalGeneration SwitchTransformersForConditionalGeneration
        BartForConditionalGeneration MBartForConditionalGeneration PegasusForConditionalGeneration
        BlenderbotForConditionalGeneration M2M100ForConditionalGeneration MarianMTModel
        ProphetNetForConditionalGeneration NllbMoeForConditionalGeneration T5GemmaForConditionalGeneration
        PLBartForConditionalGeneration""",
    ("vision", "image"): """
        ViTForImageClassification DeiTForImageClassification BeitForImageClassification
        Dinov2ForImageClassification DINOv3ViTModel SiglipForImageClassification CLIPVisionModel
        ViTMAEModel ViTMSNForImageClassification VitDetModel YolosForObjectDetection
        IJepaForImageClassification Data2VecVisionForImageClassification PixtralVisionModel SamVisionModel
        SwinForImageClassification Swinv2ForImageClassification HieraForImageClassification
        FocalNetForImageClassification PvtForImageClassification PvtV2ForImageClassification
        SegformerForImageClassification SegformerForSemanticSegmentation GLPNForDepthEstimation
        ResNetForImageClassification RegNetForImageClassification BitForImageClassification
        PoolFormerForImageClassification MobileNetV1ForImageClassification
        MobileNetV2ForImageClassification SwiftFormerForImageClassification TextNetForImageClassification
        HGNetV2ForImageClassification""",
    ("vision", "image 64"): """
        ConvNextForImageClassification ConvNextV2ForImageClassification LevitForImageClassification
        EfficientNetForImageClassification MobileViTForImageClassification""",
    ("vision", "video"): """
        TimesformerForVideoClassification VideoMAEForVideoClassification""",
    ("audio", "wave"): """
        Wav2Vec2ForCTC HubertForCTC WavLMForCTC SEWForCTC UniSpeechSatForCTC Data2VecAudioForCTC
        Wav2Vec2ConformerForSequenceClassification""",
    ("audio", "spectrogram"): "ASTForAudioClassification",
    ("audio", "features"): "WhisperForAudioClassification",
    ("audio", "frames"): "ParakeetForCTC",
    ("audio", "features, text"): "WhisperForConditionalGeneration",
    ("audio", "frames, text"): "Speech2TextForConditionalGeneration",
    ("multimodal", "text, image"): """
        CLIPModel SiglipModel AltCLIPModel ChineseCLIPModel BlipModel ViltModel OwlViTModel
        VisionTextDualEncoderModel CLIPSegModel""",
    ("multimodal", "image in text"): """
        LlavaForConditionalGeneration VipLlavaForConditionalGeneration PaliGemmaForConditionalGeneration""",
    ("multimodal", "pooled image in text"): """
        AyaVisionForConditionalGeneration InternVLForConditionalGeneration Gemma3ForConditionalGeneration""",
    ("time series", "series"): "PatchTSMixerForPrediction PatchTSTForPrediction",
}

_STAGES = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
_PYRAMID = {**_STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 32}
_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
_PICTURE = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
CHANGES: dict[str, dict[str, Any]] = {
    "GPTJForCausalLM": {"rotary_dim": 8},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "DeepseekV2ForCausalLM": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "MobileBertForMaskedLM": {"embedding_size": 16, "intra_bottleneck_size": 16},
    "EsmForMaskedLM": {"vocab_size": VOCABULARY, "mask_token_id": 5},
    "FunnelForMaskedLM": {"block_sizes": [1, 1], "d_head": 8},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "BambaForCausalLM": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "Qwen3NextForCausalLM": _ATTENTION,
    "SwinForImageClassification": {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
    "Swinv2ForImageClassification": {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
    "HieraForImageClassification": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
    "FocalNetForImageClassification": {"embed_dim": 16, "depths": [1, 1, 1, 1]},
    "PvtForImageClassification": _PYRAMID,
    "PvtV2ForImageClassification": _PYRAMID,
    "SegformerForImageClassification": _PYRAMID,
    "SegformerForSemanticSegmentation": _PYRAMID,
    "GLPNForDepthEstimation": _PYRAMID,
    "ResNetForImageClassification": {**_STAGES, "embedding_size": 16},
    "RegNetForImageClassification": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "BitForImageClassification": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 4},
    "PoolFormerForImageClassification": _STAGES,
    "HGNetV2ForImageClassification": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 32, 48, 64],
        "stage_mid_channels": [8, 16, 16, 24],
        "stage_out_channels": [32, 48, 64, 64],
        "hidden_sizes": [32, 48, 64, 64],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.125},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.25},
    "SwiftFormerForImageClassification": {"embed_dims": [16, 32, 32, 64], "depths": [1, 1, 1, 1]},
    "ConvNextForImageClassification": {**_STAGES, "patch_size": 4},
    "ConvNextV2ForImageClassification": {**_STAGES, "patch_size": 4},
    "LevitForImageClassification": {
        "hidden_sizes": [16, 32, 48],
        "depths": [1, 1, 1],
        "image_size": 64,
        "patch_size": 16,
    },
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
    },
    "MobileViTForImageClassification": {
        "hidden_sizes": [32, 48, 64],
        "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 64],
        "patch_size": 2,
    },
    "VideoMAEForVideoClassification": {"num_frames": 2, "tubelet_size": 2},
    "TimesformerForVideoClassification": {"num_frames": 2},
    "ASTForAudioClassification": {"max_length": 64, "num_mel_bins": 32},
    "PatchTSMixerForPrediction": {"context_length": 32, "prediction_length": 8, "num_input_channels": 7},
    "PatchTSTForPrediction": {"context_length": 32, "prediction_length": 8, "num_input_channels": 7},
    "VipLlavaForConditionalGeneration": {"vision_feature_layers": [-1], **_PICTURE},
    "Gemma3ForConditionalGeneration": {"mm_tokens_per_image": 4, **_PICTURE},
    "LlavaForConditionalGeneration": _PICTURE,
    "PaliGemmaForConditionalGeneration": _PICTURE,
    "AyaVisionForConditionalGeneration": _PICTURE,
    "InternVLForConditionalGeneration": _PICTURE,
}


def architectures() -> dict[str, tuple[str, str]]:
    """Family and kind of input of every network, by its name."""
    found = {name: (family, kind) for (family, kind), names in TABLE.items() for name in names.split()}
    return found | {name: ("plain torch", "x") for name in PLAIN}


def built(name: str) -> tuple[nn.Module, list[Any]]:
    """A network with random weights in evaluation mode, and 8 batches for it."""
    torch.manual_seed(0)
    if name in PLAIN:
        model, x = PLAIN[name]()
        return model.eval(), [torch.randn(SAMPLES, *x) for _ in range(8)]
    import transformers

    kind = getattr(transformers, name)
    model = kind(kind.config_class(**small(kind.config_class, CHANGES.get(name, {}))))
    _, inputs = architectures()[name]
    return model.eval(), [INPUTS[inputs]() for _ in range(8)]


def small(kind: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that make it small."""
    default, parts = kind(), getattr(kind, "sub_configs", None) or {}
    sizes: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in parts or name not in SMALL or isinstance(value, bool):
            continue
        if isinstance(value, list | tuple):
            sizes[name] = [SMALL[name]] * len(value)
        elif isinstance(value, int | float) or name.endswith("token_id"):
            sizes[name] = SMALL[name]
    for name in parts:
        inner = getattr(default, name, None)
        if inner is not None:
            sizes[name] = {"model_type": inner.model_type, **small(type(inner), changes.get(name, {}))}
    return {**sizes, **{name: value for name, value in changes.items() if name not in parts}}


class _Last(nn.Module):
    """The last output of a recurrent network, through a Linear."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.hidden, self.out = recurrent, nn.Linear(width, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.recurrent(x)[0][:, -1]).relu())


class _UNet(nn.Module):
    """Two levels with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        return self.out(torch.cat([skip, self.up(self.inner(skip).relu())], 1).relu())


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))


def _separable() -> nn.Module:
    first = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    second = (
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
    )
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


# A network, and the shape of one sample.
PLAIN: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "perceptron": lambda: (_perceptron(), (32,)),
    "separable convolutions": lambda: (_separable(), (3, 16, 16)),
    "u-net": lambda: (_UNet(), (3, 16, 16)),
    "lstm": lambda: (_Last(nn.LSTM(16, 32, 2, batch_first=True), 32), (10, 16)),
    "gru": lambda: (_Last(nn.GRU(16, 32, batch_first=True, bidirectional=True), 64), (10, 16)),
    "transformer encoder": lambda: (_encoder(), (8, 32)),
}
