"""Compiled functions give the same bits from eight threads as from one."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from compiled import CALLS, running

THREADS, ROUNDS = 8, 5


@pytest.mark.parametrize("pool", [1, 3])
def test_eight_threads_do_not_mix(pool):
    """All functions at once, each thread in an order of its own."""
    names = [*CALLS]
    with running(threads=pool):
        expected = {name: CALLS[name]() for name in names}

        def work(number):
            for name in np.random.default_rng(number).permutation(names * ROUNDS):
                found = CALLS[name]()
                assert len(found) == len(expected[name])
                assert all(map(np.array_equal, found, expected[name])), name

        with ThreadPoolExecutor(THREADS) as executor:
            for done in [executor.submit(work, number) for number in range(THREADS)]:
                done.result()
