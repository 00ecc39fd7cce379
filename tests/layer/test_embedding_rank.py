"""Tables of low rank: the bound of Eckart and Young for weighted rows, and no better factors for two uses."""

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from pysolve.layer.embedding_rank import Uses, decompose_table, table_loss


@st.composite
def tables(draw, heads=False):
    """A table, its uses, and a rank."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    table = rng.standard_normal((rows, columns)) * rng.uniform(0.1, 2, columns)
    counts = rng.integers(0 if draw(st.booleans()) else 1, 9, rows).astype(float)
    X, Y = rng.standard_normal((2, columns + 2, columns))
    metric = np.eye(columns) if draw(st.booleans()) else X.T @ X
    uses = Uses(counts, metric, draw(st.floats(0.1, 10)) * Y.T @ Y if heads else None)
    return table, uses, draw(st.integers(1, columns))


def slow_loss(table, other, uses):
    """Row after row."""
    R = 0 if uses.moments is None else uses.moments
    return sum(
        (e - m) @ (n * uses.metric + R) @ (e - m) for e, m, n in zip(table, other, uses.counts, strict=True)
    )


@given(case=tables())
def test_no_table_of_that_rank_is_nearer_in_rows_that_count_by_how_often_they_occur(case):
    table, uses, rank = case
    A, B = decompose_table(table, uses).factors(rank)
    assert (A.shape, B.shape) == ((len(table), rank), (rank, table.shape[1]))
    weighed = np.sqrt(uses.counts)[:, None] * table @ scipy.linalg.cholesky(uses.metric, lower=True)
    least = np.square(scipy.linalg.svdvals(weighed)[rank:]).sum()
    whole = np.square(weighed).sum()
    assert slow_loss(table, A @ B, uses) == pytest.approx(least, abs=1e-6 * whole + 1e-12)
    assert table_loss(table, A @ B, uses) == pytest.approx(slow_loss(table, A @ B, uses), abs=1e-9)


@given(case=tables())
def test_what_every_rank_loses_is_known_from_one_decomposition(case):
    table, uses, rank = case
    made = decompose_table(table, uses)
    whole = table_loss(table, 0 * table, uses)
    A, B = made.factors(rank)
    assert made.tails[0] == pytest.approx(1.0 if whole else 0.0)
    assert (np.diff(made.tails) <= 0).all()
    assert table_loss(table, A @ B, uses) == pytest.approx(made.tails[rank] * whole, abs=1e-6 * whole + 1e-12)


@given(case=tables(heads=True))
def test_with_heads_factors_are_better_than_those_of_one_metric_and_no_step_makes_them_so(case):
    table, uses, rank = case
    made = decompose_table(table, uses)
    A, B = made.factors(rank)
    P = made.directions[:, :rank]
    start = table @ made.root @ P @ np.linalg.solve(made.root, P).T
    whole = table_loss(table, 0 * table, uses)
    lost = table_loss(table, A @ B, uses)
    assert lost == pytest.approx(slow_loss(table, A @ B, uses))
    assert lost <= table_loss(table, start, uses) + 1e-6 * whole

    def objective(values):
        a, b = values[: A.size].reshape(A.shape), values[A.size :].reshape(B.shape)
        off = a @ b - table
        slope = uses.counts[:, None] * (off @ uses.metric) + off @ uses.moments
        return (slope * off).sum(), 2 * np.concatenate([(slope @ b.T).ravel(), (a.T @ slope).ravel()])

    given = np.concatenate([A.ravel(), B.ravel()])
    found = scipy.optimize.minimize(objective, given, jac=True, method="L-BFGS-B", options={"maxiter": 30})
    assert found.fun >= 0.9 * lost - 1e-5 * whole


@given(case=tables(heads=True))
def test_at_full_rank_nothing_is_lost(case):
    table, uses, _ = case
    A, B = decompose_table(table, uses).factors(min(table.shape))
    if len(table) >= table.shape[1]:
        assert np.allclose(A @ B, table, atol=1e-4 * np.abs(table).max())


def test_rows_of_zeros_stay_zeros():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9, 5))
    table[4] = 0
    for moments in (None, np.eye(5)):
        A, _ = decompose_table(table, Uses(np.arange(9.0), np.eye(5), moments)).factors(2)
        assert (A[4] == 0).all()
