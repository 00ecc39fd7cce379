"""What a layer's weight is multiplied with is seen, whatever else the layer's code does."""

import pytest
import torch
from small import Turned, vectors
from torch import nn
from torch.nn import functional as F

from pysolve.errors import PysolveError
from pysolve.nn import layer_matrix as rows
from pysolve.nn.gathering.watching import watching


class Same(nn.Conv2d):
    """Pads by itself, as EfficientNets do, and goes on behind."""

    def forward(self, x):
        padded = F.pad(x, (0, 1, 1, 2))
        return 3 * F.conv2d(padded, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Falcon(nn.Linear):
    def forward(self, x):
        return (2 * x) @ self.weight.T


class Upward(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x.relu(), self.weight, self.bias, 2, 1, output_padding=1)


LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 6)),
    "padded by code": (Same(3, 4, 3, stride=2), (2, 3, 6, 6)),
    "padding that the code leaves out": (Same(3, 4, 3, padding=1), (2, 3, 6, 6)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "by a matrix product": (Falcon(5, 4, bias=False), (2, 3, 5)),
    "inputs first": (Turned(5, 4), (2, 3, 5)),
    "transposed": (Upward(3, 4, 3), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_inputs_and_outputs_are_those_of_the_weights_operator(case):
    layer, shape = LAYERS[case]
    seen = []
    with torch.no_grad(), watching({"one": layer}, lambda *call: seen.append(call)):
        layer(vectors(*shape))
    ((name, called, x, y),) = seen
    bias = 0.0 if layer.bias is None else layer.bias
    made = rows.samples(called, x) @ rows.matrix(layer).T + bias
    assert name == "one"
    torch.testing.assert_close(made, rows.outputs(called, y))


def test_what_is_returned_takes_the_place_of_the_output():
    layer = Falcon(5, 4, bias=False)
    with torch.no_grad(), watching({"one": layer}, lambda name, called, x, y: y + 1):
        changed = layer(vectors(3, 5))
    torch.testing.assert_close(changed, layer(vectors(3, 5)) + 1)


def test_a_weight_that_is_taken_the_wrong_way_round_is_no_call():
    class Wrong(nn.Linear):
        def forward(self, x):
            return x @ self.weight

    seen = []
    layer = Wrong(4, 4)
    with torch.no_grad(), watching({"one": layer}, lambda *call: seen.append(call)):
        layer(vectors(3, 4))
        nn.Linear(4, 4)(vectors(3, 4))
    assert not seen


@pytest.mark.parametrize("case", ["plain", "by a matrix product"])
def test_calls_inside_a_function_transform_are_refused_by_name(case):
    layer, shape = LAYERS[case]
    x = vectors(4, *shape)
    with torch.no_grad(), watching({"one": layer}, lambda *call: None):
        with pytest.raises(PysolveError, match=r"one runs inside torch\.vmap .* ignore=\['one'\]"):
            torch.vmap(layer)(x)
        layer(x[0])
