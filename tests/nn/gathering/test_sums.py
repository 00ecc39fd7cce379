"""Sums of any pieces are those of all samples at once, and single-precision products keep their bound."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pysolve.correlations import Correlations
from pysolve.nn.gathering import sums as module
from pysolve.nn.gathering.sums import Sums

seeds = st.integers(0, 10**6)


@given(
    seeds,
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(20, 99),
    st.integers(1, 9),
)
def test_sums_of_any_pieces_are_those_of_all_samples(seed, d, h, full, by_columns, room, strip):
    rng = np.random.default_rng(seed)
    x, y = (torch.from_numpy(rng.standard_normal((15, width))) for width in (d, h))
    stored = x.T.contiguous().T if by_columns else x
    with mock.patch.multiple(module, ROOM=room, _STRIP=strip):
        sums = Sums.zeros(d, h, x.device, full=full)
        for part in np.split(np.arange(15), sorted(rng.integers(0, 16, 2))):
            sums.add(stored[part[0] : part[-1] + 1] if len(part) else stored[:0], y[part])
    found, wanted = sums.correlations(), Correlations.from_samples(x.numpy(), y.numpy())
    if not full:
        wanted = replace(wanted, yy=np.diag(wanted.yy))
    assert found.count == sums.count == 15
    for name in ("xx", "yx", "yy", "x_sum", "y_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.xx, found.xx.T)
    np.testing.assert_array_equal(found.yy, found.yy.T)


@given(seeds, st.integers(2, 12), st.sampled_from([2, 300]))
def test_weights_whose_mean_is_rounded_leave_variances_of_inputs_that_hardly_vary(seed, steps, outputs):
    rng, rows = np.random.default_rng(seed), 400
    x = (1 + rng.standard_normal((rows, 6)) * 2.0 ** -np.arange(2, 2 + 6 * steps, steps).clip(0, 16)).astype(
        "f"
    )
    weights = torch.from_numpy(rng.gamma(1.0, size=(rows, 1))).float()
    # As far from 1 as rounding of every weight may bring their mean.
    weights *= (1 + 1e-7) / weights.mean()
    sums, y = Sums.zeros(6, outputs, torch.device("cpu")), torch.zeros(rows, outputs)
    for some in (slice(0, 150), slice(150, None)):
        sums.add(torch.from_numpy(x[some]), y[some], weights=weights[some])
    w, wide = weights.double().numpy() / float(weights.double().mean()), x.astype(float)
    around = wide - (w * wide).mean(0)
    wanted, found = (w * around).T @ around / rows, sums.correlations().centered().r_xx
    unit = np.sqrt(np.diag(wanted))
    assert np.abs((found - wanted) / unit / unit[:, None]).max() < 1e-4


@given(seeds, st.integers(1, 300), st.integers(0, 5), st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_samples_of_whole_weights_count_as_often(seed, d, h, counts):
    if not sum(counts):
        counts[0] = 1
    rng, often = np.random.default_rng(seed), sum(counts) / len(counts)
    x, y = (rng.standard_normal((len(counts), width)).astype(np.float32) for width in (d, h))
    sums, weights = Sums.zeros(d, h, torch.device("cpu")), torch.tensor(counts)[:, None] / often
    for some in (slice(0, 1), slice(1, None)):
        sums.add(*(torch.from_numpy(part[some]) for part in (x, y)), weights=weights[some])
    found, wanted = (
        sums.correlations(),
        Correlations.from_samples(*(np.repeat(part, counts, 0) for part in (x, y))),
    )
    assert found.count == len(counts)
    # Terms of sums and of products with outputs may cancel.
    sizes = {"xx": np.trace(wanted.xx), "yx": np.sqrt(np.trace(wanted.xx) * np.trace(wanted.yy))}
    sizes |= {
        "x_sum": np.sqrt(sum(counts) * sizes["xx"]),
        "y_sum": np.sqrt(sum(counts) * np.trace(wanted.yy)),
    }
    for name, size in sizes.items():
        assert np.linalg.norm(often * getattr(found, name) - getattr(wanted, name)) <= 1e-6 * size
    # The shift is near the first rows, which may count for nothing.
    squares = often * found.yy - np.diag(wanted.yy)
    assert np.abs(squares).max(initial=0) <= 1e-6 * (np.trace(wanted.yy) + often * np.square(y).sum())


INPUTS = {
    "normal": lambda x: x,
    "positive": np.abs,
    "rectified": lambda x: np.maximum(x, 0),
    "far mean": lambda x: 3 + 1e-3 * x,
    "scales": lambda x: x * np.geomspace(1e-3, 1e3, x.shape[1]),
    "common": lambda x: x + 5 * x[:, :1],
    "tiny": lambda x: 1e-25 * x,
    "huge": lambda x: 1e25 * x,
    "bits": lambda x: (x > 0).astype(float),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_single_precision_are_within_their_bound(kind, dtype):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(INPUTS[kind](rng.standard_normal((9000, 260)))).to(dtype)
    y = torch.from_numpy(rng.standard_normal((9000, 3))).to(dtype)
    sums = Sums.zeros(260, 3, x.device)
    for some in range(0, 9000, 3500):
        sums.add(x[some : some + 3500], y[some : some + 3500])
    found = sums.correlations()
    wanted = Correlations.from_samples(x.double().numpy(), y.double().numpy())
    for own, other in ((found, wanted), (found.centered(), wanted.centered())):
        assert np.linalg.norm(own.xx - other.xx) <= 1e-6 * np.linalg.norm(other.xx)
        scale = np.sqrt(np.linalg.norm(other.xx) * np.linalg.norm(other.yy))
        assert np.linalg.norm(own.yx - other.yx) <= 1e-6 * scale
        np.testing.assert_allclose(own.yy, np.diag(other.yy), rtol=1e-6)
    scale = np.sqrt(9000 * np.diag(wanted.xx))
    assert np.all(np.abs(found.x_sum - wanted.x_sum) <= 1e-7 * scale)
