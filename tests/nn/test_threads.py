"""A call computes with as many threads as torch has, whatever library does it."""

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

import pysolve as ps
from pysolve.nn.threads import threads


def of_blas():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


@pytest.mark.parametrize("count", [1, 2])
def test_blas_follows_torch_for_the_time_of_a_call(count):
    seen, before = [], of_blas()

    def score(model):
        seen.append(of_blas())
        return 0.0

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    with threads(count):
        inside = of_blas()
        with threadpool_limits(3 - count, user_api="blas"):
            ps.compress(model, [torch.randn(16, 8) for _ in range(4)], keep=0.5, evaluate=score)
    assert inside == {count}
    assert seen == [{count}] * len(seen) != []
    assert of_blas() == before
