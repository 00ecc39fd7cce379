"""Threads that a call computes with: those of torch, and as many of BLAS where it works for long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from threadpoolctl import threadpool_limits

# Some 80 ms of one thread: threads of BLAS wait for a third of that.
_MANY = 4e9

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


def one_blas_thread(verb: Callable[P, R]) -> Callable[P, R]:
    """A function in which the BLAS of NumPy and SciPy has one thread, but for ``all_blas_threads``.

    Its threads wait for more work for a while, on cores that torch's threads then do not have: a BERT of six
    layers takes 51 s on two cores, and 72 s where BLAS has two threads as well.
    """

    @wraps(verb)
    def limited(*args: P.args, **options: P.kwargs) -> R:
        with threadpool_limits(1, user_api="blas"):
            return verb(*args, **options)

    return limited


@contextmanager
def all_blas_threads(multiplications: float = math.inf) -> Iterator[None]:
    """Let BLAS have as many threads as torch for work of so many multiplications, if these are many."""
    if multiplications < _MANY or torch.get_num_threads() == 1:
        yield
        return
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        yield
