"""Layers in other forms run within torch's encoder layers, whose one kernel would pass them by."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import pysolve as ps
from pysolve.forms import Integers, LowRank, Sparse
from pysolve.nn.layers.base import Seen
from pysolve.nn.layers.runtime import in_form, to_dense
from pysolve.nn.running import calling_layers, evaluating


class Encoder(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.encoder = nn.Embedding(20, 8), nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(8, 3)

    def forward(self, ids, pad):
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=pad))


def batch(n=6):
    generator = torch.Generator().manual_seed(n)
    lengths = torch.randint(2, 6, (n,), generator=generator)
    # One that is padded, too: torch's kernel would cut the outputs short.
    return {"ids": torch.randint(20, (n, 7), generator=generator), "pad": torch.arange(7) >= lengths[:, None]}


def form(kind, weight):
    if kind == "sparse":
        return Sparse.from_dense(weight * (abs(weight) > 0.1))
    if kind == "factored":
        return LowRank(weight[:, :2], weight[:2])
    scales = abs(weight).max(1, keepdims=True) / 127
    codes = (weight / scales).round().astype("int8")
    return Integers(codes, scales.astype("float32"), None, 8, None, kind == "int8, dynamic")


@pytest.fixture(params=["int8", "int8, dynamic", "sparse", "factored"])
def encoder(request):
    """An encoder whose layers are in another form."""
    model = Encoder().eval()
    for layer in model.encoder.layers:
        for name in ("linear1", "linear2"):
            own = getattr(layer, name)
            setattr(layer, name, in_form(own, form(request.param, own.weight.detach().numpy())))
    return model


def calls_of(model, inputs):
    """The output, and how often the layers ran; hooks would have torch call them."""
    kind, ran = type(model.encoder.layers[0].linear1), []
    forward = kind.forward

    def counted(layer, x):
        ran.append(layer)
        return forward(layer, x)

    kind.forward = counted
    try:
        with torch.no_grad():
            return model(**inputs), len(ran)
    finally:
        kind.forward = forward


def test_encoder_layers_call_the_layers_as_they_are(encoder):
    got, ran = calls_of(encoder, batch())
    assert ran == 4
    with calling_layers(), torch.no_grad():
        torch.testing.assert_close(got, encoder(**batch()))


def test_encoders_are_exported_with_them(encoder):
    program = torch.export.export(encoder, (), batch())
    with torch.no_grad(), calling_layers():
        torch.testing.assert_close(program.module()(**batch()), encoder(**batch()), atol=1e-5, rtol=1e-5)


def test_the_weight_is_seen_as_a_tensor_and_gives_ordinary_ones():
    layer = nn.Linear(6, 4)
    quantised = in_form(layer, form("int8", layer.weight.detach().numpy()))
    weight, x = quantised.weight, torch.randn(3, 6)
    assert type(weight) is Seen
    assert (weight.shape, weight.dtype, weight.device) == (layer.weight.shape, x.dtype, x.device)
    for made in (weight + 0, weight.T, linear(x, weight), weight.detach(), copy.deepcopy(weight)):
        assert type(made) is torch.Tensor
    torch.testing.assert_close(linear(x, weight, layer.bias), quantised(x))
    torch.testing.assert_close(to_dense(nn.Sequential(quantised))[0].weight.detach(), weight.detach())


def test_hooks_of_padded_encoders_see_ordinary_tensors_and_the_setting_is_put_back():
    model, before = Encoder().eval(), torch.backends.mha.get_fastpath_enabled()
    found = ps.gather(model, [batch()], progress=False)
    assert {one.count for one in found.values()} == {6 * 7}
    assert torch.backends.mha.get_fastpath_enabled() == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / 0  # noqa: B018
    assert torch.backends.mha.get_fastpath_enabled() == before


# Torch's own, where the encoder is timed as it is used.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_channels_of_padded_encoders_can_be_removed():
    result = ps.compress(Encoder(depth=1).eval(), [batch(32)], keep=0.5, progress=False)
    assert [len(step.keep) for step in result.plan.steps] == [4, 1, 8]
