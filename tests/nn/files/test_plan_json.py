"""Plans survive as plain values, and plain values that are no plan are refused before they cost memory."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.errors import DataError
from pysolve.forms import LowRank, Sparse
from pysolve.nn.files.plan_json import (
    factors_of,
    form_record,
    indices_of,
    plain,
    plan_record,
    ranges,
    step_record,
    steps_of,
    strings,
    typed,
)
from pysolve.plan import Attention, Branch, Collapse, Plan, Site


@given(st.lists(st.integers(0, 40), unique=True))
def test_indices_survive_in_any_order(indices):
    text = ranges(indices)
    assert indices_of(text, 41, "indices").tolist() == indices
    parts = [part.split("-") for part in text.split()]
    assert sum(int(part[-1]) - int(part[0]) + 1 for part in parts) == len(indices)


def test_neighbours_are_written_together():
    assert ranges([0, 1, 2, 7, 4, 5]) == "0-2 7 4-5"
    assert ranges([3, 2, 1]) == "3 2 1"
    assert ranges(np.arange(800).reshape(50, 16)) == "0-799"
    assert ranges([]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "-1",
        "1-",
        "1--2",
        "3-2",
        "1,2",
        " 1",
        "1 ",
        "1  2",
        "²",
        "0x1",
        "10",
        "0-10",
        "0-9 0",
        "9" * 11,
        3,
        None,
    ],
)
def test_what_is_no_list_of_indices_is_refused(text):
    with pytest.raises(DataError, match="expected keep"):
        indices_of(text, 10, "keep")


def test_long_lists_of_indices_are_not_even_read():
    text = "0 " * 1_000_000 + "0"
    tracemalloc.start()
    with pytest.raises(DataError, match="expected keep as indices"):
        indices_of(text, 10, "keep")
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()


def test_numbers_become_plain():
    value = {"a": np.int64(3), 1: (np.float32(0.5), float("nan"), -np.inf), "b": [np.bool_(True), None, "x"]}
    assert plain(value) == {"a": 3, "1": [0.5, None, None], "b": [True, None, "x"]}
    json.dumps(plain(value), allow_nan=False)
    with pytest.raises(TypeError, match="numbers and strings, got object"):
        plain([object()])


WIDTHS = {"a": 12, "b": 12, "norm": 12, "c": 24, "d": 6, "e": 6}


def width(what, name):
    if name not in WIDTHS:
        raise DataError(f"it has no layer {name!r}.")
    return WIDTHS[name]


@st.composite
def steps(draw):
    """A site of six channels in blocks, or in a shuffled table, and some of its channels."""
    order = np.array(draw(st.permutations(range(12)))).reshape(6, 2)
    rows = {"a": order, "norm": order[:, ::-1]} if draw(st.booleans()) else {}
    columns = {"d": order[:, :1] // 2} if draw(st.booleans()) and len({*order[:, 0] // 2}) == 6 else {}
    keep = sorted(draw(st.sets(st.integers(0, 5))))
    passed = ("norm",) if draw(st.booleans()) or rows else ()
    return Collapse(Site(6, ("a", "b"), ("c", "d"), passed, rows, columns), keep)


@given(steps())
def test_steps_survive(step):
    (again,) = steps_of(json.loads(json.dumps([step_record(step)])), width)
    assert again.keep.tolist() == step.keep.tolist()
    for part in ("channels", "writers", "readers", "passed", "pinned"):
        assert getattr(again.site, part) == getattr(step.site, part)
    for part in ("rows", "columns"):
        tables, wanted = getattr(again.site, part), getattr(step.site, part)
        assert {n: t.tolist() for n, t in tables.items()} == {n: t.tolist() for n, t in wanted.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 10**15}, "expected a site of 1 … 24 channels, got 1000000000000000"),
        ({"channels": -1}, "expected a site of 1 … 24 channels"),
        ({"channels": 6.0}, "expected channels to be an integer, got a number"),
        ({"rows": {"a": "0-4"}}, "expected rows of as many indices for each of 6 channels"),
        ({"rows": {"a": "0-12"}}, "expected rows within 0 … 11"),
        ({"rows": {"z": "0-5"}}, "it has no layer 'z'"),
        ({"rows": {"d": "0-5"}}, "rows names 'd', which is none of"),
        ({"columns": {"c": "0-3 3-4"}}, "columns of as many|columns of c must give each"),
        ({"columns": {"c": "0-4 4"}}, "columns of c must give each"),
        ({"writers": "a"}, "expected writers to be a list, got a string"),
        ({"keep": "5-6"}, "expected keep within 0 … 5"),
        ({"keep": None}, "expected keep as indices"),
    ],
)
def test_what_is_no_step_is_refused(changes, message):
    record = step_record(Collapse(Site(6, ("a",), ("c", "d")), [0, 3]))
    with pytest.raises(DataError, match=message):
        steps_of([record | changes], width)


BRANCHES = st.builds(
    Branch,
    st.sampled_from([{}, {"c": "bn"}]),
    st.sampled_from([(), ("norm", "conv")]),
    st.booleans(),
    st.sampled_from(["", "attention"]),
    st.sampled_from([0, 2, "hidden_states"]),
    st.just(2),
    st.integers(0, 1),
)


@given(BRANCHES)
def test_what_is_left_of_a_branch_survives(branch):
    site = Site(6, ("a", "b"), ("c", "d"), least=0, branch=branch)
    (again,) = steps_of(json.loads(json.dumps([step_record(Collapse(site, []))])), width)
    assert again.site.branch == branch
    assert not len(again.keep)
    # Of a site that keeps a channel, nothing is to be known.
    assert "branch" not in step_record(Collapse(site, [0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": []}, "expected norms to be an object"),
        ({"norms": {"c": 3}}, "expected a norm to be a string"),
        ({"idle": "norm"}, "expected idle to be a list"),
        ({"written": 1}, "expected written to be true or false"),
        ({"whole": None}, "expected whole to be a string, got null"),
        ({"argument": 1.5}, r"number or the name of an argument, got 1\.5"),
        ({"results": 10**9}, "expected one of up to 100 results"),
        ({"results": 2, "position": 2}, "got number 2 of 2"),
        ({"position": -1}, "got number -1 of 0"),
    ],
)
def test_what_is_no_branch_is_refused(changes, message):
    record = step_record(Collapse(Site(6, ("a",), ("c",), least=0, branch=Branch()), []))
    record["branch"] |= changes
    with pytest.raises(DataError, match=message):
        steps_of([record], width)


def heads_site(scale="b.scaling"):
    """Four heads of three dimensions, two of which share keys and values."""
    queries, keys = np.arange(12).reshape(4, 3), np.arange(6).reshape(2, 3)
    one = Attention("a", "d", "e", "c", queries, keys, keys, queries, scale)
    rows = {"a": queries.T, "d": keys.T, "e": keys.T}
    return Site(3, ("a", "d", "e"), ("c",), (), rows, {"c": queries.T}, attention=(one,))


@given(st.sampled_from(["b.scaling", "", None]))
def test_heads_survive(scale):
    (again,) = steps_of(json.loads(json.dumps([step_record(Collapse(heads_site(scale), [0, 2]))])), width)
    (one,), (wanted,) = again.site.attention, heads_site(scale).attention
    for name, value in vars(wanted).items():
        np.testing.assert_array_equal(getattr(one, name), value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": "c"}, "expected queries of heads in a layer of the site, got 'c'"),
        ({"heads": 5}, "queries of equally many dimensions for each of 5 heads"),
        ({"heads": 0}, "for each of 0 heads"),
        ({"heads": 10**15}, "for each of 1000000000000000 heads"),
        ({"heads": True}, "expected a number of heads to be an integer, got true or false"),
        ({"groups": 3}, "expected heads of one size"),
        ({"queries": "0-10"}, "queries of equally many dimensions"),
        ({"queries": "0-12"}, "expected queries within 0 … 11"),
        ({"keys": "0-2"}, "expected heads of one size|expected keys"),
        ({"outputs": "12-23"}, "outputs of heads among the site's columns of c"),
        ({"scale": 3}, "expected a scale to be a string, got an integer"),
    ],
)
def test_what_are_no_heads_is_refused(changes, message):
    record = step_record(Collapse(heads_site(), [0, 2]))
    record["attention"][0] |= changes
    with pytest.raises(DataError, match=message):
        steps_of([record], width)


def test_steps_may_share_a_layer_but_not_its_channels():
    halves = [
        Collapse(Site(6, ("a",), ("d",), (), {"a": np.arange(6)[:, None] + start}, {"d": table}), [1])
        for start, table in ((0, np.arange(3).repeat(2)[:0].reshape(6, 0)), (6, np.arange(6)[:, None]))
    ]
    assert len(steps_of([*map(step_record, halves)], width)) == 2
    with pytest.raises(DataError, match="several steps cut the same rows of a"):
        steps_of([*map(step_record, halves), step_record(halves[1])], width)


def test_a_field_that_is_missing_or_of_another_type_is_named():
    record = step_record(Collapse(Site(6, ("a",), ("c",)), [0]))
    del record["keep"]
    with pytest.raises(DataError, match="expected a field 'keep', got channels, writers"):
        steps_of([record], width)
    with pytest.raises(DataError, match="expected it to be true or false, got null"):
        typed(None, bool, "it")
    with pytest.raises(DataError, match="expected every part of it to be a string, got an integer"):
        strings(["a", 3], "it")


FORMS = {
    "fc": (LowRank(np.ones((4, 3)), np.ones((3, 5))), (3, False, 0)),
    "kernel first": (LowRank(np.ones((4, 2, 1, 1)), np.ones((2, 5, 3, 3))), (2, False, 0)),
    "height and width": (LowRank(np.ones((4, 7, 1, 3)), np.ones((7, 5, 3, 1))), (7, True, 0)),
    "1 x 1": (LowRank(np.ones((4, 1, 1, 1)), np.ones((1, 5, 1, 1))), (1, False, 0)),
    "1-d": (LowRank(np.ones((4, 2, 1)), np.ones((2, 5, 3))), (2, False, 0)),
    "3-d": (LowRank(np.ones((4, 2, 1, 1, 2)), np.ones((2, 5, 3, 2, 1))), (2, True, 0)),
    "rows apart": (
        LowRank(np.ones((4, 2)), np.ones((2, 5)), np.array([1, 4]), np.ones((2, 5))),
        (2, False, 2),
    ),
}


def test_ranks_of_factored_layers_survive():
    records = {name: form_record(form) for name, (form, _) in FORMS.items()}
    assert factors_of(json.loads(json.dumps(records))) == {
        name: wanted for name, (_, wanted) in FORMS.items()
    }


def test_a_plan_s_record_says_which_layers_have_which_form():
    sparse = Sparse.from_dense(np.eye(4, dtype=np.float32))
    forms = {"a.weight": sparse, "b.weight": FORMS["fc"][0]}
    record = plan_record(Plan(forms=forms, values={"c.bias": np.ones(3)}))
    assert record["forms"] == {
        "a.weight": {"kind": "csr", "density": 0.25},
        "b.weight": {"kind": "low-rank", "rank": 3, "spatial": False},
    }
    assert record["values"] == ["c.bias"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "expected factored to be an object, got a list"),
        ({"a": 3}, "expected a factored layer to be an object, got an integer"),
        ({"a": {"rank": 3}}, "expected a field 'spatial'"),
        ({"a": {"spatial": True}}, "expected a field 'rank'"),
        ({"a": {"rank": 0, "spatial": False}}, "expected a rank of at least 1, got 0"),
        ({"a": {"rank": -(10**30), "spatial": False}}, "expected a rank of at least 1"),
        ({"a": {"rank": True, "spatial": False}}, "expected rank to be an integer, got true or false"),
        ({"a": {"rank": 2.0, "spatial": False}}, "expected rank to be an integer, got a number"),
        ({"a": {"rank": 2, "spatial": 1}}, "expected spatial to be true or false, got an integer"),
    ],
)
def test_what_is_no_rank_is_refused(records, message):
    with pytest.raises(DataError, match=message):
        factors_of(records)


def test_factors_of_which_a_record_cannot_tell_are_refused():
    with pytest.raises(DataError, match="kernel first, or along the last dimension"):
        form_record(LowRank(np.ones((4, 2, 3, 1)), np.ones((2, 5, 1, 3))))
    with pytest.raises(DataError, match="kernel first, or along the last dimension"):
        form_record(LowRank(np.ones((4, 2, 3, 3)), np.ones((2, 5, 1, 1))))
