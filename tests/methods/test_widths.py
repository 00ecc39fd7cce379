"""Of several widths the one whose outputs are closest to the original's is found, in few tries."""

from hypothesis import given
from hypothesis import strategies as st

from pysolve.methods.sizes import Sized
from pysolve.methods.widths import Width, least_divergent

NOTHING = Sized((), ())


@given(st.floats(0.01, 2), st.floats(0.05, 1))
def test_the_best_width_near_the_start_is_found(best, start):
    calls = []

    def width(share, near):
        calls.append(share)
        return Width(share, NOTHING, abs(share - best))

    found = least_divergent(width, start)
    assert len(calls) == len(set(calls)) <= 5
    assert found.divergence == abs(found.share - best) == min(abs(share - best) for share in calls)
    assert all(0 < share < 0.9 or share == 1 for share in calls)


def test_widths_that_cannot_be_are_passed_over():
    assert (
        least_divergent(
            lambda share, near: Width(share, NOTHING) if share < 0.3 else Width(share, NOTHING, 1 / share),
            0.2,
        ).share
        > 0.3
    )
