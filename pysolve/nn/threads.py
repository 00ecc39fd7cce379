"""One number of threads for all that a call computes with: that of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from threadpoolctl import threadpool_limits

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and the BLAS of NumPy and SciPy use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def threads_of_torch(verb: Callable[P, R]) -> Callable[P, R]:
    """A function in which BLAS uses as many threads as torch does."""

    @wraps(verb)
    def limited(*args: P.args, **options: P.kwargs) -> R:
        with threadpool_limits(torch.get_num_threads(), user_api="blas"):
            return verb(*args, **options)

    return limited
