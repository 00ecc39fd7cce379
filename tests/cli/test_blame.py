"""Errors of the user's own code name the line; others are nobody's."""

import pytest
import torch

from pysolve.cli.blame import blaming, place_of, told
from pysolve.cli.options import parameters
from pysolve.errors import PysolveError


def caught(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def theirs():
    raise KeyError("x")


def theirs_through_torch():
    torch.zeros(2) @ torch.zeros(3)


def test_the_innermost_line_outside_of_libraries_is_named():
    assert place_of(caught(theirs)).endswith("tests/cli/test_blame.py, line 20")
    assert place_of(caught(theirs_through_torch)).endswith("tests/cli/test_blame.py, line 24")


def test_what_pysolve_raises_is_not_theirs():
    assert place_of(caught(parameters, "compress", ("nothing",), {})) == ""


def test_an_error_is_told_in_one_line():
    assert told(SyntaxError("bad (a.py, line 3)")) == "SyntaxError: bad (a.py, line 3)"
    assert told(AssertionError()) == "AssertionError"
    assert told(RuntimeError("one\n  two")) == "RuntimeError: one two"


def test_blaming_turns_the_users_errors_into_ours():
    with pytest.raises(PysolveError, match=r"KeyError: 'x' \(.*line 20\)"):
        blaming(theirs)()
