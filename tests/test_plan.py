"""A plan refuses what no network could mean."""

import numpy as np
import pytest
import small

import pysolve as ps
from pysolve.plan import Collapse, Plan, Site

SITE = Site(5, writers=("fc1",), readers=("fc2",))


def test_keep_becomes_an_index_array():
    step = Collapse(SITE, [0, 2, 4])
    assert step.keep.dtype == np.intp
    assert list(step.keep) == [0, 2, 4]
    assert not Collapse(SITE, []).keep.size


@pytest.mark.parametrize("keep", [[2, 0], [1, 1], [[0, 1]]])
def test_keep_must_ascend_without_repeats(keep):
    with pytest.raises(ValueError, match="ascending"):
        Collapse(SITE, keep)


@pytest.mark.parametrize("keep", [[-1, 2], [0, 5]])
def test_keep_must_lie_within_the_site(keep):
    with pytest.raises(ValueError, match=r"within 0 … 4"):
        Collapse(SITE, keep)


def test_layers_of_a_site_are_lists_of_names():
    assert Site(5, ["fc1"], ["fc2"]) == Site(5, ("fc1",), ("fc2",))
    for names in ({"writers": "fc1"}, {"readers": "fc2"}, {"passed": "norm"}):
        with pytest.raises(TypeError, match=r"must be a tuple of names, got the string .*: pass \('\w+',\)"):
            Site(5, **{"writers": ("fc1",), "readers": ("fc2",), **names})
    for channels in (-1, 2.5, "many"):
        with pytest.raises((TypeError, ValueError), match="channels must be an integer of at least 0"):
            Site(channels, ("fc1",), ("fc2",))


def test_only_readers_of_the_site_may_get_new_weights():
    with pytest.raises(ValueError, match="fc3"):
        Collapse(SITE, [0], weights={"fc3": np.ones((2, 1))})
    with pytest.raises(ValueError, match="fc1"):
        Collapse(SITE, [0], biases={"fc1": np.ones(5)})


def test_a_plan_may_be_empty():
    assert Plan().steps == ()


def test_the_same_channels_are_the_same_site_whenever_they_are_found():
    net, x = small.residual()
    first, again = (ps.find_sites(net, x) for _ in range(2))
    assert first == again
    assert len({*first, *again}) == len(first)
    one = Site(4, ("a",), ("b",), rows={"a": [[0], [1], [2], [3]]})
    assert one != Site(4, ("a",), ("b",), rows={"a": [[1], [0], [2], [3]]})
    assert one != Site(4, ("a",), ("b",))
    assert one != Site(4, ("a",), ("c",), rows=one.rows)
