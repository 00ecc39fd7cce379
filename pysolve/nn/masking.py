"""Weights that are masked: pruned places are zero, and stay zero while the others are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pysolve.nn.network import as_tensor, find_layer


class Mask(nn.Module):
    """The parametrisation  w ↦ w ∘ m.

    The mask is a buffer and so part of the state dict. Pruned weights get no gradient, hence no momentum, and
    are zero also below the parametrisation.

    Parameters
    ----------
    mask : bool tensor
        True for what stays.
    splicing : bool
        Let gradients reach the pruned weights too, as if they were in use: they go on changing under the mask
        and may come back with a later one. So in dynamic network surgery.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, *, splicing: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.splicing = splicing

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        # Not a product: that would leave −0.0, and NaN of infinity.
        masked = torch.where(self.mask, weight, 0.0)
        return weight + (masked - weight).detach() if self.splicing else masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What lies below a weight that is put in place."""
        return weight if self.splicing else torch.where(self.mask, weight, 0.0)


def mask_weights(
    model: nn.Module, masks: Mapping[str, Tensor | npt.NDArray[Any]], *, splicing: bool = False
) -> None:
    """Mask the weights of layers, in place; layers that have a mask get another one.

    Parameters
    ----------
    model : nn.Module
    masks : {layer: bool array or tensor}
        Of the weights' shapes; True for what stays.
    splicing : bool
        As ``Mask`` has it.
    """
    layers = {name: find_layer(model, name) for name in masks}
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        mask = as_tensor(masks[name])
        if not isinstance(weight, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"the mask of {name} must be of booleans in its weight's shape {wanted}, got {mask.dtype} of "
                f"{tuple(mask.shape)}."
            )
    for name, layer in layers.items():
        weight, mask = layer.weight, as_tensor(masks[name])
        assert isinstance(weight, Tensor)
        remove_mask(layer)
        kept = mask.to(weight.device, copy=True)
        parametrize.register_parametrization(layer, "weight", Mask(kept, splicing=splicing))


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """The masks of a network's weights, by the layers' names; changing one changes what is in use."""
    found = {}
    for name, layer in model.named_modules():
        mask = _mask(layer)
        if mask is not None:
            found[name] = mask
    return found


def remove_masks(model: nn.Module) -> None:
    """Make masked weights ordinary ones, with zeros where they were pruned; in place."""
    for layer in list(model.modules()):
        remove_mask(layer)


def remove_mask(layer: nn.Module) -> None:
    """Make a layer's masked weight an ordinary one; in place."""
    mask = _mask(layer)
    if mask is not None:
        with torch.no_grad():
            # What is in use, exactly: with splicing the sum above rounds.
            original = layer.parametrizations.weight.original  # type: ignore[union-attr]
            original.copy_(torch.where(mask.mask, original, 0.0))  # type: ignore[operator, arg-type]
        parametrize.remove_parametrizations(layer, "weight")


def _mask(layer: nn.Module) -> Mask | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((one for one in layer.parametrizations.weight if isinstance(one, Mask)), None)  # type: ignore[union-attr]
