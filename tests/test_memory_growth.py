"""No compiled function keeps memory: that of the process does not grow over many calls."""

import gc
from pathlib import Path

import pytest
from compiled import CALLS


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def grown(call):
    """Bytes that 10,000 calls leave."""
    gc.collect()
    before = resident()
    for _ in range(10_000):
        call()
    gc.collect()
    return resident() - before


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_memory_of_the_process_does_not_grow(name):
    call = CALLS[name]
    for _ in range(1000):
        call()
    # A kept kilobyte a call would be ten times as much, and again in every round; what the allocator holds
    # back for once is not.
    assert any(grown(call) < 1 << 20 for _ in range(3))
