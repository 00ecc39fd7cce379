"""One progress bar for a whole call, through all of its stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

from tqdm.auto import tqdm

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Where in a call a stage begins and ends, on most networks. One that comes again goes half of what is left.
_STAGES = {
    "load": (0.0, 0.03),
    "trace": (0.03, 0.1),
    "gather": (0.1, 0.35),
    "measure": (0.35, 0.65),
    "refit": (0.65, 0.9),
    "train": (0.65, 0.98),
}
_FORM = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
# Batches after which about two thirds of a stage of unknown length are taken to be over.
_MANY = 16


@dataclass(eq=False)
class _Whole:
    """The bar of a call, and the window of it that the present part of the call moves through."""

    bar: tqdm[None]
    title: str
    low: float = 0.0
    # What is done after the last stage.
    high: float = 0.98
    begin: float = 0.0
    end: float = 0.0

    def enter(self, stage: str) -> None:
        """Show a stage that begins, and find where in the bar it ends."""
        self.bar.set_description_str(f"{self.title}: {stage}", refresh=False)
        first, last = (self.low + (self.high - self.low) * place for place in _STAGES[stage])
        again = self.bar.n > first
        self.begin, self.end = (self.bar.n, 0.5 * (self.bar.n + self.high)) if again else (first, last)
        self.move(0.0)
        self.bar.refresh()

    def move(self, share: float) -> None:
        """Show how much of the stage is over."""
        self.bar.update(max(0.0, self.begin + (self.end - self.begin) * share - self.bar.n))


_CURRENT: ContextVar[_Whole | None] = ContextVar("_CURRENT", default=None)


@contextmanager
def whole(title: str, shown: bool) -> Iterator[None]:
    """One bar for all that happens inside, from now on; inside of another one, that."""
    if _CURRENT.get() is not None or not shown:
        yield
        return
    with tqdm(total=1.0, bar_format=_FORM, disable=None, desc=title) as bar:
        token = _CURRENT.set(_Whole(bar, title))
        try:
            yield
        finally:
            _CURRENT.reset(token)
        bar.set_description_str(title, refresh=False)
        bar.update(1.0 - bar.n)


def one_bar(verb: Callable[P, R]) -> Callable[P, R]:
    """A function whose ``progress`` argument, by default True, shows one bar for the call."""

    @wraps(verb)
    def shown(*args: P.args, **options: P.kwargs) -> R:
        with whole(verb.__name__, bool(options.get("progress", True))):
            stage("trace")
            return verb(*args, **options)

    return shown


@contextmanager
def part(number: int, of: int, what: str) -> Iterator[None]:
    """One of several parts of the call, of about the same length, in which all stages may come."""
    found = _CURRENT.get()
    if found is None or of == 1:
        yield
        return
    title, low, high = found.title, found.low, found.high
    found.title = f"{title}, {number} of {of} ({what})"
    found.low, found.high = low + (high - low) * (number - 1) / of, low + (high - low) * number / of
    try:
        yield
    finally:
        found.title, found.low, found.high = title, low, high


def in_call() -> bool:
    """Whether a call's bar is shown."""
    return _CURRENT.get() is not None


def stage(name: str) -> None:
    """Show that the call has come to a stage."""
    if (found := _CURRENT.get()) is not None:
        found.enter(name)


def passed(share: float) -> None:
    """Show how much of the stage is over."""
    if (found := _CURRENT.get()) is not None:
        found.move(share)


def steps(
    items: Iterable[T], name: str, total: int | None = None, *, unit: str = "it", shown: bool = True
) -> Iterator[T]:
    """The items of a stage, which move the call's bar; outside of a call, a bar of their own."""
    if _CURRENT.get() is None:
        yield from tqdm(items, name, total, unit=unit, disable=None if shown else True)
        return
    total = len(items) if total is None and isinstance(items, Sized) else total
    stage(name)
    for done, item in enumerate(items, start=1):
        yield item
        passed(done / total if total else 1 - math.exp(-done / _MANY))
