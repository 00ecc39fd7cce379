"""What the README shows must run."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_its_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_its_commands_are_those_of_the_makefile():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for command in (
        "venv .venv",
        "pip install -c constraints.txt '.[demo,test]'",
        "pysolve demo",
        "-m pytest",
    ):
        assert command in README
        assert command in makefile.replace("$(VENV)", ".venv")


def test_its_pictures_exist():
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / picture).is_file()
