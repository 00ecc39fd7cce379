"""What a student is compared in with its teacher, and the training that brings it there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from pysolve.errors import DataError, PysolveError
from pysolve.nn.calibration import free_memory
from pysolve.nn.hints import channel_dim, maps_between, unexplained
from pysolve.nn.lessons import Key, Lessons, cached
from pysolve.nn.loop import Beside, broken_batch, broken_sample, computing, in_full, optimise
from pysolve.nn.network import device_of, evaluating, find_layer, forward
from pysolve.nn.options import Run
from pysolve.nn.retrain import own_loss

Soft = str | Callable[[Tensor, Tensor], Tensor]

# By the clock, asking the teacher about everything beforehand may take this share of the time.
_SHARE = 0.25


@dataclass(frozen=True)
class Goal:
    """What a student is to be like; ``distill`` describes it.

    Parameters
    ----------
    temperature, alpha : float
    loss : "kl", "mse" or callable
    pairs : dict
        From the student's layers to the teacher's.
    feature_weight : float
    mix : float
    """

    temperature: float
    alpha: float
    loss: Soft
    pairs: dict[str, str]
    feature_weight: float
    mix: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature}.")
        for name in ("alpha", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within 0 and 1, got {getattr(self, name)}.")
        if not 0 <= self.feature_weight < math.inf:
            raise ValueError(f"feature_weight must be a number of 0 and above, got {self.feature_weight}.")
        if not callable(self.loss) and self.loss not in ("kl", "mse"):
            raise ValueError(f"loss must be kl, mse or a callable, got {self.loss!r}.")
        if self.mix and self.alpha < 1:
            raise ValueError(f"mixtures have no labels: with alpha={self.alpha}, mix must be 0.")

    def settings(self) -> dict[str, Any]:
        """What must be the same for a training to go on; functions count as ``own``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "loss": self.loss if isinstance(self.loss, str) else "own"}


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
    known: Callable[[Key], list[Tensor]] | None = None
    maps, dims = _maps(student, teacher, goal, run, lessons.first)

    def ask(key: Key, batch: Any) -> list[Tensor]:
        with torch.no_grad():
            _, outputs, hints = teacher.answers(batch, run)
        return _finite([*outputs, *hints], key)

    def prepare() -> None:
        nonlocal known
        room = _room(cache, goal, run, lessons, ask)
        known = cached(lessons, ask, room) if room else None

    def loss_of(item: tuple[Key, Any]) -> Tensor:
        key, batch = item
        wanted = known(key) if known else ask(key, batch)
        output, outputs, features = student.answers(batch, run)
        wanted = [target.to(outputs[0].device) if outputs else target for target in wanted]
        count = len(wanted) - len(features)
        value = _output_loss(goal, output, outputs, wanted[:count], batch)
        together = zip(features, wanted[count:], maps, dims, strict=True)
        return value + goal.feature_weight * sum(unexplained(*one) for one in together) if dims else value

    beside = Beside(
        learnt=maps if any(True for _ in maps.parameters()) else None,
        generators=lessons.generators,
        prepare=prepare,
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
    student: Watched, teacher: Watched, goal: Goal, run: Run, batch: Any
) -> tuple[nn.ModuleList, list[int]]:
    """Maps between the channels of the layers to match, and where these channels lie."""
    if not goal.pairs:
        return nn.ModuleList(), []
    with evaluating(student.model, teacher.model):
        (_, _, own), (_, _, hints) = (one.answers(batch, run) for one in (student, teacher))
    layers = [find_layer(student.model, name) for name in goal.pairs]
    dims = [channel_dim(layer, feature) for layer, feature in zip(layers, own, strict=True)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.seed)
        return maps_between(goal.pairs, dims, own, hints), dims


def _room(
    cache: bool | None, goal: Goal, run: Run, lessons: Lessons, ask: Callable[[Key, Any], list[Tensor]]
) -> float:
    """How many bytes of a teacher's answers may be kept."""
    if cache is False or goal.mix or lessons.held is None:
        return 0
    if cache:
        return math.inf
    if run.seconds is not None:
        start = time.perf_counter()
        ask(0, lessons.first)
        if (time.perf_counter() - start) * len(lessons.held) > _SHARE * run.seconds:
            return 0
    return 0 if run.epochs == 1 else free_memory()


def floating(output: Any) -> list[Tensor]:
    """The tensors in a network's output to compare: its logits, or all that are floating-point."""
    if isinstance(output, Mapping):
        return floating(output["logits"] if "logits" in output else [*output.values()])
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in floating(item)]
    if not isinstance(output, Tensor):
        return floating(output.logits) if hasattr(output, "logits") else []
    # Single numbers are losses and counts.
    return [output] if output.is_floating_point() and output.ndim else []


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


def _output_loss(goal: Goal, output: Any, outputs: list[Tensor], targets: list[Tensor], batch: Any) -> Tensor:
    """α · soft + (1 − α) · hard."""
    shapes, wanted = ([list(tensor.shape) for tensor in tensors] for tensors in (outputs, targets))
    if shapes != wanted or not shapes:
        raise PysolveError(
            "the student must answer with floating-point tensors of the same shapes as the teacher: got "
            f"{shapes}, expected {wanted}."
        )
    value = outputs[0].new_zeros(())
    if goal.alpha:
        soft = [soft_loss(goal, one, to.to(one.dtype)) for one, to in zip(outputs, targets, strict=True)]
        value = torch.stack(soft).sum()
    if goal.alpha == 1:
        return value
    return goal.alpha * value + (1 - goal.alpha) * _hard_loss(output, outputs[0], batch, goal.alpha)


def soft_loss(goal: Goal, output: Tensor, target: Tensor) -> Tensor:
    """How far an output is from the teacher's: T² KL(softmax(target / T) ‖ softmax(output / T)), mean over
    samples and positions, or another loss.
    """
    if callable(goal.loss):
        return goal.loss(output, target)
    if goal.loss == "mse":
        return mse_loss(output, target)
    dim, T = class_dim(output), goal.temperature
    if output.ndim < 2 or output.shape[dim] < 2:
        raise ValueError(
            f"outputs of shape {list(output.shape)} have no classes to compare by kl: give loss='mse'."
        )
    log_q, log_p = (output / T).log_softmax(dim), (target / T).log_softmax(dim)
    return T * T * kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim).mean()


def class_dim(output: Tensor) -> int:
    """Where classes lie, as ``kl_divergence`` has it."""
    return 1 if output.ndim == 2 or output.ndim >= 4 else -1


def _hard_loss(output: Any, logits: Tensor, batch: Any, alpha: float) -> Tensor:
    if isinstance(batch, Mapping):
        return in_full(own_loss(output))  # type: ignore[no-any-return]
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise DataError(
            f"alpha={alpha} needs labels: pairs of inputs and labels, or alpha=1; got {type(batch).__name__}."
        )
    return cross_entropy(logits.movedim(class_dim(logits), 1), batch[1].to(logits.device))
