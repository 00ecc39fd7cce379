"""Pictures show the numbers they are given, with labels, and need no display."""

import io
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from pysolve.plots import SHADES, accuracy_curves, convergence_curves, cost_bars
from pysolve.solution import History

KEPT = [4, 16, 64]
CURVES = {"refitted": [80.0, 95.0, 99.0], "lasso": [40.0, 80.0, 98.0]}


def test_curves_are_drawn_over_the_number_of_neurons():
    ax = accuracy_curves(KEPT, CURVES, dense=99.1, chosen=16)
    lines = {line.get_label(): line for line in ax.get_lines()}
    for label, values in CURVES.items():
        assert list(lines[label].get_xdata()) == KEPT
        assert list(lines[label].get_ydata()) == values
    assert set(lines["original network"].get_ydata()) == {99.1}
    assert ax.get_xlabel() == "neurons kept"
    assert "%" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["original network", *CURVES]


def test_bars_show_the_share_that_is_left():
    ax = cost_bars({"parameters": 200, "MACs": 50}, {"parameters": 50, "MACs": 45})
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [100, 100, 25, 90]
    assert [text.get_text() for text in ax.texts] == ["25 %", "90 %"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["parameters", "MACs"]


def test_bars_may_carry_their_own_texts_and_grow_past_the_original():
    ax = cost_bars({"bytes": 10}, {"bytes": 15}, {"bytes": "15 of 10"})
    assert ax.texts[0].get_text() == "15 of 10"
    assert ax.get_xlim()[1] >= 150


@pytest.mark.parametrize(("against", "x"), [("iteration", [1, 2]), ("seconds", [0.2, 0.3])])
def test_gaps_are_relative_to_where_the_objective_ended(against, x):
    history = History(np.array([0.1, 0.2, 0.3]), np.array([0.0, -3.0, -4.0]), np.array([4.0, 2.0, 0.4]))
    ax = convergence_curves({"newton": history}, against=against)
    (line,) = ax.get_lines()
    assert list(line.get_xdata()) == x
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.1])
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", against)


def test_every_history_gets_a_line_when_there_are_more_than_colors():
    history = History(np.arange(1.0, 4), -np.ones(3), np.ones(3))
    ax = convergence_curves({str(i): history for i in range(9)}, colors=SHADES, lowest=1e-12)
    assert len(ax.get_lines()) == 9
    assert ax.get_ylim() == (1e-12, 1)


def test_a_solve_without_iterations_is_an_empty_line():
    history = History(np.zeros(1), np.zeros(1), np.zeros(1))
    (line,) = convergence_curves({"zero": history}).get_lines()
    assert len(line.get_xdata()) == 0


def test_pictures_are_drawn_where_asked_and_can_be_saved():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert accuracy_curves(KEPT, CURVES, dense=99.0, ax=left) is left
    assert cost_bars({"bytes": 10}, {"bytes": 5}, ax=right) is right
    content = io.BytesIO()
    figure.savefig(content, format="png")
    assert content.getvalue().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in ("pysolve.plots", "matplotlib.axes"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"pysolve\[demo\]"):
        import pysolve.plots  # noqa: F401
