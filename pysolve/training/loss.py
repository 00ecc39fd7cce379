"""How a student is compared with its teacher: outputs, labels, and features of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from pysolve.errors import DataError, PysolveError
from pysolve.nn.batches.padding import without_padding
from pysolve.nn.divergence import class_dim
from pysolve.nn.outputs import floating
from pysolve.nn.refusal import in_words, output_of
from pysolve.nn.running import Batch, Output, device_of, find_layer
from pysolve.training.finetune import loss_on, own_loss
from pysolve.training.loop import computing, in_float32
from pysolve.training.options import Run

Soft = str | Callable[[Tensor, Tensor], Tensor]
# From a batch to the output, its compared tensors and the features of layers; the latter two in float32.
Answering = Callable[[Batch], tuple[Output, list[Tensor], list[Tensor]]]
_CHANNELS_SECOND = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm)


@dataclass(frozen=True)
class DistillationLoss:
    """Terms and weights of the loss, as ``distill`` describes them; ``pairs`` are layers."""

    temperature: float
    alpha: float
    loss: Soft
    pairs: dict[str, str]
    feature_weight: float
    mix: float

    def __post_init__(self) -> None:
        for name in ("temperature", "alpha", "mix", "feature_weight"):
            number: object = getattr(self, name)
            if not isinstance(number, int | float | np.number):
                raise TypeError(f"{name} must be a number, got {number!r}.")
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
        value: object = loss.loss(output, target)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must return a tensor, computed from the outputs, got {in_words(value)}.")
        return value
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
    return loss_on(cross_entropy, logits.movedim(class_dim(logits), 1), batch[1].to(logits.device))


def layer_pairs(features: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """The student's layers, and the teacher's layer that each is matched with."""
    if isinstance(features, str):
        raise TypeError(
            f"features must be a list of names, got the string {features!r}: pass [{features!r}]."
        )
    if isinstance(features, Mapping):
        return dict(features)
    return {name: name for name in features or ()}


@contextmanager
def tapped(model: nn.Module, names: Sequence[str], run: Run) -> Iterator[Answering]:
    """A function that runs a network in the run's precision, and keeps what these layers give."""
    seen: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Output) -> None:
            output = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(output, Tensor) or not output.is_floating_point():
                kind = type(output).__name__
                raise PysolveError(f"layer {name} gives a {kind}, not numbers to match: choose another.")
            # A layer that follows may work in place.
            seen[name] = output.clone()

        return hook

    def answer(batch: Batch) -> tuple[Output, list[Tensor], list[Tensor]]:
        device = device_of(model)
        with computing(run, device):
            output = output_of(model, batch, device)
        if missing := layers.keys() - seen.keys():
            raise PysolveError(f"layer {min(missing)} was not run, so it has no features to match.")
        features = [seen[name] for name in names]
        seen.clear()
        compared = [without_padding(one, batch) for one in floating(output)]
        return output, in_float32(compared), in_float32(features)

    layers = {name: find_layer(model, name) for name in names}
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield answer
    finally:
        for handle in handles:
            handle.remove()


def channel_dim(layer: nn.Module, feature: Tensor) -> int:
    """Dimension of the channels: the last of three, except for layers that work along positions."""
    return 2 if feature.ndim == 3 and not isinstance(layer, _CHANNELS_SECOND) else 1


def maps_between(
    pairs: Mapping[str, str], dims: Sequence[int], own: Sequence[Tensor], wanted: Sequence[Tensor]
) -> nn.ModuleList:
    """For each pair of layers a linear map to the teacher's channels; the identity where shapes agree."""
    maps: list[nn.Module] = []
    for (layer, teacher_layer), dim, feature, target in zip(pairs.items(), dims, own, wanted, strict=True):
        shapes = [list(tensor.shape) for tensor in (feature, target)]
        rest = [[size for i, size in enumerate(shape) if i != dim] for shape in shapes]
        if rest[0] != rest[1] or len(shapes[0]) != len(shapes[1]):
            raise PysolveError(
                f"features of {layer} have shape {shapes[0]}, those of the teacher's {teacher_layer} "
                f"{shapes[1]}: they must agree but for the channels, dimension {dim}. Choose other layers."
            )
        if shapes[0] == shapes[1]:
            maps.append(nn.Identity())
        else:
            maps.append(nn.Linear(shapes[0][dim], shapes[1][dim], device=feature.device, dtype=feature.dtype))
    return nn.ModuleList(maps)


def unexplained(feature: Tensor, target: Tensor, to_channels: nn.Module, dim: int) -> Tensor:
    """Mean squared error of a mapped feature, divided by the variance of the target around channel means."""
    if not isinstance(to_channels, nn.Identity):
        feature = to_channels(feature.movedim(dim, -1)).movedim(-1, dim)
    others = [i for i in range(target.ndim) if i != dim]
    target = target.to(feature.dtype)
    around = (target - target.mean(others, keepdim=True)).square().mean()
    whole = target.square().mean()
    scale = torch.where(around > 0, around, torch.where(whole > 0, whole, 1.0))
    return (feature - target).square().mean() / scale
