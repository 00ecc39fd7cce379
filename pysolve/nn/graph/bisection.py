"""Which of several changes break a network, found with few trials."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from pysolve.plan import Collapse

# Why a network without some channels is not right; None where it is.
Problem = Callable[[Sequence[Collapse]], str | None]


def faults(
    steps: Mapping[int, Collapse], problem: Problem, sound: Mapping[int, Collapse] | None = None
) -> tuple[dict[int, Collapse], dict[int, str]]:
    """Steps that work together, and with sound ones, and the problems of the others; by bisection.

    Corresponding layers of repeated blocks are tried together: where the first, the middle and the last of
    them fail alone in one way, all of them are taken to.
    """
    groups = dict[str, dict[int, Collapse]]()
    for i, step in steps.items():
        groups.setdefault(_without_numbers(step.site.name), {})[i] = step
    works, problems = _faults([*groups.values()], problem, sound or {})
    return {i: works[i] for i in steps if i in works}, {i: problems[i] for i in steps if i in problems}


def _faults(
    groups: Sequence[Mapping[int, Collapse]], problem: Problem, sound: Mapping[int, Collapse]
) -> tuple[dict[int, Collapse], dict[int, str]]:
    steps = {i: step for group in groups for i, step in group.items()}

    def wrong(some: Mapping[int, Collapse]) -> str | None:
        return problem([*sound.values(), *some.values()])

    found = wrong(steps) if steps else None
    if found is None:
        return steps, {}
    if len(steps) == 1:
        return {}, dict.fromkeys(steps, found)
    if len(groups) == 1:
        numbers = [*steps]
        some = dict.fromkeys((numbers[0], numbers[len(numbers) // 2], numbers[-1]))
        errors = [wrong({i: steps[i]}) or "" for i in some]
        # What follows names the line that failed, which differs with the number of channels that are left.
        if all(errors) and len({re.split(r" \(|:", one)[0] for one in errors}) == 1:
            return {}, {**dict.fromkeys(steps, errors[-1]), numbers[0]: errors[0]}
        groups = [{i: step} for i, step in steps.items()]
    middle = len(groups) // 2
    left, first = _faults(groups[:middle], problem, sound)
    right, second = _faults(groups[middle:], problem, {**sound, **left})
    return {**left, **right}, {**first, **second}


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)
