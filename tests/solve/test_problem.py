import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_objective, lowest_found
from strategies import seeds

import pysolve as ps
from pysolve.solve.problem import problem_of

EYE, ROW = np.eye(4), np.ones((2, 4))


def with_entry(matrix, value):
    matrix = matrix.copy()
    matrix.flat[1] = value
    return matrix


@pytest.mark.parametrize(
    ("r_xx", "r_yx", "options", "message"),
    [
        (np.eye(3), ROW, {}, "r_yx has 4 columns but r_xx is 3 x 3"),
        (np.ones((3, 4)), ROW, {}, "r_xx must be square, got 3 x 4"),
        (np.eye(0), np.ones((2, 0)), {}, "r_xx must not be empty"),
        (EYE, np.ones((0, 4)), {}, "r_yx has no rows"),
        (np.ones(4), ROW, {}, "r_xx must be a matrix, got an array of shape"),
        (with_entry(EYE, np.nan), ROW, {}, "r_xx has 1 entries that are not finite"),
        (EYE, with_entry(ROW, np.inf), {}, "r_yx has 1 entries that are not finite"),
        (with_entry(EYE, 0.5), ROW, {}, "r_xx is not symmetric: .* up to 0.5 of the largest"),
        (-EYE, ROW, {}, "negative diagonal entry, -1"),
        (EYE - 0.5, ROW, {}, "not positive semi-definite"),
        (np.diag([1.0, 1, 1, 0]), ROW, {}, "r_yx is not zero for 1 inputs whose r_xx is zero"),
        (EYE, ROW, {"lam": 0.0}, "lam must be positive and finite, .* got 0"),
        (EYE, ROW, {"lam": -1.0}, "lam must be positive"),
        (EYE, ROW, {"lam": np.nan}, "lam must be positive and finite, .* got nan"),
        (EYE, ROW, {"lam": np.inf}, "lam must be positive"),
        (EYE, ROW, {"group_size": 3}, "group_size must divide the 4 inputs, got 3"),
        (EYE, ROW, {"group_size": 0}, "group_size must be an integer of at least 1, got 0"),
        (EYE, ROW, {"weights": [1, 1, 1, -1]}, "weights must be finite and at least 0"),
        (EYE, ROW, {"weights": [1, 1]}, "one number for each of the 4 groups"),
        (EYE, ROW, {"M0": np.ones((2, 3))}, r"M0 has shape .*\(2, 3\).* needs .*\(2, 4\)"),
        (EYE, ROW, {"M0": with_entry(ROW, np.nan)}, "M0 has 1 entries"),
        (EYE, ROW, {"tol": -1e-8}, "tol must be at least 0"),
        (EYE, ROW, {"tol": np.nan}, "tol must be at least 0"),
        (EYE, ROW, {"max_iter": -1}, "max_iter must be an integer within 0"),
        (EYE, ROW, {"r_yy": -1.0}, "r_yy must have a finite trace"),
        (EYE, ROW, {"r_yy": []}, r"r_yy must be E\[y yᵀ\] of 2 outputs, .* got shape \(0,\)"),
        (EYE, ROW, {"r_yy": np.eye(3)}, r"r_yy must be E\[y yᵀ\] of 2 outputs"),
        (np.ma.array(EYE, mask=EYE > 0), ROW, {}, "r_xx has masked entries"),
        (EYE, ROW, {"method": "adam"}, "unknown method 'adam'; choose one of alternate_minimization, fista"),
    ],
)
def test_bad_values_are_refused(r_xx, r_yx, options, message):
    with pytest.raises(ValueError, match=message):
        ps.solve_linear_reconstruction(r_xx, r_yx, **{"lam": 1.0, **options})


@pytest.mark.parametrize(
    ("r_xx", "r_yx", "options", "message"),
    [
        (EYE.astype(complex), ROW, {}, "r_xx must hold real numbers, got dtype complex128"),
        (EYE, ROW.astype(object), {}, "r_yx must hold real numbers"),
        (EYE, ROW, {"lam": "large"}, "lam must be a number, got 'large'"),
        (EYE, ROW, {"group_size": 2.0}, "group_size must be an integer of at least 1, got 2.0"),
        (EYE, ROW, {"max_iter": np.inf}, "max_iter must be an integer within 0 .* got inf"),
        (EYE, ROW, {"r_yy": "all"}, "r_yy must hold real numbers"),
        (torch.eye(4, device="meta"), ROW, {}, "r_xx is on meta"),
    ],
)
def test_bad_types_are_refused(r_xx, r_yx, options, message):
    with pytest.raises(TypeError, match=message):
        ps.solve_linear_reconstruction(r_xx, r_yx, **{"lam": 1.0, **options})


