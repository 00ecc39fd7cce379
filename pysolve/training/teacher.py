"""The training of a student by its teacher's answers, which are kept where that is worth it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pysolve.errors import DataError
from pysolve.nn.calibration import free_memory
from pysolve.nn.running import device_of, evaluating, find_layer, forward
from pysolve.training.batches import Key, Lessons, cached
from pysolve.training.features import channel_dim, maps_between, unexplained
from pysolve.training.loop import Beside, broken_batch, broken_sample, computing, in_full, optimise
from pysolve.training.loss import Goal, floating, output_loss
from pysolve.training.options import Run

# By the clock, asking the teacher about everything beforehand may take this share of the time.
_SHARE = 0.25


@dataclass(frozen=True)
class Watched:
    """A network, and what its layers to be matched gave in the last pass."""

    model: nn.Module
    features: Callable[[], list[Tensor]]

    def answers(self, batch: Any, run: Run) -> tuple[Any, list[Tensor], list[Tensor]]:
        """The output, its tensors to compare, and features, both in full precision."""
        device = device_of(self.model)
        with computing(run, device):
            output = forward(self.model, batch, device)
        return output, in_full(floating(output)), in_full(self.features())


@dataclass
class Answers:
    """A teacher's answers, asked for batch by batch or, if they are ``known``, looked up.

    Parameters
    ----------
    teacher : Watched
    run : Run
    known : callable, optional
        From a batch's key.
    """

    teacher: Watched
    run: Run
    known: Callable[[Key], list[Tensor]] | None = None

    def __call__(self, key: Key, batch: Any) -> list[Tensor]:
        """Outputs, then features."""
        if self.known is not None:
            return self.known(key)
        with torch.no_grad():
            _, outputs, features = self.teacher.answers(batch, self.run)
        return _finite([*outputs, *features], key)

    def learn(self, lessons: Lessons, cache: bool | None) -> None:
        """Ask about everything now, if that is wanted, possible, and worth it."""
        room = math.inf if cache else 0 if cache is False else self._room(lessons)
        if lessons.held is not None and room:
            self.known = cached(lessons, self, room)

    def _room(self, lessons: Lessons) -> float:
        """How many bytes of answers may be kept where nobody said."""
        if self.run.epochs == 1 or lessons.held is None:
            return 0
        if self.run.seconds is not None:
            start = time.perf_counter()
            self(0, lessons.held[0])
            if (time.perf_counter() - start) * len(lessons.held) > _SHARE * self.run.seconds:
                return 0
        return free_memory()


def taught(
    student: Watched,
    teacher: Watched,
    goal: Goal,
    run: Run,
    lessons: Lessons,
    *,
    cache: bool | None,
    settings: Mapping[str, Any],
) -> list[float]:
    """Train a student, in the modes that the networks are in."""
    answers = Answers(teacher, run)
    maps, dims = _maps(student, teacher, goal, run, lessons)

    def loss_of(item: tuple[Key, Any]) -> Tensor:
        key, batch = item
        given = answers(key, batch)
        output, outputs, features = student.answers(batch, run)
        wanted = [one.to(outputs[0].device) for one in given] if outputs else given
        count = len(wanted) - len(features)
        value = output_loss(goal, output, outputs, wanted[:count], batch)
        together = zip(features, wanted[count:], maps, dims, strict=True)
        return value + goal.feature_weight * sum(unexplained(*one) for one in together) if dims else value

    beside = Beside(
        learnt=maps if any(True for _ in maps.parameters()) else None,
        generators=lessons.generators,
        prepare=lambda: answers.learn(lessons, False if goal.mix else cache),
        settings={**settings, **goal.settings()},
        broken=lambda item, number: _broken(lessons, item, number),
    )
    return optimise(student.model, loss_of, run, lessons.passes, beside)


def _broken(lessons: Lessons, item: tuple[Key, Any], number: int) -> str:
    """Which part of a lesson is NaN or infinite."""
    key, batch = item
    if isinstance(key, Tensor) and lessons.samples is not None:
        return broken_sample(lessons.samples, key)
    return broken_batch(batch, number)


def _maps(
    student: Watched, teacher: Watched, goal: Goal, run: Run, lessons: Lessons
) -> tuple[nn.ModuleList, list[int]]:
    """Maps between the channels of the layers to match, and where these channels lie."""
    if not goal.pairs:
        return nn.ModuleList(), []
    batch = lessons.first()
    with evaluating(student.model, teacher.model):
        (_, _, own), (_, _, hints) = (one.answers(batch, run) for one in (student, teacher))
    layers = [find_layer(student.model, name) for name in goal.pairs]
    dims = [channel_dim(layer, feature) for layer, feature in zip(layers, own, strict=True)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(run.seed))
        return maps_between(goal.pairs, dims, own, hints), dims


def _finite(answers: list[Tensor], key: Key) -> list[Tensor]:
    """The teacher's answers, checked to be numbers."""
    for answer in answers:
        if not bool(answer.isfinite().all()):
            where = f"batch {key + 1}" if isinstance(key, int) else _broken_among(answer, key)
            raise DataError(
                f"the teacher's outputs hold NaN or infinity in {where}: check the batches and its weights."
            )
    return answers


def _broken_among(answer: Tensor, rows: Tensor) -> str:
    if len(answer) != len(rows):
        return f"samples {rows.tolist()}"
    finite = answer.reshape(len(answer), -1).isfinite().all(1).cpu()
    return f"sample {int(rows[~finite][0])}"
