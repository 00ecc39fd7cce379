"""Values and gradients of shared weights are those that slow, obvious formulas give."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import nn
from torch.nn.utils import parametrize

from pysolve.nn.layers.sharing import Shared, Snapped

SHAPES = st.sampled_from([(0, 3), (1, 1), (4, 6), (3, 2, 5), (4, 3, 2, 2), (2, 2, 2, 1, 3)])
DTYPES = st.sampled_from([torch.float32, torch.float64])


def drawn(seed, shape, k, dtype=torch.float64):
    """Codes, values, a weight and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(k, shape, generator=generator).byte()
    values, weight, gradient = (torch.randn(n, generator=generator).to(dtype) for n in ((k,), shape, shape))
    return codes, values.requires_grad_(), weight.requires_grad_(), gradient


@given(seeds, SHAPES, st.sampled_from([1, 2, 3, 16, 256]), DTYPES, st.booleans())
def test_shared_values_and_their_gradients_are_those_of_plain_indexing(seed, shape, k, dtype, zero):
    codes, values, _, gradient = drawn(seed, shape, k, dtype)
    in_use = Shared(codes, k, zero=zero)(values)
    in_use.backward(gradient)
    oracle = values.detach().clone()
    if zero:
        oracle[0] = 0.0
    oracle.requires_grad_()
    wanted = oracle[codes.long()]
    wanted.backward(gradient)
    if zero:
        oracle.grad[0] = 0.0
    assert torch.equal(in_use, wanted)
    assert in_use.dtype == dtype
    assert torch.allclose(values.grad, oracle.grad, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)


@given(seeds, st.sampled_from([(7, 5), (3, 2, 2, 2)]), st.sampled_from([1, 2, 5, 33, 70]), st.booleans())
def test_the_nearest_value_is_in_use(seed, shape, k, zero):
    _, values, weight, _ = drawn(seed, shape, k)
    snapped = Snapped(values.detach().clone(), zero=zero)
    known = values.detach().clone()
    known[0] = 0.0 if zero else known[0]
    least = (weight.detach()[..., None] - known).abs().min(-1).values
    in_use = snapped(weight)
    assert torch.equal((weight - in_use).abs(), least)
    assert torch.equal(in_use, known[snapped.codes_of(weight).long()])


@given(seeds, SHAPES, st.sampled_from([1, 3, 40]), st.booleans())
def test_gradients_go_to_the_values_in_use_and_straight_through(seed, shape, k, zero):
    _, values, weight, gradient = drawn(seed, shape, k)
    snapped = Snapped(values.detach().clone(), zero=zero)
    snapped(weight).backward(gradient)
    codes = snapped.codes_of(weight)
    wanted = [gradient[codes == code].sum() for code in range(k)]
    if zero:
        wanted[0] = torch.zeros((), dtype=torch.float64)
    assert torch.allclose(snapped.centroids.grad, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    assert torch.equal(weight.grad, gradient)


@given(seeds, st.sampled_from([(7, 5), (3, 2, 2, 2)]), st.floats(0, 0.9))
def test_ternary_weights_follow_the_formulas_of_the_paper(seed, shape, t):
    _, _, weight, gradient = drawn(seed, shape, 3)
    p, n = 0.7, 0.3
    ternary = Snapped(torch.tensor([0.0, -n, p], dtype=torch.float64), zero=True, threshold=t)
    in_use = ternary(weight)
    in_use.backward(gradient)
    bound = t * weight.detach().abs().max()
    up, down = weight.detach() > bound, weight.detach() < -bound
    zero = torch.zeros((), dtype=torch.float64)
    assert torch.equal(in_use, torch.where(up, p, torch.where(down, -n, zero)))
    assert torch.equal(weight.grad, gradient * torch.where(up, p, torch.where(down, n, zero + 1)))
    # The scale Wn is minus the value.
    _, below, above = ternary.centroids.grad
    assert torch.isclose(above, gradient[up].sum(), atol=1e-12)
    assert torch.isclose(-below, -gradient[down].sum(), atol=1e-12)


@given(seeds, st.sampled_from([None, 0.1]))
def test_what_is_fixed_stays_zero(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.rand(6, 5, generator=generator) < 0.5
    values = torch.tensor([0.0, -0.5, 0.5])
    in_use = Snapped(values, zero=True, threshold=threshold, fixed=fixed)(
        torch.randn(6, 5, generator=generator)
    )
    assert not in_use[fixed].any()


def test_gradients_of_many_weights_are_summed_exactly_enough():
    n = 300_000
    gradient = torch.full((n,), 0.1)
    values = torch.zeros(1, requires_grad=True)
    Shared(torch.zeros(n, dtype=torch.uint8), 1)(values).backward(gradient)
    wanted = gradient.double().sum()
    assert abs(values.grad.item() - wanted) <= 1e-6 * wanted


def test_values_that_changed_places_are_found_all_the_same():
    snapped = Snapped(torch.tensor([0.0, 1.0, -1.0]), zero=True)
    weight = torch.tensor([-0.9, 0.2, 0.8])
    assert snapped(weight).tolist() == [-1, 0, 1]
    with torch.no_grad():
        snapped.centroids.copy_(torch.tensor([7.0, -2.0, 0.5]))
    assert snapped(weight).tolist() == [0, 0, 0.5]


def test_a_weight_put_in_place_of_shared_ones_gives_each_value_its_mean():
    layer = nn.Linear(2, 2)
    codes = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8)
    parametrize.register_parametrization(layer, "weight", Shared(codes, 3), unsafe=True)
    layer.weight = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert layer.weight.tolist() == [[2, 3], [3, 2]]
    assert layer.parametrizations.weight.original.shape == (3,)


@given(seeds, st.booleans())
def test_layouts_do_not_matter(seed, zero):
    codes, values, weight, gradient = drawn(seed, (4, 3, 2, 2), 5)
    snapped = Snapped(values.detach().clone(), zero=zero)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        values.grad = weight.grad = snapped.centroids.grad = None
        shared = Shared(codes.contiguous(memory_format=form), 5, zero=zero)(values)
        below = weight.contiguous(memory_format=form)
        total = shared + snapped(below)
        total.backward(gradient.contiguous(memory_format=form))
        parts = (total, values.grad, weight.grad, snapped.centroids.grad)
        results.append([part.detach() for part in parts])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
