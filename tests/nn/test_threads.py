"""Threads of torch and of BLAS in a call."""

import pytest
import torch
from threadpoolctl import threadpool_info
from torch import nn

import pysolve as ps
from pysolve.nn.threads import all_blas_threads, threads


def of_blas():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


@pytest.mark.parametrize("count", [1, 2])
def test_blas_has_one_thread_in_a_call_but_for_long_work(count):
    seen, before = [], of_blas()

    def score(model):
        with all_blas_threads():
            everything = of_blas()
        with all_blas_threads(1e6):
            little = of_blas()
        seen.append((of_blas(), everything, little))
        return 0.0

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    with threads(count):
        inside = of_blas()
        ps.compress(model, [torch.randn(16, 8) for _ in range(4)], keep=0.5, evaluate=score)
        assert of_blas() == inside
    assert inside == {count}
    assert seen == [({1}, {count}, {1})] * len(seen) != []
    assert of_blas() == before
