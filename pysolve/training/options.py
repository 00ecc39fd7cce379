"""The options that all training shares, and the optimizers and schedules that they name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from pysolve.errors import check_flags, whole

Optimizing = str | Callable[[list[nn.Parameter]], Optimizer]
Scheduling = str | Callable[[float], float]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": lambda parameters, **options: SGD(parameters, momentum=0.9, **options),
}
# Factor of the learning rate at a share of the training; besides one-cycle, which moves the momentum, too.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}

# Called after each step with the share of the training that is done.
Step = Callable[[float], None]
# What a checkpoint holds of a part of a training.
State: TypeAlias = dict[str, Any]

PRECISIONS = ("float32", "bfloat16", "auto")
# Learning rates of a schedule that follows the clock.
TICKS = 1000
# Steps that fill the time exactly may exceed it by that share in floating point.
_ROUNDING = 1e-12


class BaseOptions(TypedDict, total=False):
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


class TrainingOptions(BaseOptions, total=False):
    """Also those of training that returns its best epoch or calls a function after each step."""

    evaluate: Callable[[nn.Module], float] | None
    patience: int | None
    after_step: Step | None


@dataclass(frozen=True)
class Run:
    """A training with ``steps`` steps an epoch, and its validated options; ``finetune`` describes them."""

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
            count = getattr(self, name)
            if count is not None and not (isinstance(count, Integral) and int(count) >= 1):
                raise ValueError(f"{name} must be positive, an integer of at least 1, got {count}.")
        for name in ("seconds", "lr", "clip"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and 0 < float(value) < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value}.")
        decay: object = self.weight_decay
        if not (isinstance(decay, int | float | np.number) and 0 <= float(decay) < math.inf):
            raise ValueError(f"weight_decay must be a number of 0 and above, got {self.weight_decay}.")
        for name, known in (("optimizer", [*OPTIMIZERS]), ("schedule", ["one-cycle", *SCHEDULES])):
            choice = getattr(self, name)
            if not callable(choice) and choice not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)} or a callable, got {choice!r}.")
        for name in ("evaluate", "after_step"):
            function: object = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r}.")
        whole("seed", self.seed, 0, 2**63 - 1)
        check_flags(progress=self.progress)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if self.patience is not None and self.evaluate is None:
            raise ValueError("patience needs evaluate: a function from the network to a score.")

    @property
    def length(self) -> int:
        """Number of learning rates of the schedule."""
        return TICKS if self.epochs is None else int(self.epochs) * self.steps

    def position(self, done: int, elapsed: float, before: float = 0.0) -> int:
        """Position of the next step on the schedule; training ends where that is ``length``.

        ``before`` is the part of the elapsed seconds in which no step was taken.
        """
        if self.seconds is None:
            return min(done, self.length)
        # By the clock, and as it will be after one more step: so the last step ends in time.
        after = before + (elapsed - before) * (done + 1) / done
        return min(int(self.length * after / self.seconds * (1 + _ROUNDING)), self.length)

    def bfloat16(self, device: torch.device) -> bool:
        """Whether the network computes in bfloat16 on a device."""
        known = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
        able = device.type != "cpu" and known is not None and bool(known())
        return self.precision == "bfloat16" or (self.precision == "auto" and able)

    def settings(self) -> dict[str, object]:
        """Options that a checkpoint must share to be resumed; functions count as ``own``."""
        names = ("steps", "epochs", "seconds", "lr", "weight_decay", "optimizer", "schedule", "clip")
        values = {name: getattr(self, name) for name in (*names, "precision", "patience", "seed")}
        values = {name: "own" if callable(value) else value for name, value in values.items()}
        return {**values, "evaluate": self.evaluate is not None}


def run_of(steps: int, options: BaseOptions, known: type[BaseOptions] = TrainingOptions) -> Run:
    """The run of some options: TypeError for names that are not ``known``, ValueError for values."""
    names = [field.name for field in fields(Run) if field.name in known.__annotations__]
    if unknown := [name for name in options if name not in names]:
        raise TypeError(f"unknown option {', '.join(unknown)}; options of training are {', '.join(names)}.")
    return Run(steps, **options)


def optimizer_of(
    choice: Optimizing, parameters: list[nn.Parameter], lr: float, weight_decay: float
) -> Optimizer:
    """The named optimizer, or the result of the user's own function, which then sets ``lr`` itself."""
    if isinstance(choice, str):
        return OPTIMIZERS[choice](parameters, lr=lr, weight_decay=weight_decay)
    made: object = choice(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(made).__name__}.")
    if isinstance(made, LBFGS):
        raise TypeError("optimizer must step on one gradient: LBFGS computes the loss several times.")
    return made


def schedule_of(choice: Scheduling, optimizer: Optimizer, length: int, *, momentum: bool) -> LRScheduler:
    """A schedule of ``length`` steps for each group's learning rate; one-cycle moves the momentum, too."""
    if choice == "one-cycle":
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(optimizer, highest, total_steps=length, cycle_momentum=momentum)
    factor = SCHEDULES[choice] if isinstance(choice, str) else choice

    def scaled(position: int) -> float:
        value = float(factor(position / length))
        if not 0 <= value < math.inf:
            raise ValueError(
                f"schedule must give factors of 0 and above, got {value} at {position / length:.3g}."
            )
        return value

    return LambdaLR(optimizer, scaled)
