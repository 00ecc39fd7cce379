"""How, and how long, to train: the options that everything which trains shares."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from torch import nn

from pysolve.training.optimizers import OPTIMIZERS, SCHEDULES, Optimizing, Scheduling, check_choice

# Called after each step with the share of the training that is done.
Step = Callable[[float], None]

PRECISIONS = ("float32", "bfloat16", "auto")
# Learning rates of a schedule that follows the clock.
TICKS = 1000


class Course(TypedDict, total=False):
    """Options of all training, as ``finetune`` describes them."""

    epochs: int | None
    seconds: float | None
    lr: float
    weight_decay: float
    optimizer: Optimizing
    schedule: Scheduling
    clip: float | None
    precision: str
    checkpoint: str | os.PathLike[str] | None
    seed: int
    progress: bool


class Training(Course, total=False):
    """The same, and those of training that ends with its best weights or is watched step by step."""

    evaluate: Callable[[nn.Module], float] | None
    patience: int | None
    after_step: Step | None


@dataclass(frozen=True)
class Run:
    """A training of some steps an epoch, and its options, checked; ``finetune`` describes them.

    Parameters
    ----------
    steps : int
    epochs, seconds, lr, weight_decay, optimizer, schedule, clip, precision : optional
    evaluate, patience, checkpoint, seed, progress, after_step : optional
    """

    steps: int
    epochs: int | None = None
    seconds: float | None = None
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: Optimizing = "adam"
    schedule: Scheduling = "one-cycle"
    clip: float | None = None
    precision: str = "float32"
    evaluate: Callable[[nn.Module], float] | None = None
    patience: int | None = None
    checkpoint: str | os.PathLike[str] | None = None
    seed: int = 0
    progress: bool = True
    after_step: Step | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError(
                f"expected either epochs or seconds, got epochs={self.epochs} and seconds={self.seconds}."
            )
        for name in ("epochs", "patience"):
            _check_count(name, getattr(self, name))
        for name in ("seconds", "lr", "clip"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number of 0 and above, got {self.weight_decay}.")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if self.patience is not None and self.evaluate is None:
            raise ValueError("patience needs evaluate: a function from the network to a score.")

    @property
    def length(self) -> int:
        """How many learning rates the schedule has."""
        return TICKS if self.epochs is None else int(self.epochs) * self.steps

    def position(self, done: int, elapsed: float, before: float = 0.0) -> int:
        """Where on the schedule the next step is; it is not taken when that is the end, ``length``.

        Of the seconds elapsed, those ``before`` the first step tell nothing about the next one.
        """
        if self.seconds is None:
            return min(done, self.length)
        # By the clock, and as it will be after one more step: so the last step ends in time.
        after = before + (elapsed - before) * (done + 1) / done
        return min(int(self.length * after / self.seconds), self.length)

    def bfloat16(self, device: torch.device) -> bool:
        """Whether the network is to compute in bfloat16 on a device."""
        known = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
        able = device.type != "cpu" and known is not None and bool(known())
        return self.precision == "bfloat16" or (self.precision == "auto" and able)

    def settings(self) -> dict[str, Any]:
        """What must be the same for a training to go on from a checkpoint; functions count as ``own``."""
        names = ("steps", "epochs", "seconds", "lr", "weight_decay", "optimizer", "schedule", "clip")
        values = {name: getattr(self, name) for name in (*names, "precision", "patience", "seed")}
        values = {name: "own" if callable(value) else value for name, value in values.items()}
        return {**values, "evaluate": self.evaluate is not None}


def run_of(steps: int, training: Mapping[str, Any], known: type = Training) -> Run:
    """The run of some options, whose names must be known."""
    names = [field.name for field in fields(Run) if field.name in known.__annotations__]
    check_names(training, names)
    return Run(steps, **training)


def check_names(training: Mapping[str, Any], names: list[str]) -> None:
    """Refuse options of other names."""
    if unknown := [name for name in training if name not in names]:
        raise TypeError(f"unknown option {', '.join(unknown)}; options of training are {', '.join(names)}.")


def _check_count(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
        raise ValueError(f"{name} must be positive, a whole number of at least 1, got {value}.")


def _check_positive(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, Real) and 0 < float(value) < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value}.")
