"""One bar for a call: it never goes back, ends at its end, and is silent where nobody looks."""

import io
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pysolve as ps
from pysolve.nn import progress


class Terminal(io.StringIO):
    """What is written, by something that takes itself for a terminal."""

    def isatty(self):
        return True


def seen(call, kind=Terminal):
    """What a call writes; pytest gives tests another stderr than fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", kind())
        call()
        return sys.stderr.getvalue()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def batches():
    return [torch.randn(50, 6) for _ in range(6)]


CALLS = {
    "compress": lambda **given: ps.compress(network(), batches(), target={"params": 0.5}, **given),
    "low_rank": lambda **given: ps.low_rank(network(), batches(), rank=2, layout="factored", **given),
    "prune": lambda **given: ps.prune(network(), batches(), method="obs", amount=0.5, **given),
    "deep_compress": lambda **given: ps.deep_compress(network(), batches(), target={"bytes": 0.4}, **given),
    "study": lambda **given: ps.study(network(), batches(), **given),
    "matched": lambda **given: ps.compress(network(), batches(), keep=0.5, distill={"epochs": 1}, **given),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_shows_one_bar_from_its_start_to_its_end(call):
    text = seen(lambda: CALLS[call](progress=True))
    shown = [line for line in text.split("\r") if line.strip()]
    title = "compress" if call == "matched" else call
    assert all(line.startswith(title) for line in shown)
    shares = [int(line.split("%|")[0].rsplit(" ", 1)[-1]) for line in shown]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "trace" in shown[0] or "trace" in shown[1]
    assert any("gather" in line for line in shown)
    if call == "deep_compress":
        assert any("3 of 3 (codes)" in line for line in shown)


def test_nothing_is_shown_on_a_pipe_or_where_nobody_asked(capfd):
    assert seen(lambda: CALLS["compress"](progress=False)) == ""
    assert seen(lambda: CALLS["compress"](progress=True), io.StringIO) == ""
    assert capfd.readouterr() == ("", "")


@given(
    st.lists(st.sampled_from(["trace", "gather", "measure", "refit", "train"]), max_size=12),
    st.integers(1, 3),
)
def test_stages_in_any_order_move_the_bar_forth_alone(names, parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        with progress.whole("call", True):
            bar, last = progress._CURRENT.get().bar, 0.0
            for number in range(parts):
                with progress.part(number + 1, parts, "part"):
                    for name in names:
                        for _ in progress.steps(range(3), name):
                            assert last <= bar.n < (number + 1) / parts
                            last = bar.n


def test_an_error_leaves_no_bar_behind():
    with pytest.raises(ps.PysolveError):
        seen(lambda: ps.compress(network(), batches(), target={"params": 1e-9}))
    assert not progress.in_call()
