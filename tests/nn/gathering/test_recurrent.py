"""What recurrent weights read, against cells run step by step."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from pysolve.nn.gathering.recurrent import bias_of, gather_recurrent, recurrent_weights

# Torch has a slower kernel for these.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

CELLS = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}


@st.composite
def layers(draw):
    torch.manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(sorted(CELLS, key=str)))
    how = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        **({"nonlinearity": draw(st.sampled_from(["tanh", "relu"]))} if kind is nn.RNN else {}),
    }
    hidden = draw(st.integers(1, 3))
    if kind is nn.LSTM:
        how["proj_size"] = draw(st.integers(0, hidden - 1))
    return kind(draw(st.integers(1, 3)), hidden, **how).eval()


def projected(layer, suffix, step, h, c):
    """One step of an LSTM whose states are projected, which no cell does: what it projects, and the cells."""
    own = [
        getattr(layer, f"{leaf}{suffix}", None) for leaf in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    ]
    gates = nn.functional.linear(step, *own[:2]) + nn.functional.linear(h, *own[2:])
    i, f, g, o = gates.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def read_by_cells(layer, x, h0=None, c0=None):
    """Rows that each weight reads of one (T, d) sequence, from cells that run one step after the other."""
    found, H = {}, layer.hidden_size
    for i in range(layer.num_layers):
        made = []
        for reverse in range(1 + layer.bidirectional):
            suffix = f"_l{i}{'_reverse' * reverse}"
            how = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
            cell = CELLS[type(layer)](x.shape[1], H, bias=layer.bias, **how)
            for leaf in dict(cell.named_parameters()):
                setattr(cell, leaf, getattr(layer, f"{leaf}{suffix}"))
            at = i * (1 + layer.bidirectional) + reverse
            sizes = ((h0, getattr(layer, "proj_size", 0) or H), (c0, H))
            h, c = (torch.zeros(size) if one is None else one[at] for one, size in sizes)
            inputs, before, after = x.flip(0) if reverse else x, [], []
            for step in inputs:
                before.append(h)
                if layer.proj_size:
                    s, c = projected(layer, suffix, step, h, c)
                    found.setdefault(f"weight_hr{suffix}", []).append(s)
                    h = getattr(layer, f"weight_hr{suffix}") @ s
                    after.append(h)
                    continue
                state = (h[None], c[None]) if isinstance(layer, nn.LSTM) else h[None]
                new = cell(step[None], state)
                h, c = (new[0][0], new[1][0]) if isinstance(layer, nn.LSTM) else (new[0], c)
                after.append(h)
            found[f"weight_ih{suffix}"], found[f"weight_hh{suffix}"] = inputs, torch.stack(before)
            made.append(torch.stack(after).flip(0) if reverse else torch.stack(after))
        x = torch.cat(made, -1)
    return {name: torch.stack(rows) if isinstance(rows, list) else rows for name, rows in found.items()}


def assert_read(found, name, layer, rows):
    weight, bias = getattr(layer, name), getattr(layer, name.replace("weight", "bias"), None)
    X = torch.cat(rows).detach().double().numpy()
    Y = X @ weight.detach().double().numpy().T
    Y = Y if bias is None else Y + bias.detach().double().numpy()
    assert found.count == len(X)
    for got, wanted in (
        (found.xx, X.T @ X),
        (found.yx, Y.T @ X),
        (found.x_sum, X.sum(0)),
        (found.y_sum, Y.sum(0)),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@given(layers(), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_rows_are_those_of_cells_run_by_hand(layer, length, samples, stated):
    x = torch.randn(samples, length, layer.input_size)
    states = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    h0, c0 = (torch.randn(states, samples, size) if stated else None for size in sizes)
    hx = None if h0 is None else (h0, c0) if isinstance(layer, nn.LSTM) else h0
    given_x = x if layer.batch_first else x.transpose(0, 1)
    model = Called(layer, hx)
    found = gather_recurrent(model, [given_x], recurrent_weights(model))
    each = [
        read_by_cells(layer, one, *(None if part is None else part[:, b] for part in (h0, c0)))
        for b, one in enumerate(x)
    ]
    assert found.keys() == {f"layer.{name}" for name in each[0]}
    for name in each[0]:
        assert_read(found[f"layer.{name}"], name, layer, [one[name] for one in each])


class Called(nn.Module):
    def __init__(self, layer, hx=None):
        super().__init__()
        self.layer, self.hx = layer, hx

    def forward(self, x):
        return self.layer(x, self.hx)[0] if self.hx is not None else self.layer(input=x)[0]


@given(layers())
def test_packed_sequences_count_without_their_padding(layer):
    sequences = [torch.randn(n, layer.input_size) for n in (3, 1, 4)]

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(pack_sequence(sequences, enforce_sorted=False))[0].data

    found = gather_recurrent(Packed(), [torch.zeros(1)], {"layer.weight_hh_l0", "layer.weight_ih_l0"})
    rows = [read_by_cells(layer, one) for one in sequences]
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert_read(found[f"layer.{name}"], name, layer, [one[name] for one in rows])


def test_other_recurrent_layers_have_none():
    class Own(nn.LSTM):
        pass

    for layer in (Own(3, 4), nn.LSTMCell(3, 4)):
        assert recurrent_weights(layer) == {}
    for layer in (nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),):
        assert "weight_hh_l0" not in recurrent_weights(layer)


@pytest.mark.parametrize("bias", [True, False])
def test_each_weight_has_its_own_bias(bias):
    model = nn.ModuleList([nn.GRU(3, 4, bias=bias)])
    assert bias_of(model, "0.weight_hh_l0") == ("0.bias_hh_l0" if bias else None)
    assert bias_of(model, "0.other") is None
