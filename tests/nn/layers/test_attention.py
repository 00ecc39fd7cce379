"""Torch's attention with a layer for each projection: the same numbers, whatever it is asked."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils import parametrizations

from pysolve.nn.layers.attention import Attention, ignored_in_opened, openable, opened, together
from pysolve.nn.running import calling_layers


@st.composite
def attentions(draw):
    """Attention of torch's in evaluation mode, and all that it may be called with."""
    heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    width, queries, keys = heads * size, draw(st.integers(1, 4)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    sizes = {"kdim": draw(st.integers(1, 5)), "vdim": draw(st.integers(1, 5))} if draw(st.booleans()) else {}
    first, n = draw(st.booleans()), draw(st.sampled_from([None, 1, 3]))
    layer = nn.MultiheadAttention(width, heads, bias=draw(st.booleans()), batch_first=first, **sizes).eval()
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)

    def tokens(length, channels):
        shape = (length, channels) if n is None else (n, length, channels) if first else (length, n, channels)
        return torch.randn(shape)

    inputs = tokens(queries, width), tokens(keys, layer.kdim), tokens(keys, layer.vdim)
    if not sizes:
        inputs = (inputs[0], inputs[1], inputs[1]) if draw(st.booleans()) else inputs
    how = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    # The first key stays, so that there is something to attend to.
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    shape = draw(st.sampled_from([(queries, keys), (heads * (n or 1), queries, keys)]))
    masks = {"attn_mask": shape, "key_padding_mask": (keys,) if n is None else (n, keys)}
    for name in draw(st.sets(st.sampled_from(sorted(masks)))) if kind != "none" else ():
        mask = torch.rand(masks[name]) < 0.4
        mask[..., 0] = False
        how[name] = mask if kind == "bool" else torch.randn(masks[name])
    return layer, inputs, how


@given(attentions())
def test_opened_attention_gives_what_torchs_gives(case):
    layer, inputs, how = case
    with torch.no_grad(), calling_layers():
        y, weights = layer(*inputs, **how)
        ours, own = opened(layer)(*inputs, **how)
    assert ours.shape == y.shape
    assert (own is None) == (weights is None)
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-6)
    if weights is not None:
        torch.testing.assert_close(own, weights, rtol=1e-5, atol=1e-6)


@given(attentions())
def test_closed_again_it_is_the_layer_that_it_was(case):
    layer, _, _ = case
    again = together(opened(layer), layer)
    assert {name: id(one) for name, one in layer.state_dict().items()}.keys() == again.state_dict().keys()
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in layer.state_dict().items())
    assert vars(again).keys() == vars(layer).keys()
    assert again.training == layer.training


def test_a_causal_mask_may_be_told_by_a_word():
    layer, x = nn.MultiheadAttention(6, 2, batch_first=True).eval(), torch.randn(2, 5, 6)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    how = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(opened(layer)(x, x, x, **how)[0], layer(x, x, x, **how)[0])
    with pytest.raises(RuntimeError, match="attn_mask must be given"):
        opened(layer)(x, x, x, is_causal=True)


def test_under_autocast_results_have_the_types_of_torchs():
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    mask = torch.ones(5, 5).triu(1).bool()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (one(x, x, x, attn_mask=mask) for one in (layer, opened(layer)))
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.02)


def test_dropout_works_in_training_alone():
    layer, x = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True), torch.randn(2, 5, 6)
    network = opened(layer)
    for needed in (True, False):
        assert not torch.equal(*(network.train()(x, x, x, need_weights=needed)[0] for _ in range(2)))
        torch.testing.assert_close(
            network.eval()(x, x, x, need_weights=needed), layer.eval()(x, x, x, need_weights=needed)
        )


