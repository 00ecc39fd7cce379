"""MACs are half of what torch counts when attention and recurrent layers run operator by operator."""

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import NETWORKS, Net, attention, chains, network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pysolve as ps
from pysolve.errors import DataError
from pysolve.nn.cost import counting
from pysolve.nn.cost.counting import calls, layer_macs, macs
from pysolve.nn.running import evaluating, forward


def torch_macs(model, batch):
    """Half of torch's flops, with nothing fused: the registry lacks kernels that do more than one thing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
            counter = stack.enter_context(FlopCounterMode(display=False))
            forward(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_takes_what_torch_counts(name):
    model, batch = network(name)
    assert macs(model, batch) == torch_macs(model, batch)


@given(chains())
def test_any_convolutional_network_takes_what_torch_counts(example):
    model, batch = example
    assert macs(model, batch) == torch_macs(model, batch)


@given(
    st.sampled_from([(12, 3, 3, False), (16, 4, 2, True), (8, 2, 1, False)]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
)
def test_attention_of_any_heads_and_length_takes_what_torch_counts(shape, n, length, dot):
    width, heads, kv_heads, rotary = shape
    model = attention(width, heads, kv_heads=kv_heads, rotary=rotary, dot=dot)[0].eval()
    x, d = torch.zeros(n, length, 5), width // heads
    assert macs(model, x) == torch_macs(model, x)
    projections = n * length * (5 * (width + 2 * kv_heads * d) + 4 * width)
    assert macs(model, x) == projections + n * heads * length**2 * 2 * d


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 6, 2, batch_first=True),
        nn.LSTM(4, 6, bidirectional=True),
        nn.LSTM(4, 6, proj_size=3),
        nn.GRU(4, 6, 2, bidirectional=True),
        nn.RNN(4, 6),
    ],
    ids=["lstm", "both ways", "projected", "gru", "rnn"],
)
def test_recurrent_layers_take_what_torch_counts(layer):
    x = torch.zeros(3, 5, 4)
    assert layer_macs(nn.Sequential(layer), x) == {"0": torch_macs(layer, x)}


def test_a_recurrent_layer_counts_by_hand():
    assert macs(nn.LSTM(4, 6, batch_first=True), torch.zeros(2, 5, 4)) == 2 * 5 * 4 * 6 * (4 + 6)


@pytest.mark.parametrize("nested", [False, True])
def test_encoders_are_counted_whole_whatever_is_padded(nested):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    model = Net(lambda net, x: net.encoder(x, src_key_padding_mask=x[..., 0] > 9), encoder=encoder)
    x = torch.zeros(2, 6, 8)
    x[1, 4:] = 10
    assert macs(model, x) == torch_macs(model, x) == 2 * 2 * (6 * 8 * (4 * 8 + 2 * 12) + 2 * 6 * 6 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_products_of_vectors_and_pairs_count():
    assert macs(Net(lambda net, x: x @ net.w, w=nn.Parameter(torch.zeros(4))), torch.zeros(3, 4)) == 12
    assert macs(Net(lambda net, x: torch.einsum("bi,bi->b", x, x)), torch.zeros(3, 4)) == 12
    bilinear = Net(lambda net, x: net.pair(x, x), pair=nn.Bilinear(4, 4, 5))
    assert macs(bilinear, torch.zeros(3, 4)) == 3 * 5 * 4 * 4


def test_whatever_multiplies_is_named_by_the_module_around_it():
    def block(net, x):
        return net.fc(x) @ net.w

    inner = Net(block, fc=nn.Linear(4, 6), w=nn.Parameter(torch.zeros(6, 2)))
    model = Net(lambda net, x: net.block(x) @ net.block(x).mT, block=inner)
    assert layer_macs(model, torch.zeros(1, 3, 4)) == {
        "block.fc": 2 * 3 * 24,
        "block": 2 * 3 * 12,
        "": 3 * 3 * 2,
    }


@pytest.mark.parametrize(
    "name", ["attention", "grouped_queries", "multihead_attention", "grouped", "transposed"]
)
def test_a_call_says_what_it_takes_at_other_sizes(name):
    model, batch = network(name)
    for call in calls(model, batch):
        assert call.at(call.sizes) == call.macs > 0
        assert call.times(0.5).at(call.sizes) == call.times(0.5).macs == call.macs / 2


def test_layers_in_forms_of_this_package_count_by_what_they_multiply():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)), torch.randn(3, 40)
    sparse = ps.prune(model, amount=0.9, layout="sparse").model
    integers = ps.quantize(model, [x] * 4, scheme="int8", progress=False).model
    assert layer_macs(sparse, x) == {"0": 3 * 120, "2": 3 * 15}
    assert layer_macs(integers, x) == layer_macs(model, x) == {"0": 3 * 1200, "2": 3 * 150}


def test_networks_that_torch_cannot_count_are_counted_by_their_layers():
    def run(net, x):
        ragged = torch.nested.nested_tensor([x[0, :2], x[1]], layout=torch.jagged)
        return net.fc(ragged).values()

    assert layer_macs(Net(run, fc=nn.Linear(4, 3)), torch.zeros(2, 5, 4)) == {"fc": 7 * 12}


def test_errors_of_the_network_itself_are_its_own():
    with pytest.raises(DataError, match=r"Linear itself refuses the batch.*shapes cannot be multiplied"):
        macs(nn.Linear(3, 2), torch.zeros(2, 4))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_compiled_networks_are_counted_without_a_word():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert macs(torch.compile(model, backend="eager"), torch.zeros(2, 4)) == 2 * 35


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_without_values_the_same_calls_are_counted(name, monkeypatch):
    model, batch = network(name)
    seen = [(call.layer, call.macs, call.sizes) for call in calls(model, batch)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(counting, "_LARGE", 0)
    monkeypatch.setattr(counting, "_LONG", 0)
    assert [(call.layer, call.macs, call.sizes) for call in calls(model, batch)] == seen
    after = model.state_dict()
    assert all(type(after[key]) is type(value) and after[key].equal(value) for key, value in before.items())


def test_code_that_asks_for_values_is_counted_with_them(monkeypatch):
    model = Net(lambda net, x: net.fc(x) if x.sum() > 0 else x, fc=nn.Linear(4, 3))
    monkeypatch.setattr(counting, "_LARGE", 0)
    monkeypatch.setattr(counting, "_LONG", 0)
    assert macs(model, torch.ones(2, 4)) == 24
