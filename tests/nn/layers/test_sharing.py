"""Weights go on sharing values whatever an optimiser does; their gradients are those of slow formulas."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pysolve as ps
from pysolve.forms import Codebook
from pysolve.nn.cut.slicing import CONVOLUTIONS, WEIGHTED
from pysolve.nn.files.storage import bits
from pysolve.nn.layers.masking import mask_weights
from pysolve.nn.layers.sharing import (
    Shared,
    Snapped,
    codebooks_of,
    remove_sharing,
    share_weights,
    shared_of,
    ternary_weights,
    unshared,
)
from pysolve.nn.zoo import Mlp

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.005, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}
SHAPES = st.sampled_from([(0, 3), (1, 1), (4, 6), (3, 2, 5), (4, 3, 2, 2), (2, 2, 2, 1, 3)])
DTYPES = st.sampled_from([torch.float32, torch.float64])
WAYS = ("values", "both", "zeros kept", "ternary")


def mlp():
    torch.manual_seed(0)
    return Mlp((6, 8, 3))


def random_book(shape, k=4, seed=0, zero=True):
    """Codes that have nothing to do with a weight's size, unlike those of rounding to the nearest."""
    rng = np.random.default_rng(seed)
    values = np.sort(rng.standard_normal(k)).astype(np.float32)
    values[0] = 0.0 if zero else values[0]
    return Codebook(rng.integers(k, size=shape).astype(np.uint8), values)


def books_for(model, k=4, seed=0, zero=True):
    weighted = [name for name, layer in model.named_modules() if isinstance(layer, WEIGHTED)]
    return {
        name: random_book(tuple(model.get_submodule(name).weight.shape), k, seed, zero) for name in weighted
    }


def share(model, way, k=4, seed=0):
    if way == "ternary":
        ternary_weights(model, [*books_for(model)])
    else:
        trained = "values" if way == "values" else "both"
        share_weights(model, books_for(model, k, seed), trained=trained, keep_zeros=way == "zeros kept")


