"""A report prints every site in a table that fits the terminal, and goes into a file as plain numbers."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysolve.nn.files.plan_json import plain
from pysolve.report.report import Report, comparison
from pysolve.report.rows import Expected, Latency, LayerMass, LayerReport, SiteReport, Solve, Stage
from pysolve.solve.budget import MEASURES

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z", "M"]), min_size=1, max_size=30)
REASONS = st.lists(WORDS, min_size=1, max_size=20).map(" ".join)


@st.composite
def site_reports(draw):
    channels = draw(st.integers(1, 10**6))
    name = f"{draw(WORDS)}.{draw(WORDS)}.{draw(WORDS)} → {draw(WORDS)}"
    if draw(st.booleans()):
        return SiteReport(name, channels, channels, pinned=draw(REASONS))
    harm = st.floats(0, 1e6) | st.just(float("inf"))
    return SiteReport(
        name,
        channels,
        draw(st.integers(1, channels)),
        error=draw(st.floats(0, 1)),
        predicted=draw(harm),
        measured=draw(harm),
        seconds=draw(st.floats(0, 9999)),
        curve=tuple(draw(st.lists(st.tuples(st.integers(1, channels), st.floats(0, 1)), max_size=3))),
    )


counts = st.integers(0, 10**12)
stages = st.builds(
    Stage,
    st.sampled_from(["original", "collapsed", "shared, retrained"]),
    counts.map(lambda n: n + 1),
    counts,
    st.floats(0, 100),
    st.floats(0, 10**5),
    st.none() | st.floats(0, 100),
)


@st.composite
def reports(draw):
    costs = st.fixed_dictionaries({measure: st.integers(0, 10**12) for measure in MEASURES})
    return Report(
        before=draw(costs),
        after=draw(costs),
        sites=tuple(draw(st.lists(site_reports(), max_size=6))),
        divergence=draw(st.floats(0, 100)),
        samples=draw(st.integers(0, 10**9)),
        held=draw(st.integers(1, 256)),
        score_before=draw(st.none() | st.floats(0, 100)),
        score_after=draw(st.none() | st.floats(0, 100)),
        seconds={"find": 1.5, "gather": draw(st.floats(0, 10**5))},
        notes=tuple(draw(st.lists(REASONS, max_size=2))),
        warnings=tuple(draw(st.lists(REASONS, max_size=2))),
        target=draw(st.none() | st.just({"params": 0.25, "bytes": 1000})),
        stages=tuple(draw(st.lists(stages, max_size=4))),
    )


@given(reports())
def test_every_line_fits_and_every_site_and_note_is_there(report):
    text = str(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    for site in report.sites:
        assert any(
            line.startswith(site.name[:40]) and f"{site.kept}/{site.channels}" in line for line in lines
        )
        for word in (site.pinned or "").split():
            assert word in text
    for note in report.notes:
        assert all(word in text for word in note.split())


@given(reports())
def test_a_report_goes_through_json_and_back(report):
    found = json.loads(json.dumps(report.as_dict()))
    for name, kind in (
        ("sites", SiteReport),
        ("layers", LayerReport),
        ("mass", LayerMass),
        ("solves", Solve),
        ("stages", Stage),
        ("expected", Expected),
    ):
        found[name] = tuple(kind(**entry) for entry in found[name])
    found["sites"] = tuple(
        replace(site, curve=tuple((k, error) for k, error in site.curve)) for site in found["sites"]
    )
    found["latencies"] = tuple((Latency(**one), Latency(**other)) for one, other in found["latencies"])
    for name in ("notes", "warnings"):
        found[name] = tuple(found[name])
    assert Report(**found) == report


def test_stages_are_shares_of_the_first():
    found = (
        Stage("original", 4000, 1000, 0.0),
        Stage("sparse", 4400, 1000, 0.1, 2.0),
        Stage("coded", 100, 1000, 0.123456, 1.0, 98.765),
    )
    report = Report({}, {}, (), 0.0, 0, 0, stages=found)
    (table,) = [one for one in report.tables() if one.title == "Stages"]
    assert table.rows == (
        ("original", "4,000", "1", "32.00", "0", "", ""),
        ("sparse", "4,400", "1.1", "35.20", "0.1", "", "2.0"),
        ("coded", "100", "1/40.0", "0.80", "0.1235", "98.77", "1.0"),
    )


@given(reports())
def test_markdown_tells_every_warning_and_every_row(report):
    text = report.as_markdown()
    assert all(part in text for part in (*report.notes, *report.warnings))
    assert sum(line.startswith("| ") for line in text.splitlines()) == sum(
        2 + len(table.rows) for table in report.tables()
    )


EXAMPLE = Report(
    before={"params": 1000, "macs": 2000, "bytes": 0},
    after={"params": 250, "macs": 1000, "bytes": 0},
    sites=(
        SiteReport("a → b", 8, 4, 0.125, 0.01, 0.02),
        SiteReport("b → nothing", 3, 3, pinned="it is read"),
    ),
    divergence=0.25,
    samples=900,
    held=100,
    seconds={"find": 1.0, "refit": 0.5},
)


def test_a_report_prints_costs_divergence_sites_and_seconds():
    text = str(EXAMPLE)
    for part in (
        "parameters        1,000    250   25.0%",
        "divergence  0.25 on 100 held-out samples, refitted on 900",
        "4/8",
        "12.50%",
        "it is read",
        "seconds     1.5: find 1.0, refit 0.5",
    ):
        assert part in text
    assert "score" not in text
    assert "target" not in text


def test_scores_and_targets_are_printed_when_there_are_some():
    scored = replace(EXAMPLE, score_before=90.0, score_after=85.5, target={"params": 0.25, "macs": 1000})
    assert ["score", "90.00", "85.50"] in [line.split() for line in str(scored).splitlines()]
    assert "target      params 0.25, macs 1,000" in str(scored)
    retrained = str(replace(scored, retrained=88.0)).splitlines()
    assert ["score,", "retrained", "88.00"] in [line.split() for line in retrained]


def test_what_was_measured_of_layers_and_solves_is_told():
    times = (Latency(4e-3, 3e-3, 5e-3, 64, 2), Latency(1e-3, 9e-4, 1.1e-3, 64, 2))
    report = replace(
        EXAMPLE,
        latencies=(times,),
        mass=(LayerMass("fc", 900, 200, 1500, 600, 2e-3, 1e-3), LayerMass("all others", 100, 50, 0, 0)),
        solves=(Solve("a → b", "newton", 0.1, 4, 1e-9, 2e-9, 5, 0.01),),
        warnings=("few samples",),
        made_with={"pysolve": "1", "seed": "0"},
    )
    words = [line.split() for line in str(report).splitlines()]
    assert [
        "latency",
        "of",
        "64",
        "on",
        "2",
        "threads",
        "4.00",
        "ms",
        "(3.00",
        "…",
        "5.00)",
        "1.00",
        "ms",
        "(0.90",
        "…",
        "1.10)",
        "25.0%",
    ] in words
    assert ["a", "→", "b", "newton", "0.1", "4", "1.0e-09", "2.0e-09", "5", "0.010"] in words
    assert ["Warning:", "few", "samples"] in words
    assert ["made", "with", "pysolve", "1,", "seed", "0"] in words
    mass = next(table for table in report.tables() if table.title == "Layers")
    assert mass.rows[0][4] == "80.0%"
    assert "<table>" in report._repr_html_()


def test_several_reports_are_compared_in_one_table():
    report = replace(EXAMPLE, target={"params": 0.25}, score_after=85.5)
    table = comparison([report, replace(report, retrained=88.0)])
    assert table.rows[0] == ("params 0.25", "25.0%", "50.0%", "100.0%", "0.25", "85.50", "")
    assert table.rows[1][-1] == "88.00"


@pytest.mark.parametrize(("measure", "share"), [("params", 0.25), ("macs", 0.5), ("bytes", 1.0)])
def test_shares_are_of_the_original(measure, share):
    assert EXAMPLE.share(measure) == share


def test_pruned_layers_are_listed_with_what_they_run_as():
    layers = (
        LayerReport("fc1", 0.1, "csr", "3.0 times as fast on 64 samples", 3e-3, 1e-3),
        LayerReport("fc2", 1.0, "dense", "nothing was pruned"),
    )
    lines = str(replace(EXAMPLE, sites=(), layers=layers)).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("layer ")))
    assert lines[start + 1].split()[:5] == ["fc1", "10.0%", "csr", "3.000", "1.000"]
    assert lines[start + 2].split(maxsplit=3) == ["fc2", "100.0%", "dense", "nothing was pruned"]


def test_without_held_out_samples_no_divergence_is_claimed():
    assert "divergence" not in str(replace(EXAMPLE, held=0, divergence=float("nan")))


@given(reports())
def test_a_report_comes_back_from_json(report):
    again = Report.from_dict(json.loads(json.dumps(plain(report.as_dict()))))
    assert plain(again.as_dict()) == plain(report.as_dict())
    assert again.tables()[0] == report.tables()[0]


@given(reports())
def test_a_prompt_shows_at_most_one_screen(report):
    assert repr(report).count("\n") <= 24
    assert repr(report).startswith(str(report).split("\n\n")[0][:100])
