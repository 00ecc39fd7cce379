"""Tables keep their words on every medium, and fit the terminal."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.tables import Table, as_html, as_markdown, as_text

WORD = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z", "M"]), min_size=1, max_size=20)
NUMBER = st.integers(0, 10**9).map(str)


@st.composite
def tables(draw):
    """A name, some numbers, and a remark."""
    numbers = draw(st.integers(0, 4))
    row = st.tuples(WORD, *[NUMBER] * numbers, st.lists(WORD, max_size=20).map(" ".join))
    rows = draw(st.lists(row, max_size=5))
    head = ("name", *[f"n{i}" for i in range(numbers)], "remark")
    bars = ((1, tuple(draw(st.floats(0, 1)) for _ in rows)),) if numbers else ()
    return Table("Title", head, tuple(rows), words=(0, numbers + 1), bars=bars)


class Cells(HTMLParser):
    """The texts of the cells of a page, and the tags that are open at its end."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.open, self.inside = [], [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@given(tables())
def test_text_fits_and_tells_every_word(table):
    lines = as_text(table)
    assert all(len(line) <= 110 for line in lines)
    text = "\n".join(lines)
    assert all(word in text for row in table.rows for cell in row for word in cell.split())


@given(tables())
def test_html_has_every_cell_of_the_columns_that_are_shown_and_closes_what_it_opens(table):
    found = Cells(as_html(table))
    assert found.open == []
    assert found.cells == [row[c] for row in (table.head, *table.rows) for c in table.shown]


@given(tables())
def test_markdown_has_as_many_cells_in_every_line(table):
    lines = [line.replace("\\|", "") for line in as_markdown(table)]
    assert {line.count("|") for line in lines} == {len(table.shown) + 1}
    assert len(lines) == 2 + len(table.rows)


@given(tables(), st.integers(60, 200))
def test_a_wider_terminal_needs_no_more_lines(table, width):
    assert len(as_text(table, width + 20)) <= len(as_text(table, width))


def test_a_column_without_anything_in_it_is_left_out():
    table = Table("", ("a", "b", "c"), (("x", "", "1"), ("y", "", "2")))
    assert as_text(table) == ["a  c", "x  1", "y  2"]
    assert "<th" in as_html(table)
    assert ">b<" not in as_html(table)


def test_text_cannot_break_out_of_html():
    table = Table("<b>", ("<i>",), (("<script>alert(1)</script>",),))
    assert not {"<b>", "<i>", "<script>"} & {*as_html(table).replace(">", "> ").split()}


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 cells in a table of 1 columns"):
        Table("", ("a",), (("x", "y"),))
