"""Opens saved networks by transformers alone, in a process of its own, and writes what they compute.

Run as a script, with a file of jobs; nothing of pysolve is imported there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# A JSON object, and a network of transformers.
Json: TypeAlias = dict[str, Any]
PretrainedModel: TypeAlias = Any


def outputs_of(network: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """All tensors that a network returns, without caches."""
    with torch.no_grad():
        return [value.contiguous() for value in _tensors(network(*args, **kwargs))]


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _opened(job: Json) -> PretrainedModel:
    """The network in a folder, by the class that its configuration names."""
    transformers = import_module("transformers")
    folder, options = job["folder"], {"dtype": "auto", **job["options"]}
    record = json.loads((Path(folder) / "config.json").read_text())
    if "block_configs" in record:
        return _by_blocks(transformers, Path(folder), record)
    kind = getattr(transformers, record["architectures"][0])
    network, told = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    wrong = {what: sorted(map(str, names)) for what, names in told.items() if names}
    if wrong:
        raise ValueError(f"the folder and its configuration do not agree: {wrong}")
    return network


class _Nothing(nn.Module):
    """A branch that adds nothing: of attention a tuple, as Llama's own gives it."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(named["hidden_states"] if x is None else x)
        return (zeros, None) if self.is_attention else zeros


def _by_blocks(transformers: ModuleType, folder: Path, record: Json) -> PretrainedModel:
    """A Llama whose branches are as its ``block_configs`` say, of Llama's own layers."""
    made = import_module("transformers.models.llama.modeling_llama").LlamaMLP
    known = {name: value for name, value in record.items() if name not in ("block_configs", "model_type")}
    config = transformers.LlamaConfig(**known)
    network = transformers.LlamaForCausalLM(config)
    for layer, block in zip(network.model.layers, record["block_configs"], strict=True):
        heads, ffn = block["attention"], block["ffn"]
        if heads["no_op"]:
            layer.input_layernorm, layer.self_attn = nn.Identity(), _Nothing(True)
        elif config.num_attention_heads // heads["n_heads_in_group"] != config.num_key_value_heads:
            raise ValueError("key/value heads differ")
        if ffn["no_op"]:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), _Nothing(False)
            continue
        width = -(-int(2 * ffn["ffn_mult"] * config.hidden_size / 3) // 256) * 256
        layer.mlp = made(transformers.LlamaConfig(**{**known, "intermediate_size": width}))
    told = network.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    network.tie_weights()
    if told.unexpected_keys:
        raise ValueError(f"the file has {told.unexpected_keys} besides")
    if told.missing_keys and not (told.missing_keys == ["lm_head.weight"] and config.tie_word_embeddings):
        raise ValueError(f"the file has no {told.missing_keys}")
    return network.to(getattr(torch, record["dtype"]))


def main(path: str) -> None:
    """Do the jobs of a file."""
    for job in json.loads(Path(path).read_text()):
        torch.set_num_threads(job["threads"])
        network = _opened(job).eval().to(job["device"])
        for module in network.modules():
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        tensors = {name: value.to(job["device"]) for name, value in load_file(job["inputs"]).items()}
        args = [tensors.pop(name) for name in sorted(tensors) if name.isdigit()]
        found = outputs_of(network, args, {**job["plain"], **tensors})
        save_file({str(i): value.cpu() for i, value in enumerate(found)}, job["outputs"])
    if "pysolve" in sys.modules:
        raise ImportError("pysolve was imported.")


if __name__ == "__main__":
    main(sys.argv[1])
