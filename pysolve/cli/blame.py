"""Whose an error is: the user's, whose line is named, or a bug."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import pysolve
from pysolve.errors import PysolveError

_OWN = str(Path(pysolve.__file__).parent) + os.sep
_LIBRARIES = tuple(
    sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def blaming(run: Callable[..., None]) -> Callable[..., None]:
    """The function, whose errors from the user's own code are a PysolveError that names the line."""

    @wraps(run)
    def guarded(**given: object) -> None:
        try:
            run(**given)
        except Exception as error:
            if not place_of(error):
                raise
            raise PysolveError(told(error)) from error

    return guarded


def place_of(error: BaseException) -> str:
    """The user's line that an error comes from, as ``mine.py, line 12``; "" where it is none of theirs."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        file = frame.f_code.co_filename
        if file.startswith(_OWN):
            return ""
        # Generated code has names such as <string>.
        if not file.startswith((*_LIBRARIES, "<")):
            return f"{os.path.relpath(file)}, line {line}"
    return ""


def told(error: BaseException) -> str:
    """An error of the user's in one line: kind, message and place."""
    message = " ".join(str(error).split())
    # Errors of syntax have their own place in the message.
    place = "" if isinstance(error, SyntaxError) else place_of(error)
    return f"{type(error).__name__}{f': {message}' if message else ''}{f' ({place})' if place else ''}"
