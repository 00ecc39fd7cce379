"""Tables as data, and their three forms: for a terminal, in Markdown, in HTML."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from textwrap import wrap

# Characters of a terminal's line, and the least width of a column of words.
WIDTH, NARROW = 110, 24
# Lines that an object may take at a prompt.
_SCREEN = 24


@dataclass(frozen=True)
class Table:
    """Rows of text under a head.

    Parameters
    ----------
    title : str
    head : (n,) tuple of str
    rows : tuple of (n,) tuples of str
    words : tuple of int
        Columns of words, aligned to the left; the others hold numbers. In a narrow terminal the last column
        wraps if it is one of them, and the others are cut.
    bars : {column: tuple of float} as pairs
        Columns that HTML shows with a bar behind the text: a share from 0 to 1 for each row.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    bars: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.head)} columns: {row}.")

    @property
    def shown(self) -> list[int]:
        """Columns with any text."""
        return [c for c in range(len(self.head)) if not self.rows or any(row[c] for row in self.rows)]


def as_text(table: Table, width: int = WIDTH) -> list[str]:
    """Lines of at most ``width`` characters, as far as numbers allow.

    Words in the last column begin at the empty cells before them.
    """
    shown, rows = table.shown, (table.head, *table.rows)
    cells = [[row[c] for c in shown] for row in rows]
    words = [c in table.words for c in shown]
    if words[-1] and len(shown) > 2 and not any(row[-1] and row[-2] for row in cells[1:]):
        cells[0][-1] = ""
    widths = _widths(cells, words, width)
    lines = []
    for row in cells:
        last = max((i for i, cell in enumerate(row[:-1]) if cell), default=0) if words[-1] else len(row) - 1
        start = "  ".join(map(_aligned, row[: last + 1], widths, words))
        if not row[-1] or last == len(row) - 1:
            lines.append(start.rstrip())
            continue
        # Without gaps, words keep to their column.
        start = f"{start:<{sum(widths[:-1]) + 2 * (len(row) - 2)}}" if last == len(row) - 2 else start
        first, *more = wrap(row[-1], max(1, width - len(start) - 2), break_on_hyphens=False)
        lines += [f"{start}  {first}", *(" " * (len(start) + 2) + part for part in more)]
    return lines


def _widths(cells: list[list[str]], words: list[bool], width: int) -> list[int]:
    """Width of each column: columns of words shrink first, from the last one on."""
    found = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if words[-1] and len(found) > 1:
        found[-1] = max((len(row[-1]) for row in cells if row[-2]), default=0)
    for i in (i for i in reversed(range(len(found))) if words[i]):
        spare = sum(found) + 2 * (len(found) - 1) - width
        found[i] = max(min(found[i], NARROW), found[i] - max(0, spare))
    return found


def one_screen(lines: list[str]) -> str:
    """As many lines as a prompt shows, and how many there are more."""
    more = len(lines) - _SCREEN
    return "\n".join(lines if more <= 0 else [*lines[:_SCREEN], f"… {more} more lines: print() shows all"])


def as_markdown(table: Table) -> list[str]:
    """Lines of a pipe table."""
    shown = table.shown
    rule = ["---" if c in table.words else "---:" for c in shown]
    cells = [[row[c].replace("|", "\\|") for c in shown] for row in (table.head, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def as_html(table: Table) -> str:
    """A ``<table>`` in a box that scrolls where a page does not lay it out for narrow windows."""
    shown, bars = table.shown, dict(table.bars)
    lines = ['<div class="scroll"><table>', f"<caption>{escape(table.title)}</caption>" * bool(table.title)]
    kinds = {c: ' class="words"' if c in table.words else "" for c in shown}
    heads = [f'<th scope="col"{kinds[c]}>{escape(table.head[c])}</th>' for c in shown]
    lines += ["<thead><tr>", *heads, "</tr></thead><tbody>"]
    for r, row in enumerate(table.rows):
        lines.append("<tr>")
        for c in shown:
            bar = f' style="--share:{100 * bars[c][r]:.1f}%"' if c in bars else ""
            # What a narrow page puts in front of a cell, which has no head above it there.
            lines.append(f'<td{kinds[c]}{bar} data-head="{escape(table.head[c])}">{escape(row[c])}</td>')
        lines.append("</tr>")
    return "\n".join([*filter(None, lines), "</tbody></table></div>"])


def _aligned(cell: str, width: int, left: bool) -> str:
    if left and len(cell) > width:
        cell = cell[: width - 1] + "…"
    return f"{cell:<{width}}" if left else f"{cell:>{width}}"
