"""Optimizers and learning-rate schedules by name or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

Optimizing = str | Callable[[list[nn.Parameter]], Optimizer]
Scheduling = str | Callable[[float], float]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": lambda parameters, **options: SGD(parameters, momentum=0.9, **options),
}
# Factor of the learning rate at a share of the training; one-cycle moves the momentum, too.
SCHEDULES: dict[str, Callable[[float], float] | None] = {
    "one-cycle": None,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "constant": lambda share: 1.0,
}


def optimizer_of(
    choice: Optimizing, parameters: list[nn.Parameter], lr: float, weight_decay: float
) -> Optimizer:
    """The named optimizer, or the result of the user's own function, which then sets ``lr`` itself."""
    if isinstance(choice, str):
        return OPTIMIZERS[choice](parameters, lr=lr, weight_decay=weight_decay)
    made: object = choice(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {type(made).__name__}.")
    return made


def schedule_of(choice: Scheduling, optimizer: Optimizer, length: int, *, momentum: bool) -> LRScheduler:
    """A schedule of ``length`` steps for each group's learning rate; one-cycle moves the momentum, too."""
    if choice == "one-cycle":
        highest = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(optimizer, highest, total_steps=length, cycle_momentum=momentum)
    factor = SCHEDULES[choice] if isinstance(choice, str) else choice
    assert factor is not None

    def scaled(position: int) -> float:
        value = float(factor(position / length))
        if not 0 <= value < math.inf:
            raise ValueError(
                f"schedule must give factors of 0 and above, got {value} at {position / length:.3g}."
            )
        return value

    return LambdaLR(optimizer, scaled)


def check_choice(name: str, choice: object, known: Mapping[str, object]) -> None:
    """Refuse a choice that is neither a known name nor callable."""
    if not callable(choice) and (not isinstance(choice, str) or choice not in known):
        raise ValueError(f"{name} must be one of {', '.join(known)} or a callable, got {choice!r}.")
