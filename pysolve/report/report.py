"""The report of a compression: numbers to print and to store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from textwrap import wrap

from pysolve.errors import DataError
from pysolve.report.rows import (
    Expected,
    Latency,
    LayerMass,
    LayerReport,
    SiteReport,
    Solve,
    Stage,
    formatted,
    in_words,
)
from pysolve.tables import WIDTH, Table, as_html, as_markdown, as_text, one_screen
from pysolve.whole_files import Json

# Entries of reports by the fields that hold them.
_ROWS: Mapping[str, type] = {
    "sites": SiteReport,
    "layers": LayerReport,
    "stages": Stage,
    "mass": LayerMass,
    "solves": Solve,
    "expected": Expected,
}
# Measures in the order of the table, with their names.
_COSTS = {
    "params": "parameters",
    "nonzeros": "non-zeros",
    "macs": "MACs a sample",
    "bytes": "bytes in memory",
    "file": "bytes on disk",
}


@dataclass(frozen=True)
class Report:
    """Result of a compression in numbers; prints as text, also in notebooks.

    Parameters
    ----------
    before, after : {"params", "nonzeros", "macs", "bytes" or "file": int}
        Costs of the two networks: parameters, those that are not zero, MACs of all that multiplies for one
        sample, bytes of the state dict, bytes on disk where files were written.
    sites : tuple of SiteReport
    divergence : float
        Of the compressed network's outputs from the original's, on held-out samples.
    samples, held : int
        Samples used by the refit, and held-out samples that the divergence was measured on.
    score_before, score_after : float, optional
        Results of ``evaluate`` for the two networks.
    retrained : float, optional
        Its result after retraining.
    seconds : {stage: float}
    notes : tuple of str
        Other remarks for the user.
    target : {"params", "macs", "bytes" or "ms": number}, optional
        The requested size, as ``compress`` takes it.
    layers : tuple of LayerReport
        Layers that were pruned weight by weight, factored or quantised.
    stages : tuple of Stage
        The network after each stage of ``deep_compress``.
    mass : tuple of LayerMass
        Costs of every layer with weights and of all else that multiplies; the last row is the rest.
    latencies : tuple of (Latency, Latency)
        Of the original and the compressed network, timed alternately, for one or more batch sizes.
    solves : tuple of Solve
        Every convex solve whose solution chose channels.
    warnings : tuple of str
        Possible problems of the result, and their remedies.
    expected : tuple of Expected
        Of a dry run: what targets would cost.
    made_with : {name: str}
        Versions, the seed and the machine.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    sites: tuple[SiteReport, ...]
    divergence: float
    samples: int
    held: int
    score_before: float | None = None
    score_after: float | None = None
    retrained: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    target: Mapping[str, float] | None = None
    layers: tuple[LayerReport, ...] = ()
    stages: tuple[Stage, ...] = ()
    mass: tuple[LayerMass, ...] = ()
    latencies: tuple[tuple[Latency, Latency], ...] = ()
    solves: tuple[Solve, ...] = ()
    warnings: tuple[str, ...] = ()
    expected: tuple[Expected, ...] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)

    def share(self, measure: str) -> float:
        """Cost of the compressed network as a share of the original's."""
        return self.after[measure] / self.before[measure] if self.before[measure] else 1.0

    def as_dict(self) -> Json:
        """Everything as plain numbers, strings, lists and dictionaries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Report:
        """The report of what ``as_dict`` gave, also from JSON, which has null for a divergence of none.

        Raises
        ------
        DataError
            The record is of something else.
        """
        try:
            known: Json = dict(record)
            for name, kind in _ROWS.items():
                known[name] = tuple(kind(**row) for row in known.get(name, ()))
            known["sites"] = tuple(replace(s, curve=tuple(map(tuple, s.curve))) for s in known["sites"])
            pairs = known.get("latencies", ())
            known["latencies"] = tuple((Latency(**slow), Latency(**fast)) for slow, fast in pairs)
            for name in ("notes", "warnings"):
                known[name] = tuple(known.get(name, ()))
            known["divergence"] = float("nan") if known["divergence"] is None else known["divergence"]
            return cls(**known)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"expected a report as as_dict gives it: {error}") from error

    def brief(self) -> Report:
        """The report without its large and reproducible parts: curves, layers' costs, stages, file sizes."""
        before, after = ({m: v for m, v in one.items() if m != "file"} for one in (self.before, self.after))
        sites = tuple(replace(site, curve=()) for site in self.sites)
        return replace(self, before=before, after=after, mass=(), stages=(), sites=sites)

    def tables(self) -> list[Table]:
        """Costs, targets, stages, sites, changed layers, costs of layers, solves, where there are any."""
        kept = tuple(site.kept / max(1, site.channels) for site in self.sites)
        dense = tuple(layer.density for layer in self.layers)
        total = sum(layer.left for layer in self.mass)
        shares = tuple(layer.left / max(1, total) for layer in self.mass)
        stages = tuple(stage.cells(self.stages[0].bytes) for stage in self.stages)
        mass = tuple(layer.cells(total) for layer in self.mass)
        sites, layers, solves = (
            tuple(one.cells() for one in rows) for rows in (self.sites, self.layers, self.solves)
        )
        found = (
            _costs(self),
            self.targets(),
            Table("Stages", Stage.HEAD, stages),
            Table("Sites", SiteReport.HEAD, sites, words=(0, 6), bars=((1, kept),)),
            Table("Weights by layer", LayerReport.HEAD, layers, words=(0, 4, 7), bars=((1, dense),)),
            Table("Layers", LayerMass.HEAD, mass, bars=((4, shares),)),
            Table("Convex solves", Solve.HEAD, solves, words=(0, 1)),
        )
        return [table for table in found if table.rows]

    def targets(self) -> Table:
        """What targets would cost, of a dry run."""
        return Table("Targets", Expected.HEAD, tuple(one.cells() for one in self.expected), words=(0,))

    def facts(self) -> dict[str, str]:
        """Target, divergence, time and versions, in words."""
        found = {}
        if self.target is not None:
            found["target"] = in_words(self.target)
        if self.held or self.divergence == self.divergence:
            used = f", refitted on {self.samples:,}" if self.samples else ""
            on = f"{self.held:,} held-out samples" if self.held else "samples that layers were fitted on"
            found["divergence"] = f"{self.divergence:.4g} on {on}{used}"
        if self.seconds:
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
            found["seconds"] = f"{sum(self.seconds.values()):.1f}: {stages}"
        if self.made_with:
            found["made with"] = ", ".join(f"{name} {version}" for name, version in self.made_with.items())
        return found

    def as_markdown(self) -> str:
        """The whole report as Markdown."""
        lines = [f"- {name}: {text}" for name, text in self.facts().items()]
        for kind in ("Warning", "Note"):
            texts = [f"> **{kind}**: {text}" for known, text in self._said() if known == kind]
            lines += ["", *texts] if texts else []
        for table in self.tables():
            lines += ["", f"## {table.title}", "", *as_markdown(table)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Costs, facts, what was said, and the next table, for notebooks."""
        costs, *others = self.tables()
        facts = Table("", ("", ""), tuple(self.facts().items()), words=(0, 1))
        said = [f"<p><b>{kind}</b>: {escape(text)}</p>" for kind, text in self._said()]
        return "\n".join([as_html(costs), as_html(facts), *said, *map(as_html, others[:1])])

    def __repr__(self) -> str:
        more = ", ".join(table.title.lower() for table in self.tables()[1:])
        return one_screen([*self._head(), *self._words(), *[f"print() shows {more}"] * bool(more)])

    def __str__(self) -> str:
        lines = self._head()
        for table in self.tables()[1:]:
            # Costs of every layer are too long for a terminal; files have them.
            lines += ["", *as_text(table)] if table.title != "Layers" else []
        return "\n".join([*lines, *self._words()])

    def _head(self) -> list[str]:
        """Lines of costs and facts."""
        lines, facts = as_text(self.tables()[0]), self.facts()
        width = max(map(len, facts), default=0)
        for name, text in facts.items():
            lines += _wrapped(f"{name:<{width}}  ", text)
        return lines

    def _words(self) -> list[str]:
        """Lines of warnings and notes."""
        return [line for kind, text in self._said() for line in _wrapped(f"{kind}: ", text)]

    def _said(self) -> list[tuple[str, str]]:
        """Warnings and notes."""
        return [("Warning", text) for text in self.warnings] + [("Note", text) for text in self.notes]


def comparison(reports: Iterable[Report]) -> Table:
    """Table of several results for one network, such as those of ``sweep``."""
    rows = []
    for report in reports:
        asked = ", ".join(f"{measure} {value:g}" for measure, value in (report.target or {}).items())
        shares = [f"{report.share(measure):.1%}" for measure in ("params", "macs", "bytes")]
        scores = (formatted(score, ".2f") for score in (report.score_after, report.retrained))
        rows.append((asked, *shares, f"{report.divergence:.4g}", *scores))
    head = ("target", "parameters", "MACs", "bytes in memory", "divergence", "score", "retrained")
    return Table("Sizes", head, tuple(rows))


def _wrapped(start: str, text: str) -> list[str]:
    return wrap(start + text, WIDTH, subsequent_indent=" " * len(start), break_on_hyphens=False)


def _costs(report: Report) -> Table:
    rows = []
    for measure, label in _COSTS.items():
        if measure not in report.before or measure not in report.after:
            continue
        old, new = report.before[measure], report.after[measure]
        if measure == "nonzeros" and (old, new) == (report.before.get("params"), report.after.get("params")):
            continue
        rows.append((label, f"{old:,}", f"{new:,}", f"{report.share(measure):.1%}"))
    if report.score_before is not None and report.score_after is not None:
        rows.append(("score", f"{report.score_before:.2f}", f"{report.score_after:.2f}", ""))
        if report.retrained is not None:
            rows.append(("score, retrained", "", f"{report.retrained:.2f}", ""))
    for slow, fast in report.latencies:
        label = f"latency of {fast.batch_size} on {fast.threads} thread{'s' * (fast.threads > 1)}"
        rows.append((label, str(slow), str(fast), f"{fast.median / slow.median:.1%}" if slow.median else ""))
    return Table("Before and after", ("", "before", "after", "left"), tuple(rows))


def check_report(report: object) -> None:
    """Refuse what is no report."""
    if not isinstance(report, Report):
        raise TypeError(f"expected a Report, such as a result's .report, got {type(report).__name__}.")
