"""Grids: evenly spaced values with zero among them, the best scales for given codes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from pysolve.layer.grids import Grid, fit_grid
from pysolve.layer.rounding import Target

bits_of, groups = st.integers(2, 8), st.sampled_from([None, 1, 3, 100])


def weights(seed, h=4, d=10):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((h, d)) + rng.standard_normal((h, 1))


@given(seeds, bits_of, groups, st.booleans())
def test_a_value_goes_to_the_nearest_of_its_grid(seed, bits, group, symmetric):
    W = weights(seed)
    grid = fit_grid(W, bits, symmetric=symmetric, group=group)
    top, columns = 1 << (bits - 1), np.arange(10)
    for i, j in np.ndindex(W.shape):
        part = j // grid.group
        allowed = (np.arange(-top, top) - grid.zeros[i, part]) * grid.scales[i, part]
        assert 0.0 in allowed
        nearest = np.abs(allowed - W[i, j]).min()
        assert abs(grid.round(W, columns)[i, j] - W[i, j]) == pytest.approx(nearest, abs=1e-12)
        assert grid.round(W[:, j], j)[i] == grid.round(W, columns)[i, j]
    zeros = np.broadcast_to(grid.zero_codes(columns), W.shape)
    assert not grid.values(zeros, columns).any()


@given(seeds, bits_of, groups, st.booleans())
def test_the_plain_range_misses_no_weight_by_more_than_a_step(seed, bits, group, symmetric):
    W, columns = weights(seed), np.arange(10)
    grid = fit_grid(W, bits, symmetric=symmetric, group=group)
    step = grid.scales[:, columns // grid.group]
    assert (np.abs(grid.round(W, columns) - W) <= (0.5 if symmetric else 1.0) * step * (1 + 1e-6)).all()


@given(seeds, bits_of, groups, st.booleans())
def test_the_chosen_range_loses_no_more_than_the_plain_one(seed, bits, group, symmetric):
    W, columns = weights(seed), np.arange(10)
    share = np.random.default_rng(seed).random(10)
    lost = [
        np.sum(
            share
            * np.square(fit_grid(W, bits, symmetric=symmetric, group=group, weights=w).round(W, columns) - W)
        )
        for w in (share, None)
    ]
    assert lost[0] <= lost[1] * (1 + 1e-12)


@given(seeds, bits_of)
def test_weights_on_a_grid_stay_as_they_are(seed, bits):
    rng, top = np.random.default_rng(seed), 1 << (bits - 1)
    codes = rng.integers(1 - top, top, (3, 12))
    codes[:, 0] = top - 1
    scales = rng.random((3, 1)).astype(np.float32).astype(float) + 1
    grid = fit_grid(codes * scales, bits, weights=np.ones(12))
    assert np.allclose(grid.round(codes * scales, np.arange(12)), codes * scales, rtol=1e-6)


def test_rows_of_zeros_and_layers_of_nothing_have_grids():
    grid = fit_grid(np.zeros((2, 3)), 4, weights=np.ones(3))
    assert not grid.round(np.zeros((2, 3)), np.arange(3)).any()
    for shape in ((0, 3), (3, 0)):
        assert fit_grid(np.zeros(shape), 4).round(np.zeros(shape), np.arange(shape[1])).shape == shape


@given(seeds, st.integers(2, 8))
def test_a_huge_weight_that_does_not_count_leaves_the_range_to_the_others(seed, bits):
    W = np.random.default_rng(seed).standard_normal((3, 12))
    counts = np.ones(12)
    W[:, 5], counts[5] = 100.0, 1e-12
    others = np.delete(np.arange(12), 5)
    grid, small = (
        fit_grid(one, bits, weights=weights) for one, weights in ((W, counts), (W[:, others], counts[others]))
    )
    lost = np.square(grid.round(W, np.arange(12)) - W)[:, others].sum()
    # Of shares that are tried, the next one is 1.6 times as wide.
    assert lost <= 3 * np.square(small.round(W[:, others], np.arange(11)) - W[:, others]).sum() + 0.1


@st.composite
def rounded_layers(draw, group=None):
    rng = np.random.default_rng(draw(seeds))
    h, d = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    x = rng.standard_normal((2 * d, d))
    V = rng.standard_normal((h, d))
    target = Target(V, x.T @ x / len(x) if draw(st.booleans()) else None, None)
    grid = fit_grid(V, 3, symmetric=draw(st.booleans()), group=group)
    return target, grid, grid.codes(V, np.arange(d))


@given(rounded_layers())
def test_refitted_scales_of_whole_rows_are_the_best(layer):
    target, grid, codes = layer
    columns, A = np.arange(codes.shape[1]), np.eye(codes.shape[1]) if layer[0].A is None else layer[0].A
    fitted = grid.refit(codes, target)
    steps = codes - grid.zeros
    for i, step in enumerate(steps):
        if step.any():
            wanted = step @ A @ target.V[i] / (step @ A @ step)
            assert fitted.scales[i, 0] == pytest.approx(wanted if wanted > 0 else grid.scales[i, 0], rel=1e-6)
    assert target.loss(fitted.values(codes, columns)) <= target.loss(grid.values(codes, columns)) * (1 + 1e-6)


@given(rounded_layers(group=2))
def test_refitted_scales_of_groups_come_to_the_best(layer):
    target, grid, codes = layer
    columns = np.arange(codes.shape[1])
    losses = [target.loss(grid.values(codes, columns))]
    fitted: Grid = grid
    for _ in range(200):
        fitted = fitted.refit(codes, target)
        losses.append(target.loss(fitted.values(codes, columns)))
    assert (np.diff(losses) <= 1e-6 * losses[0] + 1e-12).all()
    # At the end each scale is its own best, unless that would not be positive.
    M, A = fitted.values(codes, columns), np.eye(len(columns)) if target.A is None else target.A
    for i, part in np.ndindex(fitted.scales.shape):
        step = np.where(columns // 2 == part, codes[i] - grid.zeros[i, part], 0.0)
        if step.any():
            best = fitted.scales[i, part] - (M[i] - target.V[i]) @ A @ step / (step @ A @ step)
            assert best <= 0 or best == pytest.approx(fitted.scales[i, part], rel=1e-3, abs=1e-5)