def test_the_network_itself_stays_as_it_is_and_shares_its_parameters():
    model = nn.Sequential(nn.Linear(3, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))
    before = copy.deepcopy(model.state_dict())
    network = opened(model)
    assert type(model[1].self_attn) is nn.MultiheadAttention
    assert network[0].weight is model[0].weight
    q = network[1].self_attn.q_proj.weight
    assert q.data_ptr() == model[1].self_attn.in_proj_weight.data_ptr()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert network[1].self_attn.out_proj.weight is model[1].self_attn.out_proj.weight
    assert torch.equal(network[1].self_attn.in_proj_weight, model[1].self_attn.in_proj_weight)
    assert torch.equal(network[1].self_attn.in_proj_bias, model[1].self_attn.in_proj_bias)
    assert network[1].self_attn.embed_dim == 6


def test_what_torchs_layers_ask_of_projections_that_differ():
    own = opened(nn.MultiheadAttention(6, 2, bias=False))
    assert own.in_proj_bias is None
    own.v_proj.bias = nn.Parameter(torch.ones(6))
    assert own.in_proj_bias.tolist() == [0.0] * 12 + [1.0] * 6
    assert opened(nn.MultiheadAttention(6, 2, kdim=4)).in_proj_weight is None


def test_networks_without_attention_are_returned_themselves():
    model = nn.Linear(3, 2)
    assert opened(model) is model
    assert openable(model) == {}


@pytest.mark.parametrize("frozen", [True, False])
def test_hooks_modes_and_frozen_parameters_come_along(frozen):
    model, seen = nn.TransformerEncoderLayer(6, 2, 8).requires_grad_(not frozen), []
    model.self_attn.register_forward_hook(lambda *_: seen.append(1))
    model.eval()
    network = opened(model)
    network(torch.randn(4, 2, 6))
    assert seen
    assert not network.self_attn.training
    assert all(one.requires_grad is not frozen for one in network.parameters())


@pytest.mark.parametrize("how", [{}, {"kdim": 4, "vdim": 5}])
def test_each_parameter_stays_frozen_or_trained(how):
    layer = nn.MultiheadAttention(6, 2, **how)
    layer.in_proj_bias.requires_grad_(False)
    layer.out_proj.weight.requires_grad_(False)
    if how:
        layer.v_proj_weight.requires_grad_(False)
    with torch.no_grad():
        own = opened(layer)
    frozen = {name for name, one in own.named_parameters() if not one.requires_grad}
    expected = {"q_proj.bias", "k_proj.bias", "v_proj.bias", "out_proj.weight"}
    assert frozen == expected | ({"v_proj.weight"} if how else set())


def _shared():
    model = nn.Sequential(nn.MultiheadAttention(6, 2), nn.MultiheadAttention(6, 2))
    model[1].in_proj_weight = model[0].in_proj_weight
    return model


def _shared_output():
    model = nn.Sequential(nn.MultiheadAttention(6, 2), nn.MultiheadAttention(6, 2))
    model[1].out_proj = model[0].out_proj
    return model


def _hooked():
    layer = nn.MultiheadAttention(6, 2)
    layer.out_proj.register_forward_hook(lambda *_: None)
    return layer


class Own(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "make",
    [
        _shared,
        _shared_output,
        _hooked,
        lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True),
        lambda: nn.MultiheadAttention(6, 2, add_zero_attn=True),
        lambda: Own(6, 2),
        lambda: parametrizations.weight_norm(nn.MultiheadAttention(6, 2), "in_proj_weight"),
    ],
)
def test_attention_of_other_kinds_stays_closed(make):
    model = make()
    assert opened(model) is model


def test_one_layer_under_two_names_stays_one():
    layer = nn.MultiheadAttention(6, 2)
    network = opened(nn.ModuleList([layer, layer]))
    assert type(network[0]) is Attention
    assert network[0] is network[1]


def test_what_is_to_be_ignored_is_found_closed_and_opened():
    model = nn.TransformerEncoderLayer(6, 2, 8)
    inside = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    for one in (nn.MultiheadAttention, model.self_attn, "self_attn", r"re:self_attn"):
        assert ignored_in_opened(model, [one]) == {"self_attn", *inside}
    assert ignored_in_opened(model, ["self_attn.q_proj"]) == {"self_attn.q_proj"}
    assert ignored_in_opened(model, [nn.Linear]) == {*inside, "linear1", "linear2"}
