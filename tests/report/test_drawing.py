"""Axes, ticks and names that every picture shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.report.drawing import finish, log_axis, new_axes, sequence, shortened


def test_notebooks_show_what_is_drawn():
    assert new_axes()._repr_png_().startswith(b"\x89PNG")


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e12))
def test_a_logarithmic_axis_has_a_few_numbers_that_can_be_read(low, span):
    ax = new_axes()
    ax.set_xlim(low, low * span)
    log_axis(ax.xaxis)
    texts = [tick.get_text() for tick in ax.get_xticklabels() if low <= tick.get_position()[0] <= low * span]
    assert len(texts) <= 14
    if span >= 10:
        assert any(texts)


@pytest.mark.parametrize(
    ("high", "texts"), [(100, ["1", "2", "5", "10"]), (1e5, ["1", "10", "100", "1,000"])]
)
def test_its_numbers_are_plain(high, texts):
    ax = new_axes()
    ax.set_ylim(0.9, high)
    log_axis(ax.yaxis)
    found = [tick.get_text() for tick in ax.get_yticklabels() if 0.9 <= tick.get_position()[1] <= high]
    assert found[:4] == texts


@given(st.lists(st.text(min_size=1, max_size=60), max_size=12))
def test_every_curve_has_a_colour_and_no_label_hides(names):
    found = [pair for pair, _ in zip(sequence(names), names, strict=False)]
    assert len(found) == len(names)
    assert not any(label.startswith("_") for _, label in found)


def test_names_are_cut_and_hold_no_mathematics():
    assert shortened("conv1 → conv2") == "conv1 → conv2"
    assert shortened("x" * 50) == "x" * 37 + "…"
    ax = new_axes()
    ax.plot([1, 2], label=shortened("a$^b$"))
    finish(ax).figure.draw_without_rendering()
    assert ax.get_legend().get_texts()[0].get_text() == r"a\$^b\$"
