"""What benches print is kept with the machine, and shown as it was kept."""

import pytest
from scripts import modules_of, one_of
from typer.testing import CliRunner

modules = modules_of("all")
benches = one_of("all")


@pytest.fixture
def three(benches, monkeypatch, tmp_path):
    """Two commands of which one fails, and one that was never run."""
    scripts = {"first.py": "print('a', 1)\nprint('b', 2)", "broken.py": "print('half')\nraise SystemExit(3)"}
    for name, code in scripts.items():
        (tmp_path / name).write_text(code)
    commands = ("first.py --size 3", "broken.py", "unseen.py")
    monkeypatch.setattr(benches, "ALL", tuple(benches.Bench(one, "benchmarks.md") for one in commands))
    monkeypatch.setattr(benches, "ROOT", tmp_path)
    monkeypatch.setattr(benches, "MEASURED", tmp_path)
    monkeypatch.setattr(benches, "PAGE", tmp_path / "measured.md")
    app = benches.typer.Typer()
    app.command()(benches.main)
    return lambda *options: CliRunner().invoke(app, options)


def test_outputs_are_kept_with_the_machine_and_shown(three, tmp_path):
    found = three("--run", "--only", "first")
    assert found.exit_code == 0
    assert "a 1" in found.output
    page = (tmp_path / "measured.md").read_text()
    assert "## `python first.py --size 3`" in page
    assert "```text\na 1\nb 2\n```" in page
    assert "torch " in page
    assert "- `python unseen.py`" in page


def test_commands_that_fail_keep_nothing_and_are_named(three, tmp_path):
    found = three("--run", "--only", ".py")
    assert found.exit_code == 1
    assert "Failed: broken.py; unseen.py" in found.stderr
    assert [path.name for path in tmp_path.glob("*.txt")] == ["first-py-size-3.txt"]


def test_the_page_shows_what_is_kept(benches):
    assert benches.PAGE.read_text() == benches.page()
