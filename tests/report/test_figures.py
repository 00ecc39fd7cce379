"""The demonstration's pictures show the numbers they are given, with labels."""

import io

from matplotlib.figure import Figure

from pysolve.report.figures import accuracy_curves, cost_bars

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


def test_pictures_are_drawn_where_asked_and_can_be_saved():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert accuracy_curves(KEPT, CURVES, dense=99.0, ax=left) is left
    assert cost_bars({"bytes": 10}, {"bytes": 5}, ax=right) is right
    content = io.BytesIO()
    figure.savefig(content, format="png")
    assert content.getvalue().startswith(b"\x89PNG")
