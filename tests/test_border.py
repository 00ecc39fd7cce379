"""What functions of matrices accept and refuse: memory order, number types, correlations, sizes."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import correlated_samples, seeds

import pysolve as ps

LAM = 0.05
SELECTORS = ("elimination", "forward", "swap", "lasso", "weighted_lasso", "magnitude", "activation")


def certified(found):
    """Its numbers; a gap may be infinite where nothing better is known."""
    return np.array([found.objective, min(found.gap, 1e300), found.kkt])


# Functions of (R, C, W), W a layer's own weights; each returns arrays.
OF_PROBLEMS = {
    **{
        method: lambda R, C, W, method=method: (
            ps.solve_linear_reconstruction(R, C, LAM, method, max_iter=200).M
        )
        for method in ("newton", "fista", "alternate_minimization", "proximal_gradient")
    },
    "certify": lambda R, C, W: certified(ps.certify(R, C, W, LAM)),
    "lam_max": lambda R, C, W: np.array(ps.lam_max(R, C)),
    "debias": lambda R, C, W: ps.debias(R, C, [0, 2, 3]),
    "path": lambda R, C, W: ps.elimination_path(R, C).error,
    "lams": lambda R, C, W: ps.regularization_path(R, C, [LAM])[0].M,
    **{
        method: lambda R, C, W, method=method: ps.select_channels(R, C, 3, method=method)
        for method in SELECTORS
    },
    "obs, other outputs": lambda R, C, W: ps.obs_prune(W, R, C, amount=0.5).weight,
    "quantize, other outputs": lambda R, C, W: ps.quantize_layer(W, R, C, bits=3).weight,
    "reduced rank, other outputs": lambda R, C, W: ps.reduced_rank(W, R, C, rank=2).weight,
}
OF_LAYERS = {
    **{
        method: lambda R, C, W, method=method: ps.obs_prune(W, R, amount=0.5, method=method).weight
        for method in ("admm", "greedy", "sweep")
    },
    **{
        scheme: lambda R, C, W, scheme=scheme: ps.quantize_layer(W, R, bits=3, scheme=scheme).weight
        for scheme in ("codebook", "int", "ternary")
    },
    "priced": lambda R, C, W: ps.quantize_layer(W, R, lam=1e-4).weight,
    "reduced rank": lambda R, C, W: ps.reduced_rank(W, R, rank=2).weight,
    "in a metric": lambda R, C, W: ps.reduced_rank(W, R, rank=2, metric=np.eye(len(W)) + 1).weight,
}
ALL = OF_PROBLEMS | OF_LAYERS


@st.composite
def layers(draw, spread=0.5):
    """R, C and W of a layer whose inputs may be fewer than they look, in rank."""
    rng = np.random.default_rng(draw(seeds))
    d, h = draw(st.integers(4, 9)), draw(st.integers(2, 5))
    rank, repeated, dead = draw(st.integers(1, d)), draw(st.integers(0, 2)), draw(st.integers(0, 1))
    x = correlated_samples(rng, draw(st.integers(2, 30)), d, rank, repeated, dead, spread)
    W = rng.standard_normal((h, d))
    y = x @ W.T + 0.1 * rng.standard_normal((len(x), h))
    R = x.T @ x / len(x)
    return (R + R.T) / 2, y.T @ x / len(x), W


def outcome(function, *matrices):
    """The result, or how it was refused."""
    try:
        return function(*matrices)
    except (ValueError, TypeError, ps.PysolveError) as error:
        return f"{type(error).__name__}: {error}"


def assert_alike(one, other):
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
    else:
        np.testing.assert_array_equal(one, other)


def reordered(matrix):
    """The same numbers, in memory in other ways."""
    apart = np.zeros((2 * len(matrix), 3 * matrix.shape[1]))[::2, ::3]
    apart[:] = matrix
    backwards = np.ascontiguousarray(matrix[::-1, ::-1])[::-1, ::-1]
    fixed = matrix.copy()
    fixed.flags.writeable = False
    turned = torch.from_numpy(np.ascontiguousarray(matrix.T)).T
    return np.asfortranarray(matrix), matrix.T.copy().T, apart, backwards, fixed, matrix.astype(">f8"), turned


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8)
@given(layers())
def test_memory_order_never_matters(name, layer):
    wanted = outcome(ALL[name], *layer)
    for matrices in zip(*map(reordered, layer), strict=True):
        assert_alike(outcome(ALL[name], *matrices), wanted)


SMALL = {
    "half": lambda m: m.astype(np.float16),
    "half tensor": lambda m: torch.from_numpy(m).half(),
    "bfloat16 tensor": lambda m: torch.from_numpy(m).bfloat16().requires_grad_(),
    "single": lambda m: m.astype(np.float32),
    "single tensor": lambda m: torch.from_numpy(m).float(),
}


if find_spec("ml_dtypes"):
    SMALL["bfloat16"] = lambda m: m.astype(import_module("ml_dtypes").bfloat16)


def wide(matrix):
    """The same numbers in double precision."""
    return matrix.detach().double().numpy() if torch.is_tensor(matrix) else matrix.astype(np.float64)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8)
@given(layers())
def test_every_number_type_is_read_as_what_it_holds(kind, name, layer):
    narrow = [SMALL[kind](matrix) for matrix in layer]
    assert_alike(outcome(ALL[name], *narrow), outcome(ALL[name], *map(wide, narrow)))


@pytest.mark.parametrize("kind", SMALL)
def test_samples_and_sums_of_every_number_type_are_read_as_what_they_hold(kind):
    x = np.random.default_rng(0).standard_normal((9, 4))
    narrow = SMALL[kind](x)
    found, wanted = (ps.Correlations.from_samples(one, one[:, :2]) for one in (narrow, wide(narrow)))
    np.testing.assert_array_equal(found.xx, wanted.xx)
    sums = [SMALL[kind](one) for one in (wanted.xx, wanted.yx, wanted.yy)]
    np.testing.assert_array_equal(ps.Correlations(*sums, 9, np.zeros(4), np.zeros(2)).xx, wide(sums[0]))


def broken(R, way):
    R = R.copy()
    if way == "not symmetric":
        R[0, 1] += 0.1 * R[0, 0]
    elif way == "negative diagonal entry":
        R[1, 1] = -1.0
    elif way == "not positive semi-definite":
        R[0, 1] = R[1, 0] = 2 * np.sqrt(R[0, 0] * R[1, 1])
    elif way == "not finite":
        R[1, 1] = np.nan
    return R[:-1] if way == "square" else R


@pytest.mark.parametrize("as_sums", [False, True])
@pytest.mark.parametrize(
    "way", ["not symmetric", "negative diagonal entry", "not positive semi-definite", "not finite", "square"]
)
@pytest.mark.parametrize("name", ALL)
def test_what_is_no_correlation_matrix_is_refused_by_every_function(name, way, as_sums):
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((50, 6)), rng.standard_normal((3, 6))
    y = x @ W.T
    R, C = broken(x.T @ x / 50, way), y.T @ x / 50
    if as_sums:
        if way == "square" or name in OF_PROBLEMS:
            return
        R = ps.Correlations(50 * R, 50 * C, y.T @ y, 50, x.sum(0), y.sum(0))
    with pytest.raises(ValueError, match=way):
        ALL[name](R, C, W)


@pytest.mark.parametrize("yy", [np.nan, -1.0])
@pytest.mark.parametrize("name", OF_LAYERS)
def test_impossible_energies_are_refused(name, yy):
    x = np.random.default_rng(0).standard_normal((50, 6))
    sums = ps.Correlations(x.T @ x, x[:, :3].T @ x, np.full((3, 3), yy), 50, np.zeros(6), np.zeros(3))
    with pytest.raises(ValueError, match="r_yy must have a finite trace of at least 0"):
        OF_LAYERS[name](sums, None, np.ones((3, 6)))


@pytest.mark.parametrize(
    "S", [np.diag([1.0, 1, 0]), np.diag([1.0, 1, -1]), np.eye(3) + np.triu(np.ones((3, 3)), 1)]
)
def test_metrics_that_are_not_positive_definite_are_refused(S):
    with pytest.raises(ValueError, match="metric"):
        ps.reduced_rank(np.ones((3, 4)), np.eye(4), rank=1, metric=S)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=8)
@given(layers(), st.sampled_from([-300, -200, -80, -40, 40, 74, 100, 160, 300]), st.sampled_from("RCW"))
def test_sizes_near_the_ends_of_float64_work_or_are_refused_by_name(name, layer, exponent, which):
    R, C, W = (m * 10.0**exponent if letter == which else m for m, letter in zip(layer, "RCW", strict=True))
    with np.errstate(all="raise", under="ignore"):
        found = outcome(ALL[name], R, C, W)
    if isinstance(found, str):
        assert any(word in found for word in ("r_xx", "r_yx", "W has", "M has"))
    else:
        assert np.isfinite(found).all()


@pytest.mark.parametrize("options", [{"weights": [1e300, 1.0]}, {"weights": [1.0, 1e-300]}, {"lam": 1e300}])
def test_penalties_that_overflow_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ps.certify(np.eye(2), np.ones((1, 2)), np.zeros((1, 2)), **{"lam": 1.0, **options})


@pytest.mark.parametrize("given_yy", [np.ones((2, 3)), np.ones((1, 2, 2))])
def test_energies_of_impossible_shape_are_refused(given_yy):
    with pytest.raises(ValueError, match="r_yy must be E"):
        ps.newton(np.eye(4), np.ones((2, 4)), 0.1, r_yy=given_yy)


@pytest.mark.parametrize("value", [[[1.0], [1.0, 2.0]], torch.eye(2).to_sparse()])
def test_what_is_no_array_is_refused_by_name(value):
    with pytest.raises(TypeError, match="r_xx cannot be read as an array of numbers"):
        ps.debias(value, np.ones((1, 2)), [0])


@pytest.mark.parametrize("keep", [[0.0, 1.0], np.array([0.5, 1]), np.array([True, False, True, True])])
def test_groups_are_named_by_integers_alone(keep):
    known = ps.Correlations.from_samples(np.eye(4), np.ones((4, 2)))
    for function in (known.restrict, lambda keep: ps.debias(known, keep)):
        with pytest.raises(TypeError, match=r"flatnonzero|convert with .astype\(int\)"):
            function(keep)
    assert known.restrict([]).groups == 0
