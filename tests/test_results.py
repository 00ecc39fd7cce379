"""Published experiments: parts are kept, not measured twice, shown; one that fails stops no other."""

import json

import pytest
from rich.table import Table as RichTable
from scripts import modules_of, one_of
from typer.testing import CliRunner

import pysolve as ps
from pysolve.tables import Table

modules = modules_of("results", "published")
results, published = one_of("results"), one_of("published")


def measured(data, out, seed):
    """A table, one for terminals, a line, and lines in columns."""
    assert out.is_dir()
    yield Table("Accuracies", ("network", "published", "ours"), (("dense | whole", "99.07", "99.43"),))
    table = RichTable(title="Solvers", caption="One\nthread.")
    table.add_column("method", justify="left")
    table.add_column("ours", justify="right")
    table.add_row("[bold]newton", "0.03 s")
    yield table
    yield "Thresholds: 2.1."
    yield "\nname   size\nfc1  400000\n"


def broken(data, out, seed):
    yield Table("Half", ("a",), (("1",),))
    raise ps.DataError("there are no images.")


@pytest.fixture
def command(results, published, monkeypatch, tmp_path):
    """Run on three parts: the second fails. Returns the status and what is printed."""
    ways = {"e1-first": measured, "e2-broken": broken, "e5-last": measured}
    parts = tuple(published.Part(name, name[3:], "e1_x.py", way, "A note.") for name, way in ways.items())
    monkeypatch.setattr(results, "PARTS", parts)
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    app = results.typer.Typer()
    app.command()(results.main)

    def run(*options):
        found = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *options])
        return found.exit_code, found.output

    return run


def test_a_part_that_fails_is_said_and_stops_no_other(command, tmp_path):
    status, printed = command()
    assert status == 1
    assert "Failed: e2-broken" in printed
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == ["e1-first.json", "e5-last.json"]


def test_what_was_measured_is_measured_again_only_when_asked(command, tmp_path):
    command("--only", "e5")
    path = tmp_path / "out" / "e5-last.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 7}))
    command()
    assert json.loads(path.read_text())["seed"] == 7
    assert command("--only", "last", "--again")[0] == 0
    assert json.loads(path.read_text())["seed"] == 0


def test_the_page_shows_tables_conditions_and_what_is_missing(command, tmp_path):
    command("--only", "e1")
    page = (tmp_path / "results.md").read_text()
    first, missing = (page.split(f"### {title}")[1].split("###")[0] for title in ("E1: first", "E2: broken"))
    for shown in (
        "| dense \\| whole | 99.07 | 99.43 |",
        "| newton | 0.03 s |\n\nOne\nthread.",
        "Thresholds: 2.1.",
        "```text\nname   size\nfc1  400000\n```",
        "`python examples/e1_x.py`, seed 0, ",
        "machine 1. A note.",
    ):
        assert shown in first
    assert "`python examples/e1_x.py`: not measured yet. A note." in missing
    result = json.loads((tmp_path / "out" / "e1-first.json").read_text())
    assert f"1. {result['machine']}; python {result['versions']['python']}, pysolve {ps.__version__}" in page


def test_a_name_that_no_part_has_is_refused(command, tmp_path):
    status, printed = command("--only", "none")
    assert status == 2
    assert "e5-last" in printed
    assert not (tmp_path / "results.md").exists()


def test_parts_have_names_of_their_own_and_belong_to_an_experiment(published):
    names = [part.name for part in published.PARTS]
    assert len(names) == len(set(names))
    assert {name[:2].upper() for name in names} == {*published.EXPERIMENTS}


def test_the_page_is_made_of_the_files(results, published):
    assert results.page(published.PARTS, results.MEASURED) == results.PAGE.read_text()
