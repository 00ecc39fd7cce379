"""A report as one HTML file with its plots inside, for wide and narrow screens, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from io import StringIO

import matplotlib
from matplotlib.axes import Axes

from pysolve.report.drawing import INK
from pysolve.report.plots import plot_channels, plot_elimination
from pysolve.report.report import Report, check_report
from pysolve.tables import as_html

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2a30; --paper: #fff; --soft: #5b6a72; --line: #dbe3e7;
  --bar: #cfe2ea; --warn: #fdf3e1; --edge: #e0902f; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe7ea; --paper: #14191c; --soft: #98a7ae;
  --line: #303a40; --bar: #1d4a5e; --warn: #382b16; } }
body { max-width: 62rem; margin: 0 auto; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.cards div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.cards span, dt, caption { color: var(--soft); }
.scroll { overflow-x: auto; } caption { display: none; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; } .words { text-align: left; } td.words:last-child { white-space: normal; }
td[style] { background: linear-gradient(to right, var(--bar) var(--share), transparent 0); }
.warning { background: var(--warn); border-left: .25rem solid var(--edge); padding: .5rem .9rem; }
@media (max-width: 40rem) { thead { display: none; } tr { display: block; padding: .4rem 0;
  border-bottom: 1px solid var(--line); } td, td.words { display: flex; gap: 1rem; border: 0;
  justify-content: space-between; text-align: right; white-space: normal; padding: .1rem .3rem;
  overflow-wrap: anywhere; }
  td::before { content: attr(data-head); color: var(--soft); text-align: left; white-space: nowrap; }
  td:empty, td[data-head=""]::before { display: none; }
  td:first-child { font-weight: 600; } dl { display: block; } }
figure { margin: 1rem 0; } figure svg { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dd { margin: 0; }
"""


# What the page's words mean, in its order.
_TERMS = {
    "site": "Channels that are removed together: layers that make them → layers that read them.",
    "kept": "Channels, or the share of the weights, that is left.",
    "error": "Share of what the layers that read a site compute, or of a layer's outputs, that refits lose.",
    "divergence": "How far outputs are from the original's, on samples that no fit and no choice has seen: "
    "of classes the Kullback-Leibler divergence in nats, of others the mean square by the variance.",
    "predicted div.": "Divergence with this site alone made smaller, as expected when sizes were chosen.",
    "measured div.": "The same, measured at the size that was chosen.",
    "MACs": "Multiplications with an addition; those of one sample.",
    "bytes in memory": "Of all tensors of the network's state dict.",
    "bytes on disk": "Of the file that pysolve.save writes; of the original, of its tensors as safetensors.",
    "bits per weight": "Of the file, by the number of the original's weights.",
    "bits": "Per weight, after entropy coding.",
    "layout": "How a layer runs: dense, sparse, in two factors (rank), with shared values, or masked.",
    "of the total": "The layer's share of the smaller network's parameters.",
    "relative gap": "By how much the objective can at most be above the optimum, as a share of it: a proof.",
    "KKT": "How far the conditions of an optimum are violated; 0 at an optimum.",
    "lam": "Penalty of the group lasso: the larger, the fewer channels.",
    "score": "What the function that was given to evaluate returns, such as the accuracy in per cent.",
}


def page(report: Report, title: str, more: Mapping[str, str] | None = None) -> str:
    """The whole report as HTML that needs no other file; ``more`` are facts about how it was made.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> from pathlib import Path
    >>> smaller = ps.compress(model, batches, keep=0.5, latency=False)
    >>> size = Path("report.html").write_text(ps.page(smaller.report, "Half of the channels"), "utf-8")
    """
    check_report(report)
    title = str(title)
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        '<div class="cards">',
        *(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in _cards(report)),
        "</div>",
        *(f'<p class="warning"><b>Warning:</b> {escape(text)}</p>' for text in report.warnings),
        *(f"<p><b>Note:</b> {escape(text)}</p>" for text in report.notes),
    ]
    for table in report.tables():
        lines += [f"<h2>{escape(table.title)}</h2>", as_html(table)]
        lines += _pictures(report) if table.title == "Sites" else []
    lines += ["<h2>How it was made</h2>", _definitions({**report.facts(), **(more or {})})]
    lines += ["<h2>Words</h2>", _definitions(_terms(report)), "</body></html>"]
    return "\n".join(lines)


def _terms(report: Report) -> dict[str, str]:
    """The words that stand in the tables or before the facts."""
    tables = report.tables()
    shown = {table.head[c] for table in tables for c in table.shown} | set(report.facts())
    shown |= {row[0].removesuffix(" a sample") for row in tables[0].rows}
    return {word: text for word, text in _TERMS.items() if word in shown}


def _definitions(texts: Mapping[str, str]) -> str:
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _cards(report: Report) -> Iterator[tuple[str, str]]:
    """The most important numbers."""
    zeros = report.after.get("nonzeros", report.after.get("params")) != report.after.get("params")
    weights = ("nonzeros", "non-zeros") if zeros else ("params", "parameters")
    for measure, name in (weights, ("macs", "MACs"), ("file", "bytes on disk")):
        if measure in report.before and measure in report.after:
            yield f"{report.share(measure):.1%}", f"of the {name}"
    if report.score_before is not None and report.score_after is not None:
        yield f"{report.score_before:.2f} → {report.score_after:.2f}", "score"
    if report.held:
        yield f"{report.divergence:.3g}", "divergence from the original"
    for slow, fast in report.latencies[-1:]:
        n = fast.batch_size
        yield (
            f"{slow.median / fast.median:.2f}×",
            f"as fast, {f'{n} samples' if n > 1 else 'one sample'} at once",
        )


def _pictures(report: Report) -> list[str]:
    """Figures of the sites."""
    found = [(plot_channels(report), "Channels kept of each site.")]
    if any(site.curve for site in report.sites):
        text = "Error of each site's refitted readers against the channels kept; the chosen size is marked."
        found.append((plot_elimination(report), text))
    return [
        f"<figure>{_svg(ax, f'p{n}-', text)}<figcaption>{escape(text)}</figcaption></figure>"
        for n, (ax, text) in enumerate(found)
    ]


def _svg(ax: Axes, prefix: str, label: str) -> str:
    """A plot as an SVG element in the colour of the surrounding text."""
    # Ids must differ between the plots of one page.
    with (
        matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": ["DejaVu Sans"]}
        ),
        StringIO() as file,
    ):
        ax.figure.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    for mark in ('id="', "url(#", 'href="#'):
        text = text.replace(mark, mark + prefix)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
