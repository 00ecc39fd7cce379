"""Folders of transformers: opened again without pysolve, and equal, or not written at all."""

import copy
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, batches, made, opened_here
from safetensors.torch import load_file

import pysolve as ps
from pysolve.nn.pretrained import reopening
from pysolve.nn.pretrained.folder import FILE, SUMS, write_stock
from pysolve.nn.pretrained.reopening import reopened

transformers = pytest.importorskip("transformers")

QUIET = {"progress": False, "latency": False}
SLOW = {*FAMILIES} - {"bert", "llama", "mixtral"}


@dataclass
class Case:
    """A network, the folder that was written of it, and how far apart they are."""

    original: torch.nn.Module
    model: torch.nn.Module
    folder: Path
    difference: float


@cache
def compressed(name):
    """A family's network with half of the widths that its configuration counts, what it was, and batches."""
    model, batch = made(transformers, name)
    data = batches(batch)
    return ps.compress(model, data, keep=0.5, widths="uniform", **QUIET), model, data


def halved(name):
    result, model, _ = compressed(name)
    return model, result.model


def with_bias():
    model, _ = made(transformers, "llama")
    model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.randn(16))
    return model, model


def in_blocks():
    """A Llama of two layers, one with half of the neurons."""
    config = transformers.LlamaConfig(
        **{"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
        intermediate_size=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    keep = {"model.layers.0.mlp.gate_proj": 0.5}
    return model, ps.compress(model, batches(batch), keep=keep, refit="none", **QUIET).model


@cache
def deep(kind="Llama"):
    """A decoder of three layers with neurons that the format of blocks can count, and its batches."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 512}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=30, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model, batches({"input_ids": torch.arange(12).view(2, 6)})


def without(keep, kind="Llama", **options):
    """The decoder without some channels."""
    model, data = deep(kind)
    named = {f"model.layers.{i}.{name}": size for (i, name), size in keep.items()}
    return ps.compress(model, data, keep=named, **{"widths": "uniform", **QUIET, **options})


HEADS, NEURONS = "self_attn.q_proj", "mlp.gate_proj"


def fewer_layers():
    """No second layer, and half of the neurons in the others."""
    return deep()[0], without({(1, HEADS): 0, (1, NEURONS): 0, (0, NEURONS): 0.5}).model


def without_branches():
    """No attention in the second layer, no MLP in the third."""
    return deep()[0], without({(1, HEADS): 0, (2, NEURONS): 0}).model


def in_half_precision():
    model, smaller = halved("llama")
    return model, copy.deepcopy(smaller).bfloat16()


def padded():
    """A batch whose second text is shorter."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.arange(12).view(2, 6), "attention_mask": mask}


def written(names, folder):
    """Cases by name, all opened in one process."""
    makers = {one.__name__: one for one in (with_bias, in_blocks, in_half_precision)}
    makers |= {one.__name__: one for one in (fewer_layers, without_branches)}
    pairs = {name: makers[name]() if name in makers else halved(name) for name in names}
    for name in names:
        (folder / name).mkdir()
    given = {"in_half_precision": padded()}
    apart = reopened(
        [write_stock(model, folder / name, given.get(name)) for name, (_, model) in pairs.items()]
    )
    return {
        name: Case(*pair, folder / name, one) for (name, pair), one in zip(pairs.items(), apart, strict=True)
    }


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    names = [name for name in FAMILIES if name not in SLOW]
    names += ["with_bias", "in_blocks", "in_half_precision", "fewer_layers", "without_branches"]
    return written(names, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return written([*SLOW], tmp_path_factory.mktemp("slow"))


def assert_opens(case):
    """The same outputs to the bit, stock names and keys, fewer parameters, and the same words."""
    assert case.difference == 0
    kind, record = type(case.model), json.loads((case.folder / "config.json").read_text())
    assert record["architectures"] == [kind.__name__]
    assert record.keys() <= case.original.config.to_dict().keys() | {"head_dim", "transformers_version"}
    opened = kind.from_pretrained(case.folder)
    assert sum(map(torch.numel, opened.parameters())) < sum(map(torch.numel, case.original.parameters()))
    assert_speaks_alike(opened, case.model)


def assert_speaks_alike(one, other):
    """Generation, with caches, where networks generate."""
    if not one.can_generate():
        return
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    inputs = tokens if one.main_input_name == "input_ids" else torch.randn(2, 4, 16)
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(one.generate(inputs, **options), other.generate(inputs, **options))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SLOW])
def test_uniform_widths_open_in_a_fresh_process(quick, name):
    assert_opens(quick[name])


def test_fewer_experts_are_a_number_of_the_configuration(quick):
    case = quick["mixtral"]
    assert case.model.config.num_local_experts == 4
    opened = type(case.model).from_pretrained(case.folder)
    assert opened.config.num_local_experts == 2
    assert opened.config.num_experts_per_tok == 2
    assert opened.model.layers[0].mlp.gate.weight.shape == (2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_other_families_open_too(slow, name):
    assert_opens(slow[name])


def test_weights_are_stored_once_under_the_names_of_the_class(quick):
    stored = load_file(quick["llama"].folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored.keys() < quick["llama"].model.state_dict().keys()
    stored = load_file(quick["mixtral"].folder / "model.safetensors")
    assert any(".experts.0." in name for name in stored)


def test_new_biases_bring_zeros_with_them(quick):
    case = quick["with_bias"]
    assert case.difference == 0
    stored = load_file(case.folder / "model.safetensors")
    assert not stored["model.layers.0.mlp.gate_proj.bias"].any()
    assert stored["model.layers.1.mlp.down_proj.bias"].any()


def test_llamas_of_different_layers_are_blocks(quick):
    case = quick["in_blocks"]
    assert case.difference == 0
    record = json.loads((case.folder / "config.json").read_text())
    assert record["architectures"] == ["DeciLMForCausalLM"]
    assert [one["ffn"]["ffn_mult"] * 16 / 1.5 for one in record["block_configs"]] == [256, 512]


def test_layers_that_add_nothing_are_counted_out(quick):
    case = quick["fewer_layers"]
    assert_opens(case)
    record = json.loads((case.folder / "config.json").read_text())
    assert (record["num_hidden_layers"], record["intermediate_size"]) == (2, 256)
    assert len(case.model.model.layers) == case.model.config.num_hidden_layers == 3


def test_llamas_without_a_branch_are_blocks(quick):
    case = quick["without_branches"]
    assert case.difference == 0
    blocks = json.loads((case.folder / "config.json").read_text())["block_configs"]
    assert [one["attention"]["no_op"] for one in blocks] == [False, True, False]
    assert [one["ffn"]["no_op"] for one in blocks] == [False, False, True]
    stored = load_file(case.folder / "model.safetensors")
    assert not any(name.startswith("model.layers.1.self_attn") for name in stored)
    assert "model.layers.1.input_layernorm.weight" not in stored
    assert "model.layers.2.post_attention_layernorm.weight" not in stored


@pytest.mark.slow
def test_what_no_folder_says_of_branches_is_refused_with_a_remedy(tmp_path):
    kept = without({(1, HEADS): 0}, "Qwen2")
    with pytest.raises(ps.PysolveError, match=r"Qwen2ForCausalLM describes model\.layers\.1, one of whose"):
        ps.save_pretrained(kept, tmp_path / "out")
    left = without({(1, HEADS): 0}, widths="per_layer")
    with pytest.raises(ps.PysolveError, match=r"has left a constant: widths=\"uniform\" leaves none"):
        ps.save_pretrained(left, tmp_path / "out")
    odd = without({(1, HEADS): 0, (0, NEURONS): 0.3})
    with pytest.raises(ps.PysolveError, match=r"multiples of 256 in block_configs, got"):
        ps.save_pretrained(odd, tmp_path / "out")
    assert ps.save_pretrained(odd, tmp_path / "out", stock=False).difference == 0


@pytest.fixture(scope="module")
def small():
    """A compressed Llama, what it was, and its batches."""
    return compressed("llama")


def test_a_folder_is_written_whole_with_what_belongs_to_it(small, tmp_path, monkeypatch):
    result, model, _ = small
    monkeypatch.setattr(reopening, "_run", opened_here)
    home = tmp_path / "home"
    model.save_pretrained(home)
    (home / "tokenizer.json").write_text("{}")
    (home / "notes.txt").write_text("mine")
    result.model.config._name_or_path = result.model.name_or_path = str(home)
    try:
        found = ps.save_pretrained(result, tmp_path / "out")
    finally:
        result.model.config._name_or_path = result.model.name_or_path = ""
    assert found == ps.Pretrained(tmp_path / "out", stock=True, difference=0.0)
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", SUMS}
    assert {*os.listdir(tmp_path / "out")} == files
    assert {*os.listdir(tmp_path)} == {"home", "out"}
    assert type(ps.load_pretrained(tmp_path / "out")) is type(model)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ps.save_pretrained(result, tmp_path / "out")
    assert result.model.config.num_attention_heads == 4


def test_padded_batches_and_half_precision_compare_too(quick):
    case = quick["in_half_precision"]
    assert case.difference == 0
    assert json.loads((case.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert ps.load_pretrained(case.folder).dtype == torch.bfloat16


def test_nothing_is_left_where_the_class_computes_something_else(small, tmp_path, monkeypatch):
    result, _, _ = small
    monkeypatch.setattr(reopening, "_run", opened_here)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    handle = result.model.lm_head.register_forward_hook(lambda *call: 2 * call[-1])
    try:
        with pytest.raises(ps.PysolveError, match=r"gives other outputs, 0\.5 of the largest apart"):
            ps.save_pretrained(result, tmp_path / "out", batch=padded(), overwrite=True)
    finally:
        handle.remove()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["mine"]


class Words:
    """A tokenizer, as far as it is saved."""

    def save_pretrained(self, folder):
        (Path(folder) / "words.json").write_text("[]")


def test_what_no_configuration_describes_is_saved_with_its_plan(small, tmp_path):
    _, model, data = small
    own = ps.low_rank(model, data, rank=2, layout="factored", **QUIET)
    with pytest.raises(ps.PysolveError, match=r"q_proj\.inner\.weight.*stock=False") as error:
        ps.save_pretrained(own, tmp_path / "out")
    assert 'widths="uniform"' in str(error.value)
    assert os.listdir(tmp_path) == []
    integers = ps.quantize(model, data, scheme="int8-dynamic", **QUIET)
    for number, result in enumerate((own, integers)):
        folder = tmp_path / str(number)
        found = ps.save_pretrained(result, folder, stock=False, tokenizer=Words())
        assert (found.stock, found.difference) == (False, 0.0)
        files = {"config.json", "generation_config.json", FILE, SUMS, "words.json"}
        assert {*os.listdir(folder)} == files
        opened = ps.load_pretrained(folder)
        assert not any(tensor.is_meta for tensor in (*opened.parameters(), *opened.buffers()))
        assert_speaks_alike(opened, result.model)


def test_layers_that_differ_are_named(small, tmp_path):
    _, model, data = small
    result = ps.compress(model, data, keep={"model.layers.0.mlp.gate_proj": 5}, **QUIET)
    with pytest.raises(ps.PysolveError) as error:
        ps.save_pretrained(result, tmp_path / "out")
    said = str(error.value)
    assert "intermediate_size would be 5 (model.layers.0.mlp.gate_proj" in said
    assert "multiples of 256 in block_configs, got 5" in said
    assert ps.save_pretrained(result, tmp_path / "out", stock=False).difference == 0


def test_what_is_no_network_of_the_library_is_refused(small, tmp_path):
    result, _, _ = small
    with pytest.raises(TypeError, match="what compress returned, got LlamaForCausalLM"):
        ps.save_pretrained(result.model, tmp_path / "out")
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plain = ps.compress(model, [torch.randn(40, 4)], keep=0.5, **QUIET)
    with pytest.raises(ps.PysolveError, match=r"Sequential is no network of transformers: use pysolve\.save"):
        ps.save_pretrained(plain, tmp_path / "out")
    with pytest.raises(ps.PysolveError, match="there is no folder"):
        ps.save_pretrained(result, tmp_path / "none" / "out")
    with pytest.raises(ps.DataError, match=r"there is no folder .*none\."):
        ps.load_pretrained(tmp_path / "none")
    with pytest.raises(ps.DataError, match="no configuration of transformers"):
        ps.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ps.DataError, match="names no class"):
        ps.load_pretrained(tmp_path)