@pytest.mark.parametrize("problems", [EYE, [EYE, ROW], "text", [(EYE, ROW, 1)]])
def test_what_is_no_problem_is_refused(problems):
    with pytest.raises(TypeError, match="a problem is a Correlations or a tuple"):
        ps.fista(problems, 1.0)


def test_readers_must_share_their_inputs():
    with pytest.raises(ValueError, match="readers must share their inputs, got 4 and 3"):
        ps.fista([(EYE, ROW), (np.eye(3), np.ones((1, 3)))], 1.0)
    with pytest.raises(ValueError, match="empty list"):
        ps.fista([], 1.0)
    with pytest.raises(ValueError, match="r_yy must have one entry for each of 2 readers, got 3"):
        ps.fista([(EYE, ROW)] * 2, 1.0, r_yy=[1.0] * 3)


def test_readers_must_share_their_groups():
    x = np.random.default_rng(0).standard_normal((9, 4))
    with pytest.raises(ValueError, match=r"share their groups, got group sizes \[1, 2\]"):
        ps.fista([ps.Correlations.from_samples(x, x, group_size=g) for g in (1, 2)], 1.0)


def test_tensors_lists_and_smaller_floats_are_accepted():
    wanted = ps.solve_linear_reconstruction(EYE, ROW, 0.5).M
    for r_xx, r_yx in [
        (torch.eye(4), torch.ones(2, 4, requires_grad=True)),
        (EYE.tolist(), ROW.tolist()),
        (EYE.astype(np.float32), np.asfortranarray(ROW)),
        (np.eye(8)[::2, ::2], np.ones((2, 4), int)),
    ]:
        np.testing.assert_allclose(ps.solve_linear_reconstruction(r_xx, r_yx, 0.5).M, wanted, rtol=1e-12)


def test_rounding_of_float32_correlations_is_no_error():
    """Sums in float32 leave a singular matrix with slightly negative eigenvalues and asymmetry."""
    x = np.random.default_rng(0).standard_normal((20, 60)).astype(np.float32)
    R = x.T @ x / np.float32(20)
    R[0, 1] *= 1 + 1e-7
    solution = ps.solve_linear_reconstruction(R, R[:5], 0.1, tol=1e-6)
    assert solution.converged


def test_inputs_are_never_written_to():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 6))
    R, C = x.T @ x, x[:, :8].T @ x
    M0, weights = np.ones_like(C), np.array([0.0, 1, 1, 1, 1, 1])
    kept = [a.copy() for a in (R, C, M0, weights)]
    for array in (R, C, M0, weights):
        array.flags.writeable = False
    for method in ("proximal_gradient", "fista", "alternate_minimization", "newton"):
        ps.solve_linear_reconstruction(R, C, 1.0, method, M0=M0, weights=weights)
    for before, after in zip(kept, (R, C, M0, weights), strict=True):
        np.testing.assert_array_equal(before, after)


