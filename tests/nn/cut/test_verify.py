"""Equal networks are equal up to rounding; anything else is told apart in words."""

import copy

import pytest
import torch
from torch import nn

from pysolve.nn.cut.verify import mismatch


def network():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def probe(dtype=torch.float32):
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"),
    [(torch.float64, 1e-11, 1e-8), (torch.float32, 1e-5, 1e-2), (torch.bfloat16, 1e-2, 1.0)],
)
def test_the_tolerance_belongs_to_the_type(dtype, allowed, refused):
    model = network().to(dtype)
    scale = model(probe(dtype)).abs().max().item()
    for shift, equal in ((allowed, True), (refused, False)):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.bias += shift * scale
        assert (mismatch(model, other, probe(dtype)) is None) == equal


def test_a_difference_is_told_with_its_size_and_the_allowance():
    other = network()
    with torch.no_grad():
        other.bias += 1
    assert mismatch(network(), other, probe()).startswith("the outputs differ by 1.0e+00, where ")


def test_a_nan_on_one_side_is_a_difference():
    other = network()
    with torch.no_grad():
        other.bias[0] = torch.nan
    assert "nan" in mismatch(network(), other, probe())
    assert "nan" in mismatch(other, network(), probe())
    assert mismatch(other, other, probe()) is None


def test_shapes_and_failures_are_told():
    assert "shapes differ ([[10, 3]])" in mismatch(network(), nn.Linear(6, 3), probe())
    assert "fails" in mismatch(network(), nn.Linear(5, 4), probe())


def test_class_numbers_must_be_equal():
    class Classes(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    assert mismatch(Classes(), Classes(), probe()) is None
    assert mismatch(Classes(), nn.Sequential(nn.Softmin(1), Classes()), probe()) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_infinities_are_no_difference_and_hide_none(dtype):
    model, x = network().to(dtype), probe(dtype)
    with torch.no_grad():
        model.bias[0] = torch.inf
    other = copy.deepcopy(model)
    assert mismatch(model, other, x) is None
    with torch.no_grad():
        other.bias[1] += 1
    assert "differ by 1.0e+00" in mismatch(model, other, x)


def test_no_outputs_at_all_are_equal():
    assert mismatch(network(), network(), probe()[:0]) is None


def test_a_network_that_is_known_to_run_does_so_only_for_comparison():
    ran = []
    wide = network()
    wide.register_forward_hook(lambda *_: ran.append(1))
    assert "fails" in mismatch(wide, nn.Linear(5, 4), probe(), taken=True)
    assert not ran
    assert mismatch(wide, network(), probe(), taken=True) is None
    assert ran


@pytest.mark.parametrize(("shift", "equal"), [(1e-3, True), (1e-1, False)])
def test_networks_that_amplify_rounding_may_differ_by_as_much_as_other_rounding_does(shift, equal):
    class Cancelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            self.large = nn.Parameter(torch.full((4,), 1e4))
            self.scale = nn.Parameter(torch.tensor(10.0))

        def forward(self, x):
            return (self.inner(x) + self.large - 1e4) * self.scale

    model, other = Cancelled(), Cancelled()
    with torch.no_grad():
        other.large += shift
    assert (mismatch(model, other, probe()) is None) == equal
