"""The exceptions that are pysolve's own; plain wrong arguments are ValueError or TypeError."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import numpy as np


class PysolveError(Exception):
    """Something about a network, its data or a file that pysolve cannot work with."""


class LayerNotFoundError(PysolveError):
    """A layer name that the network does not have."""


class CollapseError(PysolveError):
    """Channels that cannot be removed from this network without changing what it computes."""


class DataError(PysolveError):
    """A data file or a batch that is missing, empty or malformed."""


class WriteError(PysolveError, OSError):
    """A file that cannot be written: the disk is full or read-only, a quota is used up, a folder is gone."""


class PysolveWarning(UserWarning):
    """A possible problem of a result, and its remedy; also among the ``warnings`` of its report."""


def one_of(what: str, given: object, known: Iterable[str]) -> str:
    """``given``, one of the ``known`` words; ValueError that names them otherwise."""
    words = tuple(known)
    if isinstance(given, str) and given in words:
        return given
    raise ValueError(f"unknown {what} {given!r}; choose one of {', '.join(words)}.")


def exactly_one(**given: object) -> str:
    """The name of the only argument that is not None; ValueError that names those given otherwise."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        *words, last = given
        known = f"{', '.join(words)} and {last}"
        raise ValueError(f"give exactly one of {known}; got {' and '.join(names) or 'none'}.")
    return names[0]


def whole(what: str, value: object, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int; TypeError unless it is an integer, ValueError unless within least … most."""
    span = f"of at least {least}" if most is None else f"within {least} … {most}"
    message = f"{what} must be an integer {span}, got {value!r}."
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(message)
    if not least <= (number := int(value)) <= (number if most is None else most):
        raise ValueError(message)
    return number


def path_of(what: str, value: object) -> Path:
    """``value`` as a path; TypeError unless it is a word or a path."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{what} must be a path, a str or os.PathLike, got {type(value).__name__}.")
    return Path(value)


def check_flags(**flags: object) -> None:
    """Refuse what is neither true nor false."""
    for what, value in flags.items():
        if not isinstance(value, Integral | np.bool_) or value not in (0, 1):
            raise TypeError(f"{what} must be True or False, got {value!r}.")