def of_two_layers():
    """Two readers of the same inputs, and functions of (problem, options) with their required settings."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8))
    layers = [ps.Correlations.from_samples(x, x @ rng.standard_normal((8, h)), group_size=2) for h in (3, 2)]
    M = [ps.debias(one, keep=[0, 3]) for one in layers]
    return layers, M


VERBS = {
    "lam_max": lambda *given, M, **options: ps.lam_max(*given, **options),
    "certify": lambda *given, M, **options: ps.certify(*given, M, 0.3, **options).gap,
    "debias": lambda *given, M, **options: ps.debias(*given, [1, 2], **options),
    "path": lambda *given, M, **options: ps.elimination_path(*given, **options).refit(2),
    "select": lambda *given, M, **options: ps.select_channels(*given, 2, method="swap", **options),
    "lams": lambda *given, M, **options: ps.regularization_path(*given, [0.5], **options)[0].M,
    "groups": lambda *given, M, **options: ps.lam_for_groups(*given, 2, **options)[0].M,
    "solve": lambda *given, M, **options: ps.solve_linear_reconstruction(*given, 0.3, M0=M, **options).M,
    "newton": lambda *given, M, **options: ps.newton(*given, 0.3, **options).M,
    "fista": lambda *given, M, **options: ps.fista(*given, 0.3, q=1.0, **options).M,
    "alternate": lambda *given, M, **options: ps.alternate_minimization(*given, 0.3, **options).M,
    "plain": lambda *given, M, **options: ps.proximal_gradient(*given, 0.3, max_iter=50, **options).M,
}


def assert_same(one, other):
    assert type(one) is type(other)
    for a, b in zip(*((one, other) if isinstance(one, tuple) else ([one], [other])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("verb", VERBS)
def test_every_function_takes_correlations_pairs_and_two_matrices(verb):
    (layer, _), (M, _) = of_two_layers()
    wanted = VERBS[verb](layer, M=M)
    R, C = layer.r_xx, layer.r_yx
    for matrices, options in [
        ((layer,), {}),
        ((R, C), {"group_size": 2}),
        (((R, C),), {"group_size": 2}),
        ((torch.from_numpy(R), C.tolist()), {"group_size": 2}),
    ]:
        assert_same(VERBS[verb](*matrices, M=M, **options), wanted)


def test_a_problem_may_be_named_and_is_missed():
    (layer, _), _ = of_two_layers()
    assert ps.lam_max(problem=layer) == ps.lam_max(layer)
    assert_same(ps.newton(problem=layer, lam=0.3).M, ps.newton(layer, 0.3).M)
    for verb in (ps.lam_max, ps.elimination_path):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'problem'"):
            verb()


def test_lists_of_matrices_belong_together():
    layers, _ = of_two_layers()
    with pytest.raises(ValueError, match="expected one r_yx for each of 2 r_xx, got 1"):
        ps.lam_max([one.r_xx for one in layers], [layers[0].r_yx])


@pytest.mark.parametrize("verb", VERBS)
def test_every_function_takes_several_readers_as_a_list_of_problems_or_lists_of_matrices(verb):
    layers, M = of_two_layers()
    wanted = VERBS[verb](layers, M=M)
    R, C = [one.r_xx for one in layers], [one.r_yx for one in layers]
    assert isinstance(wanted, float | np.ndarray) or [m.shape for m in wanted] == [(3, 8), (2, 8)]
    for matrices in [(list(zip(R, C, strict=True)),), (R, C), ((R, C),), (tuple(zip(R, C, strict=True)),)]:
        assert_same(VERBS[verb](*matrices, M=M, group_size=2), wanted)
    single = VERBS[verb](layers[:1], M=M[:1])
    assert_same(single, VERBS[verb]([R[0]], [C[0]], M=M[0], group_size=2))


def test_energies_of_several_readers_add_up_in_every_function():
    layers, _ = of_two_layers()
    yy = [one.r_yy for one in layers]
    half = 0.5 * sum(np.trace(one) for one in yy)
    assert ps.newton(layers, 0.3, r_yy=yy).objective == pytest.approx(ps.newton(layers, 0.3).objective + half)
    assert ps.elimination_path(layers, r_yy=yy).error[0] == pytest.approx(half)


@pytest.mark.parametrize("verb", [ps.debias, ps.select_channels, ps.lam_for_groups, ps.newton, ps.certify])
def test_what_is_required_cannot_be_forgotten(verb):
    with pytest.raises(TypeError, match=r"missing .* required positional argument"):
        verb(EYE, ROW)
    with pytest.raises(TypeError, match=r"a problem is a Correlations or a tuple|missing"):
        verb(EYE)


def layouts(matrix):
    """The same numbers in other memory orders, and not to be written to."""
    wide = np.zeros((2 * len(matrix), 3 * matrix.shape[1]))
    wide[::2, ::3] = matrix
    locked = np.asfortranarray(matrix.copy())
    locked.flags.writeable = False
    return [np.asfortranarray(matrix), wide[::2, ::3], np.flip(np.flip(matrix).copy()), locked]


def hostile_samples(rng, kind, n, d):
    """Samples of fewer rows than columns: integers, powers, copies, constants, columns 12 decades apart."""
    x = rng.standard_normal((n, d))
    if kind == "integers":
        x = rng.integers(-3, 9, (n, d)).astype(float)
    elif kind == "powers":
        x = (5 * rng.random((n, 1))) ** np.arange(d)
    elif kind == "copies":
        x[:, 1:] = x[:, :1]
    elif kind == "constant":
        x += 1e4 * rng.random(d)
        x[:, 0] = 1.0
    elif kind == "decades":
        x *= 10.0 ** rng.uniform(-6, 6, d)
    return x


ENTRIES = {
    "newton": lambda R, C, W: ps.newton((R, C), float(0.2 * np.abs(C).max())).M,
    "certify": lambda R, C, W: ps.certify(R, C, W, 1.0).gap,
    "lam_max": lambda R, C, W: ps.lam_max(R, C),
    "debias": lambda R, C, W: ps.debias(R, C, [0, 1]),
    "path": lambda R, C, W: ps.elimination_path(R, C).error,
    "swap": lambda R, C, W: ps.select_channels(R, C, 2, method="swap"),
    "obs": lambda R, C, W: ps.obs_prune(W, R, amount=0.5).weight,
    "quantize": lambda R, C, W: ps.quantize_layer(W, R, C, bits=3).weight,
}


@settings(max_examples=8)
@given(
    seed=seeds,
    kind=st.sampled_from(["normal", "integers", "powers", "copies", "constant", "decades"]),
    n=st.integers(1, 12),
    d=st.integers(3, 30),
)
def test_what_data_can_have_is_accepted_everywhere_in_any_memory_order(seed, kind, n, d):
    rng = np.random.default_rng(seed)
    x = hostile_samples(rng, kind, n, d)
    R, C, W = x.T @ x / n, (x @ rng.standard_normal((d, 2))).T @ x / n, rng.standard_normal((2, d))
    for entry in ENTRIES.values():
        wanted = entry(R, C, W)
        for other in zip(layouts(R), layouts(C), layouts(W), strict=True):
            np.testing.assert_array_equal(entry(*other), wanted)


@pytest.mark.parametrize("exponent", [-170, -162, -155, -150, -100])
@pytest.mark.parametrize("verb", ["newton", "certify", "lam_max", "debias", "path", "swap"])
def test_an_input_whose_square_underflows_is_one_that_is_zero(exponent, verb):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 4))
    x[:, 1] *= 10.0**exponent
    R, C = x.T @ x / 20, (x @ rng.standard_normal((4, 2))).T @ x / 20
    found = ENTRIES[verb](R, C, np.zeros((2, 4)))
    assert np.isfinite(found).all()
    if verb == "newton":
        assert not found[:, 1].any()


@settings(max_examples=15)
@given(seed=seeds, d=st.integers(2, 40))
def test_sums_in_single_precision_are_raised_by_little_and_that_is_said(seed, d):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, d + 2))
    x = rng.standard_normal((n, d)).astype(np.float32)
    R, C = x.T @ x / np.float32(n), x[:, :2].T @ x / np.float32(n)
    problem = problem_of((R, C))
    own = R.astype(np.float64) / 2 + R.T.astype(np.float64) / 2
    lowest = np.linalg.eigvalsh(own / np.sqrt(np.outer(np.diag(own), np.diag(own))))[0]
    (lift,) = problem.lifts
    np.testing.assert_allclose(problem.xx[0], own + np.diag(lift), rtol=1e-14)
    # Within the step of the shares above what the lowest eigenvalue asks for.
    assert 0 <= lift.max() <= np.diag(own).max() * max(4 * -lowest, 1e-12 * d)
    solution = ps.newton((R, C), 0.05, tol=1e-5)
    assert solution.shift == pytest.approx(lift.max(), rel=1e-12)
    assert ps.certify(R, C, solution.M, 0.05).shift == solution.shift
    exact = exact_objective(own, C, solution.M, 0.05)
    assert solution.objective == pytest.approx(exact, rel=1e-12)
    below = exact - lowest_found(own, C, solution.M, 0.05)
    assert below <= solution.gap * (1 + 1e-9) + 1e-12 * abs(exact)
