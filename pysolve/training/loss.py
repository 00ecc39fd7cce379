"""The distillation loss: how a student is compared with its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from pysolve.errors import DataError, PysolveError
from pysolve.nn.divergence import class_dim
from pysolve.nn.running import Batch, Output, without_classes
from pysolve.training.finetune import own_loss
from pysolve.training.loop import in_float32

Soft = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DistillationLoss:
    """Terms and weights of the loss; ``distill`` describes them.

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

    def settings(self) -> dict[str, object]:
        """Options that a checkpoint must share to be resumed; functions count as ``own``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "loss": self.loss if isinstance(self.loss, str) else "own"}


def floating(output: Output) -> list[Tensor]:
    """The compared tensors of a network's output: its logits, or all that are floating-point."""
    output = without_classes(output)
    if isinstance(output, Mapping):
        return floating(output["logits"] if "logits" in output else [*output.values()])
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in floating(item)]
    if not isinstance(output, Tensor):
        return floating(output.logits) if hasattr(output, "logits") else []
    # Single numbers are losses and counts.
    return [output] if output.is_floating_point() and output.ndim else []


def output_loss(
    loss: DistillationLoss, output: Output, outputs: list[Tensor], targets: list[Tensor], batch: Batch
) -> Tensor:
    """α · soft + (1 − α) · hard: the loss without its features."""
    shapes, wanted = ([list(tensor.shape) for tensor in tensors] for tensors in (outputs, targets))
    if shapes != wanted or not shapes:
        raise PysolveError(
            "the student must answer with floating-point tensors of the same shapes as the teacher: got "
            f"{shapes}, expected {wanted}."
        )
    value = outputs[0].new_zeros(())
    if loss.alpha:
        soft = [soft_loss(loss, one, to.to(one.dtype)) for one, to in zip(outputs, targets, strict=True)]
        value = torch.stack(soft).sum()
    if loss.alpha == 1:
        return value
    return loss.alpha * value + (1 - loss.alpha) * _hard_loss(output, outputs[0], batch, loss.alpha)


def soft_loss(loss: DistillationLoss, output: Tensor, target: Tensor) -> Tensor:
    """T² KL(softmax(target / T) ‖ softmax(output / T)), mean over samples and positions, or another loss."""
    if callable(loss.loss):
        return loss.loss(output, target)
    if loss.loss == "mse":
        return mse_loss(output, target)
    dim, T = class_dim(output), loss.temperature
    if output.ndim < 2 or output.shape[dim] < 2:
        raise ValueError(
            f"outputs of shape {list(output.shape)} have no classes to compare by kl: give loss='mse'."
        )
    log_q, log_p = (output / T).log_softmax(dim), (target / T).log_softmax(dim)
    return T * T * kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim).mean()


def _hard_loss(output: Output, logits: Tensor, batch: Batch, alpha: float) -> Tensor:
    if isinstance(batch, Mapping):
        return in_float32(own_loss(output))
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise DataError(
            f"alpha={alpha} needs labels: pairs of inputs and labels, or alpha=1; got {type(batch).__name__}."
        )
    return cross_entropy(logits.movedim(class_dim(logits), 1), batch[1].to(logits.device))
