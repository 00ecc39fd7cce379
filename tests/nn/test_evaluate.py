"""Figures are those one would count by hand, and taking them leaves the network as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from pysolve.errors import DataError
from pysolve.nn.evaluate import accuracy, latency, macs, nbytes, parameters
from pysolve.nn.zoo import LeNet5, Mlp
from pysolve.report.rows import Latency


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 1000))
def test_accuracy_does_not_depend_on_the_batch_size(n, batch_size, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, 4)), rng.integers(0, 4, n)
    expected = 100 * np.mean(x.argmax(1) == y)
    assert accuracy(nn.Identity(), x, y, batch_size=batch_size) == pytest.approx(expected)
    assert accuracy(nn.Identity(), torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)


def test_accuracy_converts_to_the_networks_type():
    torch.manual_seed(0)
    x, y = np.random.default_rng(0).standard_normal((5, 3)), np.zeros(5, np.uint8)
    accuracy(Mlp((3, 2)), x, y)
    accuracy(Mlp((3, 2)).double(), x.astype(np.float32), y)


def test_accuracy_needs_one_class_number_for_each_input():
    with pytest.raises(DataError, match="got 3 for 2 inputs"):
        accuracy(nn.Identity(), np.ones((2, 4)), np.zeros(3))
    with pytest.raises(DataError, match=r"labels of \(2, 4\)"):
        accuracy(nn.Identity(), np.ones((2, 4)), np.zeros((2, 4)))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_labels_must_be_classes_of_the_network(wrong):
    with pytest.raises(DataError, match=r"expected labels of 0 … 3, the classes of the network, got"):
        accuracy(nn.Identity(), np.ones((2, 4)), np.array([1, wrong]))


class Head(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)


def test_accuracy_is_of_scores_alone():
    x, y = np.ones((2, 4)), np.zeros(2, int)
    for head, said in (
        (lambda x: (x, x), "got tuple"),
        (lambda x: {"logits": x}, "got dict"),
        (lambda x: x[:, :, None], r"got a tensor of \(2, 4, 1\)"),
        (lambda x: x[:, 0], r"got a tensor of \(2,\)"),
    ):
        with pytest.raises(TypeError, match=rf"tensor of \(samples, classes\) scores, {said}"):
            accuracy(Head(head), x, y)


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert (parameters(model), nbytes(model)) == (40, 160)
    model[1].weight = model[0].weight
    assert (parameters(model), nbytes(model)) == (24, 96)


def test_bytes_include_buffers_and_agree_with_the_file():
    model = nn.Sequential(nn.Linear(4, 4).half(), nn.BatchNorm1d(4))
    assert nbytes(model) == 2 * 20 + 4 * 16 + 8
    content = save(model.state_dict())
    header = int.from_bytes(content[:8], "little") + 8
    assert len(content) - header == nbytes(model)


def test_macs_of_lenet_are_those_counted_by_hand():
    by_hand = 20 * 24 * 24 * 25 + 50 * 8 * 8 * 20 * 25 + 800 * 500 + 500 * 10
    assert macs(LeNet5(), torch.zeros(1, 1, 28, 28)) == by_hand
    assert macs(LeNet5(), (torch.zeros(3, 1, 28, 28), None)) == 3 * by_hand


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 6 * 8 * 4 * 3),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (1, 4, 8, 8), 6 * 16 * 2 * 9),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3), 2 * 8 * 8),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.Linear(5, 7), (2, 3, 5), 6 * 35),
        (nn.ReLU(), (4, 4), 0),
    ],
)
def test_macs_of_each_kind_of_layer(layer, shape, expected):
    assert macs(layer, torch.zeros(shape)) == expected


def test_macs_count_every_call_and_leave_no_hook():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert macs(model, torch.zeros(1, 3)) == 18
    assert not layer._forward_hooks


def test_latency_is_ordered_and_says_how_it_was_taken():
    found = latency(Mlp((4, 8, 2)), np.zeros((3, 4)), repeats=5)
    assert 0 < found.low <= found.median <= found.high < 1
    assert (found.batch_size, found.threads) == (3, torch.get_num_threads())


def test_latency_prints_in_milliseconds():
    assert str(Latency(2e-3, 1.5e-3, 2.25e-3, 1, 2)) == "2.00 ms (1.50 … 2.25)"


def test_latency_needs_a_call():
    with pytest.raises(ValueError, match="got 0"):
        latency(nn.Identity(), np.ones(1), repeats=0)


def test_every_figure_keeps_the_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    model[1].eval()
    x, y = torch.ones(2, 4), torch.zeros(2)
    for take in (lambda: accuracy(model, x, y), lambda: macs(model, x), lambda: latency(model, x, repeats=1)):
        take()
        assert [module.training for module in model.modules()] == [True, True, False]
