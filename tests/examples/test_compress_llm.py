"""A small decoder goes through the example; its table has a row for every kind of unit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from scripts import modules_of, one_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

modules = modules_of("compress_llm")
llm = one_of("compress_llm")


@pytest.fixture
def folder(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = "abcdefgh \n"
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    (tmp_path / "text").mkdir()
    own = tmp_path / "shakespeare_llama"
    config.save_pretrained(own)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, own / "model.safetensors")
    (own / "vocab.json").write_text(json.dumps([*letters]))
    numbers = torch.randint(len(letters), (12_000,)).tolist()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("".join(letters[i] for i in numbers))
    return tmp_path


def test_every_kind_of_unit_has_a_row(llm, folder, capsys):
    llm.main(folder, share=[0.8], count=24, distill=0)
    printed = capsys.readouterr().out
    assert all(unit in printed for unit in llm.UNITS)
    assert "80% of the MACs" in printed
    assert "…" not in printed


def test_a_model_writes_windows_of_its_own_and_reads_another_text(llm, folder):
    model = llm.decoder(folder / "shakespeare_llama")
    written = llm.own_text(model, 10)
    assert [one["input_ids"].shape for one in written] == [(8, llm.LENGTH), (2, llm.LENGTH)]
    again = llm.own_text(model, 10)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(written, again, strict=True))
    other = llm.other_text(folder)
    assert other.shape == (llm.OTHER, llm.LENGTH)
    assert other.max() < model.config.vocab_size
