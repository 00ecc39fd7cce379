"""Every public name is documented on a page, and every function has an example that runs."""

import doctest
import inspect
import os
import re
from pathlib import Path

import pytest
import torch

import pysolve as ps

PAGE = (Path(__file__).parent.parent / "docs/api.rst").read_text()
# Those that open folders of transformers in a fresh process.
SLOW = {"save_pretrained", "load_pretrained"}
REAL = {"cifar": pytest.mark.data, "mnist": pytest.mark.mnist}
EXAMPLES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [REAL[name]] if name in REAL else [])
    for name in ps.__all__
    if inspect.isfunction(getattr(ps, name)) or ">>>" in (getattr(ps, name).__doc__ or "")
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_example_runs(name, tmp_path, monkeypatch):
    if name in REAL and "PYSOLVE_DATA" not in os.environ:
        pytest.skip("needs PYSOLVE_DATA")
    monkeypatch.chdir(os.environ["PYSOLVE_DATA"] if name in REAL else tmp_path)
    torch.manual_seed(0)
    text = inspect.getdoc(getattr(ps, name)) or ""
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried, "no example"
    assert not failed, "".join(said)


def test_the_reference_has_every_public_name_once():
    listed = re.findall(r"^   (\w+)$", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(ps.__all__)
