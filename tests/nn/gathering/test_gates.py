"""Gradients of gates: what is added to them changes nothing, and its gradients give those of the weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pysolve.nn.gathering.gates import watching_gates
from pysolve.nn.gathering.recurrent import recurrent_weights
from pysolve.nn.sensitivity import sensitivities

WAYS = [{}, {"batch_first": True, "bias": False}, {"num_layers": 2, "bidirectional": True}]
CASES = [(kind, how) for kind in (nn.LSTM, nn.GRU, nn.RNN) for how in WAYS]
CASES += [(nn.LSTM, {"num_layers": 2, "proj_size": 3})]


def calls(layer):
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = [torch.randn(count, 3, n, dtype=torch.float64) for n in (layer.proj_size or 6, 6)]
    yield (x.transpose(0, 1) if layer.batch_first else x,)
    yield (x[:, 0],)
    yield (pack_padded_sequence(x, [4, 3, 1]), tuple(h) if isinstance(layer, nn.LSTM) else h[0])


def flat(made):
    if isinstance(made, torch.Tensor):
        return made.flatten()
    parts = [made.data] if isinstance(made, PackedSequence) else [*made]
    return torch.cat([flat(one) for one in parts])


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_gates_are_what_they_were_and_tell_their_gradients(kind, how):
    torch.manual_seed(0)
    layer = nn.ModuleList([kind(5, 6, **how).double()])
    for given in calls(layer[0]):
        layer.zero_grad()
        wanted = flat(layer[0](*given))
        wanted.square().sum().backward()
        offsets = []
        with watching_gates(layer, {"0.weight_ih_l0"}, offsets):
            found = flat(layer[0](*given))
            torch.testing.assert_close(found, wanted)
            gradients = torch.autograd.grad(found.square().sum(), [one for _, one in offsets])
        assert "forward" not in vars(layer[0])
        x = given[0].data if isinstance(given[0], PackedSequence) else given[0]
        for (name, _), gradient in zip(offsets, gradients, strict=True):
            if "l0" in name:
                product = gradient.flatten(0, -2).T @ x.flatten(0, -2)
                torch.testing.assert_close(product, layer.get_parameter(name).grad)
        assert len(offsets) == layer[0].num_layers * (2 if layer[0].bidirectional else 1)


def test_both_weights_of_a_gate_have_one_sensitivity_and_layers_keep_theirs():
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rec, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rec(x)[0])

    model, x = Last(), torch.randn(8, 4, 5)
    gates = recurrent_weights(model)
    found = sensitivities(model, {"head": model.head}, [x], gates=gates)
    assert found.keys() == {"head", *gates}
    a, b = (found[name] for name in gates)
    assert (a == b).all()
    assert a.trace() == pytest.approx(24)
    alone = sensitivities(model, {"head": model.head}, [x])
    assert alone["head"] == pytest.approx(found["head"], abs=1e-5)
