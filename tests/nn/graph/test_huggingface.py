"""Networks of the transformers library: their neurons and heads are found, and can be cut."""

import numpy as np
import pytest
import torch
from cuts import assert_cuts_cleanly, assert_poison_stays_inside, free

from pysolve.nn.cut.apply import apply
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=30, max_position_embeddings=16, **SMALL)), {
        "input_ids": torch.arange(12).view(2, 6),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    }


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=30, num_key_value_heads=2, max_position_embeddings=16, **SMALL)
    return LlamaForCausalLM(config), {"input_ids": torch.arange(12).view(2, 6)}


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return ViTForImageClassification(config), torch.randn(2, 3, 8, 8)


def networks():
    return [
        pytest.param(build, heads, id=build.__name__) for build, heads in ((bert, 4), (llama, 2), (vit, 4))
    ]


@pytest.mark.parametrize(("build", "heads"), networks())
def test_neurons_and_heads_are_found_and_cut(build, heads):
    torch.manual_seed(0)
    model, batch = build()
    sites = find_sites(model.eval(), batch)
    stream = [site for site in free(sites) if site.norms]
    assert [site.channels for site in stream] == [16] * (build is not bert)
    sites = [site for site in sites if site not in stream]
    assert [site.channels for site in free(sites)] == 2 * [heads, 12]
    for site in free(sites)[::2]:
        assert len(site.writers) == 3
        assert all(len(np.unique(table)) == table.size for table in site.rows.values())
        assert site.columns[site.readers[0]].shape == (heads, 16 // heads)
    assert_poison_stays_inside(model, batch, sites)
    assert_cuts_cleanly(model, batch, sites, 0)
    assert_cuts_cleanly(model, batch, sites, 1)


def test_the_stream_says_what_holds_it():
    model, batch = bert()
    assert find_sites(model, batch)[0].pinned == "the network's output"


def test_the_stream_of_a_decoder_is_one_site_with_its_norms():
    model, batch = llama()
    stream = find_sites(model, batch)[0]
    assert (stream.channels, len(stream.norms), stream.pinned) == (16, 5, None)
    assert_cuts_cleanly(model, batch, [stream], 0)
    small = apply(model, Plan((Collapse(stream, np.arange(4)),)), probe=batch)
    norm = small.model.layers[0].input_layernorm
    torch.testing.assert_close(norm.weight.data, torch.full((4,), 2.0))
    assert norm.variance_epsilon == pytest.approx(4 * model.model.norm.variance_epsilon)


def test_queries_keep_their_keys():
    model, batch = llama()
    site = free(find_sites(model, batch))[1]
    assert [table.shape[1] for table in site.rows.values()] == [8, 4, 4]
    assert [name.rpartition(".")[2] for name in site.writers] == ["q_proj", "k_proj", "v_proj"]
