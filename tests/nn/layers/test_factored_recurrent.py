"""Recurrent layers with products for weights give what torch's give with the products as weights."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pysolve as ps
from pysolve.forms import LowRank
from pysolve.nn import to_dense
from pysolve.nn.cost.counting import macs
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.layers.factored_recurrent import FactoredLSTM, FactoredRecurrent, with_factors

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
WAYS = [
    {},
    {"batch_first": True, "bias": False},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
]
CASES = [(kind, how) for kind in KINDS for how in WAYS]
CASES += [(nn.LSTM, {"proj_size": 3, "num_layers": 2}), (nn.RNN, {"nonlinearity": "relu"})]


def pair(kind, how, rank=2, dtype=torch.float64):
    """A layer with products for all of its matrices, and torch's with the same weights."""
    torch.manual_seed(0)
    dense = kind(5, 6, **how).to(dtype).eval()
    layer = dense
    for name, weight in dense.named_parameters():
        if name.startswith("weight"):
            k = min(rank, *weight.shape)
            outer, inner = torch.randn(len(weight), k), torch.randn(k, weight.shape[1]) / 3
            layer = with_factors(layer, name, LowRank(outer.numpy(), inner.numpy()))
            weight.data = (outer.to(dtype) @ inner.to(dtype)).clone()
    dense._init_flat_weights()
    return layer, dense


def flat(made):
    """All numbers of what a recurrent layer returns."""
    parts = [made] if isinstance(made, torch.Tensor) else [*made]
    parts = [one.data if isinstance(one, PackedSequence) else one for one in parts if one is not None]
    return torch.cat([one.flatten() if isinstance(one, torch.Tensor) else flat(one) for one in parts])


def calls(layer):
    """A batch, one sample, states that are given, and a packed batch."""
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = x.transpose(0, 1) if layer.batch_first else x
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = (torch.randn(count, 3, n, dtype=torch.float64) for n in (layer.proj_size or 6, 6))
    yield (first,)
    yield (first, (h, c) if isinstance(layer, nn.LSTM) else h)
    yield (x[:, 0],)
    yield (pack_padded_sequence(x, [4, 3, 1]),)


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_a_layer_gives_what_it_gives_with_the_products_as_weights(kind, how):
    layer, dense = pair(kind, how)
    assert isinstance(layer, kind)
    assert isinstance(layer, FactoredRecurrent)
    for given in calls(dense):
        torch.testing.assert_close(flat(layer(*given)), flat(dense(*given)))
    whole = to_dense(layer)
    assert type(whole) is kind
    assert [*whole.state_dict()] == [*dense.state_dict()]
    for given in calls(dense):
        torch.testing.assert_close(flat(whole(*given)), flat(layer(*given)))


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_gradients_are_those_of_the_products(kind, how):
    layer, dense = pair(kind, how)
    (given,) = next(calls(dense))
    for one in (layer, dense):
        flat(one(given)).square().sum().backward()
    for name in layer.factored:
        outer, inner = (layer._parameters[name + part] for part in ("_outer", "_inner"))
        gradient = getattr(dense, name).grad
        torch.testing.assert_close(outer.grad, gradient @ inner.detach().T)
        torch.testing.assert_close(inner.grad, outer.detach().T @ gradient)
    # Nothing of a call stays behind that would have no copies.
    assert torch.equal(flat(copy.deepcopy(layer)(given)), flat(layer(given)))


def test_copies_files_and_types_are_those_of_any_layer():
    layer, dense = pair(nn.GRU, {})
    (given,) = next(calls(dense))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(flat(other(given)), flat(layer(given)))
    other, _ = pair(nn.GRU, {}, rank=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(flat(other(given)), flat(layer(given)))
    single = copy.deepcopy(layer).float()
    assert single(given.float())[0].dtype is torch.float32
    torch.testing.assert_close(flat(single(given.float())).double(), flat(layer(given)), atol=1e-5, rtol=1e-5)
    assert layer.weight_hh_l0.shape == dense.weight_hh_l0.shape
    assert "ranks: weight_ih_l0=2, weight_hh_l0=2" in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(flat(single(given.float()))).all()


def test_factors_may_be_parametrised_and_replicated():
    layer, dense = pair(nn.LSTM, {})
    (given,) = next(calls(dense))
    replica = layer._replicate_for_data_parallel()
    for name, one in layer.named_parameters():
        setattr(replica, name, one)
    assert torch.equal(flat(replica(given)), flat(layer(given)))
    wanted = flat(layer(given))
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0_inner")
    torch.testing.assert_close(flat(layer(given)), wanted)


def test_what_is_trained_stays_trained():
    dense = nn.LSTM(5, 6)
    dense.weight_hh_l0.requires_grad_(False)
    form = LowRank(np.ones((24, 2)), np.ones((2, 6)))
    layer = with_factors(dense, "weight_hh_l0", form)
    assert [name for name, one in layer.named_parameters() if not one.requires_grad] == [
        "weight_hh_l0_outer",
        "weight_hh_l0_inner",
    ]
    whole = layer.to_dense()
    assert [name for name, one in whole.named_parameters() if not one.requires_grad] == ["weight_hh_l0"]


def test_exported_programs_multiply_the_factors():
    layer, dense = pair(nn.LSTM, {"batch_first": True})
    (given,) = next(calls(dense))
    program = torch.export.export(layer, (given,)).module()
    torch.testing.assert_close(flat(program(given)), flat(dense(given)))


def test_costs_are_those_of_the_factors_and_of_their_product():
    layer, dense = pair(nn.LSTM, {}, dtype=torch.float32)
    x = torch.zeros(7, 3, 5)
    assert parameters(layer) == sum(one.numel() for one in layer.parameters()) == 2 * (24 + 24 + 5 + 6) + 48
    assert nbytes(layer) == 4 * parameters(layer)
    # Of 21 steps; the other weight is multiplied out once.
    saved = 21 * (24 * 5 - 2 * (24 + 5))
    assert macs(layer, x) == macs(dense, x) - saved + 24 * 2 * 6
    both, dense = pair(nn.LSTM, {"bidirectional": True}, dtype=torch.float32)
    assert macs(both, x) == macs(dense, x) + 2 * 24 * 2 * (5 + 6)


def test_plans_make_and_refuse_them():
    model = nn.Sequential(nn.LSTM(5, 6))
    form = LowRank(np.ones((24, 2)), np.ones((2, 6)))
    made = ps.apply(model, ps.Plan(forms={"0.weight_hh_l0": form}), probe=torch.randn(4, 3, 5))
    assert type(made[0]) is FactoredLSTM
    (found,) = made[0].forms().values()
    assert np.array_equal(found.outer, form.outer)
    for forms, message in (
        ({"0.weight_ih_l0": form}, "expected a form of shape"),
        ({"0.weight_hh_l0": LowRank(np.ones((24, 7)), np.ones((7, 6)))}, "rank of at most 6"),
        ({"0.bias_hh_l0": LowRank(np.ones((24, 1)), np.ones((1, 1)))}, "only a layer's weight"),
    ):
        with pytest.raises(ps.CollapseError, match=message):
            ps.apply(model, ps.Plan(forms=forms))

    class Own(nn.LSTM):
        pass

    with pytest.raises(ps.CollapseError, match="what the code of a Own does"):
        ps.apply(nn.Sequential(Own(5, 6)), ps.Plan(forms={"0.weight_hh_l0": form}))
