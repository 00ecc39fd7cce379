"""What the README and the guide show must run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/guide.md", "docs/plots.md")}
README = PAGES["README.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", README + PAGES["docs/guide.md"], re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_its_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "an example of the docs", "exec"), {"__name__": "example"})


def test_its_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in (
        "venv .venv",
        "pip install -c constraints.txt '.[demo,test]'",
        "pysolve demo",
        "-m pytest",
    ):
        assert command in README
        assert command in makefile.replace("$(VENV)", ".venv")


@pytest.mark.parametrize("name", PAGES)
def test_pictures_and_pages_that_are_linked_exist(name):
    for link in re.findall(r"\]\((?!http|#)(.*?)(?:#.*?)?\)", PAGES[name]):
        assert (ROOT / name).parent.joinpath(link).is_file(), link