def steps(model, optimizer, count=3, seed=0):
    for batch in torch.randn(count, 10, 6, generator=torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()


def weights_of(model, names=("fc1", "fc2")):
    return {name: model.get_submodule(name).weight.detach().clone() for name in names}


def same_bits(a, b):
    return torch.equal(bits(a.detach()), bits(b.detach()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_values_stay_few_and_zero_stays_zero_while_they_are_trained(kind, way):
    model = mlp()
    share(model, way)
    before, old = codebooks_of(model), weights_of(model)
    steps(model, OPTIMIZERS[kind](model.parameters()), count=6)
    for name, book in codebooks_of(model).items():
        weight = model.get_submodule(name).weight.detach()
        zeros = torch.from_numpy(book.codes == 0)
        assert len(weight.unique()) <= len(book.centroids)
        assert np.array_equal(weight.numpy(), book.dense())
        assert same_bits(weight[zeros], torch.zeros(int(zeros.sum())))
        assert not torch.equal(weight, old[name])
        if way in ("values", "zeros kept"):
            assert (book.codes == 0)[before[name].codes == 0].all()
        if way == "values":
            assert np.array_equal(book.codes, before[name].codes)
        else:
            assert not np.array_equal(book.codes, before[name].codes)


@settings(max_examples=20)
@given(seeds, st.integers(1, 40), st.booleans(), st.sampled_from(["values", "both"]))
def test_at_first_codes_and_values_are_those_of_the_codebooks(seed, k, zero, trained):
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(4, 2, 3))
    books = books_for(model, k, seed, zero)
    share_weights(model, books, trained=trained)
    for name, book in codebooks_of(model).items():
        assert np.array_equal(book.dense(), books[name].dense())
        assert np.array_equal(model.get_submodule(name).weight.detach().numpy(), books[name].dense())


def test_weights_below_that_round_to_their_codes_are_kept():
    model = mlp()
    old = model.fc1.weight.detach().clone()
    book = Codebook((old > 0).numpy().astype(np.uint8), np.array([-0.2, 0.2], np.float32))
    book.codes[0, 0] ^= 1
    share_weights(model, {"fc1": book}, trained="both")
    below = model.fc1.parametrizations.weight.original.detach()
    assert below[0, 0] == pytest.approx(0.2 if book.codes[0, 0] else -0.2)
    assert torch.equal(below.flatten()[1:], old.flatten()[1:])


def test_ternary_values_are_at_first_the_means_of_their_weights():
    model = mlp()
    old = model.fc1.weight.detach().clone()
    ternary_weights(model, {"fc1": 0.4})
    bound = 0.4 * old.abs().max()
    wanted = [0.0, old[old < -bound].mean().item(), old[old > bound].mean().item()]
    assert codebooks_of(model)["fc1"].centroids.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [nn.Linear, *CONVOLUTIONS])
def test_all_layers_with_weights_share_and_stop_sharing(kind, way):
    if kind is nn.Linear:
        layer, x = nn.Linear(4, 6), torch.randn(2, 4)
    else:
        layer = kind(4, 6, 2, groups=2)
        x = torch.randn(2, 4, *[5] * (layer.weight.ndim - 2))
    names, shape = [*layer.state_dict()], layer.weight.shape
    model = nn.Sequential(layer)
    share(model, way)
    wanted, weight = model(x).detach(), layer.weight.detach()
    assert len(weight.unique()) <= 4
    remove_sharing(model)
    assert torch.equal(model(x), wanted)
    assert same_bits(layer.weight, weight)
    assert type(layer) is kind
    assert [*layer.state_dict()] == names
    assert layer.weight.shape == shape
    assert not shared_of(model)
    model(x).sum().backward()
    assert layer.weight.grad.shape == shape


@pytest.mark.parametrize("way", WAYS)
def test_training_with_labels_and_by_a_teacher_lowers_the_loss(way):
    teacher = mlp()
    batches = [*torch.randn(8, 32, 6, generator=torch.Generator().manual_seed(1))]
    labelled = [(batch, teacher(batch).argmax(1)) for batch in batches]
    how = {"epochs": 12, "lr": 0.02, "progress": False}
    for train in (
        partial(ps.finetune, batches=labelled),
        partial(ps.distill, teacher=teacher, batches=batches, loss="mse"),
    ):
        student = copy.deepcopy(teacher)
        share(student, way)
        losses = train(student, **how)
        assert losses[-1] < 0.8 * losses[0]
        assert all(len(weight.unique()) <= 4 for weight in weights_of(student).values())


@pytest.mark.parametrize("way", WAYS)
def test_copies_share_on_their_own(way):
    model = mlp()
    share(model, way)
    again, used = copy.deepcopy(model), weights_of(model)
    assert [*shared_of(again)] == ["fc1", "fc2"]
    steps(again, torch.optim.SGD(again.parameters(), 0.1))
    assert all(torch.equal(weight, used[name]) for name, weight in weights_of(model).items())
    assert not torch.equal(again.fc1.weight, used["fc1"])


@pytest.mark.parametrize("way", WAYS)
def test_state_dicts_go_round_between_networks_that_share_alike(way):
    model, other = mlp(), mlp()
    share(model, way, seed=1)
    share(other, way, seed=2)
    steps(model, torch.optim.SGD(model.parameters(), 0.1))
    other.load_state_dict(model.state_dict())
    assert same_bits(other.fc1.weight, model.fc1.weight)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_without_sharing_computes_the_same(way):
    model = mlp()
    assert unshared(model) is model
    share(model, way)
    plain, x = unshared(model), torch.randn(4, 6)
    assert [*shared_of(model)] == ["fc1", "fc2"]
    assert torch.equal(plain(x), model(x))
    assert [*plain.state_dict()] == [*mlp().state_dict()]


@pytest.mark.parametrize("way", WAYS)
def test_programs_of_networks_that_share_compute_the_same(way):
    model, x = mlp().eval(), torch.randn(4, 6)
    share(model, way)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
    assert torch.equal(program(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_data_types_follow_the_network(way, dtype):
    before, after = mlp().to(dtype), mlp()
    share(before, way)
    share(after, way)
    after.to(dtype)
    for model in (before, after):
        assert model.fc1.weight.dtype == dtype
        assert len(model.fc1.weight.detach().unique()) <= 4
        model(torch.randn(2, 6, dtype=dtype)).sum().backward()
        assert all(parameter.grad.dtype == dtype for parameter in model.parameters())
        assert all(book.centroids.dtype.kind == "f" for book in codebooks_of(model).values())


def test_frozen_weights_stay_frozen():
    for way in WAYS:
        model = mlp()
        model.fc1.weight.requires_grad_(False)
        share(model, way)
        assert not model.fc1.weight.requires_grad
        steps(model, torch.optim.SGD(model.parameters(), 0.1))


def test_other_values_replace_the_first():
    model = mlp()
    for before in WAYS:
        for way in WAYS:
            share(model, before)
            share(model, way)
            assert len(model.fc1.parametrizations.weight) == 1
            if way != "ternary":
                wanted = torch.from_numpy(books_for(mlp())["fc1"].dense())
                assert torch.equal(model.fc1.weight, wanted)


def test_gradients_of_before_do_not_stay():
    model = mlp()
    steps(model, torch.optim.SGD(model.parameters(), 0.1))
    share(model, "values")
    assert model.fc1.parametrizations.weight.original.grad is None
    torch.optim.SGD(model.parameters(), 0.1).step()
    steps(model, torch.optim.SGD(model.parameters(), 0.1))
    remove_sharing(model)
    assert model.fc1.weight.grad is None


def test_a_layer_under_two_names_shares_once():
    model = mlp()
    model.again = model.fc1
    book = random_book((8, 6))
    share_weights(model, {"fc1": book, "again": book})
    assert [*shared_of(model)] == ["fc1"]
    remove_sharing(model)
    with pytest.raises(ValueError, match="fc1 and again are one layer, but got different values"):
        share_weights(model, {"fc1": book, "again": random_book((8, 6), seed=1)})
    with pytest.raises(ValueError, match="fc1 and again are one layer"):
        ternary_weights(model, {"fc1": 0.1, "again": 0.2})
    assert not shared_of(model)


def test_masked_weights_share_no_values_and_shared_ones_have_no_mask():
    model = mlp()
    mask_weights(model, {"fc1": np.ones((8, 6), bool)})
    for change in (lambda: share(model, "values"), lambda: ternary_weights(model, ["fc2", "fc1"])):
        with pytest.raises(ValueError, match="fc1 is masked: remove its mask first"):
            change()
    share_weights(model, {"fc2": random_book((3, 8))})
    with pytest.raises(ValueError, match="the weight of fc2 is computed from other values"):
        mask_weights(model, {"fc2": np.ones((3, 8), bool)})


def test_weights_of_several_layers_and_computed_ones_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="1 shares its weight with 0: untie them"):
        share_weights(model, {"1": random_book((4, 4))})
    with pytest.raises(ValueError, match="the weight of 2 is computed from other values"):
        ternary_weights(model, ["2"])


def test_codebooks_that_do_not_fit_are_refused_before_anything_is_changed():
    model = mlp()
    good = random_book((8, 6))
    for name, book in (("fc2", random_book((8, 3))), ("", good)):
        with pytest.raises(ValueError, match=f"the codebook of {name} must have its weight's shape"):
            share_weights(model, {"fc1": good, name: book})
    with pytest.raises(ps.LayerNotFoundError, match="fc9"):
        share_weights(model, {"fc1": good, "fc9": good})
    with pytest.raises(ValueError, match="keep_zeros needs a first value of zero, fc1 has"):
        share_weights(model, {"fc1": random_book((8, 6), zero=False)}, trained="both", keep_zeros=True)
    with pytest.raises(ValueError, match="trained must be one of values, both, got 'codes'"):
        share_weights(model, {"fc1": good}, trained="codes")
    with pytest.raises(TypeError, match=r"books must give fc1 a Codebook, as .*\.form is, got int"):
        share_weights(model, {"fc1": 4})
    with pytest.raises(TypeError, match="books must be a mapping of layers to codebooks, got list"):
        share_weights(model, [good])
    assert not shared_of(model)


def test_layers_to_be_ternary_must_have_names_and_thresholds_within_reason():
    model = mlp()
    with pytest.raises(TypeError, match=r"pass \['fc1'\]"):
        ternary_weights(model, "fc1")
    with pytest.raises(ValueError, match="the threshold of fc2 must be within 0 and 1, got 1"):
        ternary_weights(model, {"fc1": 0.1, "fc2": 1})
    with pytest.raises(TypeError, match="the threshold of fc2 must be a number, got str"):
        ternary_weights(model, {"fc1": 0.1, "fc2": "0.1"})
    assert not shared_of(model)


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
