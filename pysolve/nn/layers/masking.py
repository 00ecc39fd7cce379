"""Masked weights: pruned ones are zero, and remain zero while the others are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from pysolve.correlations import Mask as BoolArray
from pysolve.nn.running import as_tensor, check_model, find_layer
from pysolve.nn.state import copy_of

# To make a module takes longer than to see that there is none.
_NONE = nn.ModuleList()


class Mask(nn.Module):
    """The parametrisation  w ↦ w ∘ m.

    The mask is a buffer and so part of the state dict. Pruned weights get no gradient, hence no momentum;
    whatever an optimiser does to the values below, the weight in use is zero there.

    Parameters
    ----------
    mask : bool tensor
        True for the kept weights.
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
        # Exact: w + 0 is w, and w + (0 − w) is 0.
        return weight + (masked - weight).detach() if self.splicing else masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter below, for a weight that is put in place."""
        return weight if self.splicing else torch.where(self.mask, weight, 0.0)


def mask_weights(
    model: nn.Module, masks: Mapping[str, Tensor | BoolArray], *, splicing: bool = False
) -> None:
    """Mask the weights of layers, in place; layers that have a mask get another one.

    The weights stay the same parameters, so an optimiser goes on; after another mask, the weights
    that the earlier one pruned are zero. A layer under several names has one mask.

    Parameters
    ----------
    model : nn.Module
    masks : {layer: bool array or tensor}
        Of the weights' shapes; True for the kept weights.
    splicing : bool
        As ``Mask`` has it.

    Raises
    ------
    ValueError
        Before anything is changed: when a mask does not fit; when a layer's weight is no parameter of its
        own but computed, or shared with another layer.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.mask_weights(model, {"0": torch.eye(64, 16, dtype=torch.bool)})
    >>> int((model[0].weight != 0).sum())
    16
    """
    check_model("model", model)
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of layers to masks, got {type(masks).__name__}.")
    layers = {name: find_layer(model, name) for name in masks}
    given: dict[nn.Module, tuple[str, Tensor]] = {}
    for name, layer in layers.items():
        mask, weight = as_tensor(masks[name]), getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted = None if weight is None else tuple(weight.shape)
            raise ValueError(
                f"the mask of {name} must be of booleans in its weight's shape {wanted}, got {mask.dtype} of "
                f"{tuple(mask.shape)}."
            )
        if mask_of(layer) is None:
            check_own_weight(model, name, layer)
        first, earlier = given.setdefault(layer, (name, mask))
        if not torch.equal(earlier, mask):
            raise ValueError(f"{first} and {name} are one layer and need one mask, got two different ones.")
    for layer, (_, mask) in given.items():
        remove_mask(layer)
        kept = mask.to(below(layer).device, copy=True)
        parametrize.register_parametrization(layer, "weight", Mask(kept, splicing=splicing))


def masks_of(model: nn.Module) -> dict[str, Mask]:
    """The masks of a network's weights, by the layers' first names; changes to them take effect.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.mask_weights(model, {"0": torch.eye(64, 16, dtype=torch.bool)})
    >>> list(ps.masks_of(model))
    ['0']
    """
    check_model("model", model)
    layers = model.named_modules()
    return {name: mask for name, layer in layers if (mask := mask_of(layer)) is not None}


def mask_of(layer: nn.Module) -> Mask | None:
    """The mask of a layer's weight, if it has one."""
    return next((one for one in parametrizations(layer) if isinstance(one, Mask)), None)


def parametrizations(layer: nn.Module) -> nn.ModuleList:
    """The modules by which a layer's weight is computed; none where it is a parameter."""
    if not parametrize.is_parametrized(layer, "weight"):
        return _NONE
    found = layer.get_submodule("parametrizations.weight")
    assert isinstance(found, nn.ModuleList)
    return found


def below(layer: nn.Module) -> nn.Parameter:
    """The parameter of a layer's weight: the one below, where the weight is computed."""
    found = parametrizations(layer).original if len(parametrizations(layer)) else layer.weight
    assert isinstance(found, nn.Parameter)
    return found


def remove_masks(model: nn.Module) -> None:
    """Make masked weights ordinary ones again, exactly those in use; in place, and the same parameters.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.mask_weights(model, {"0": torch.eye(64, 16, dtype=torch.bool)})
    >>> ps.remove_masks(model)
    >>> ps.masks_of(model), int((model[0].weight != 0).sum())
    ({}, 16)
    """
    check_model("model", model)
    for layer in list(model.modules()):
        remove_mask(layer)


def remove_mask(layer: nn.Module) -> None:
    """Make a layer's masked weight an ordinary one; in place."""
    mask = mask_of(layer)
    if mask is not None:
        with torch.no_grad():
            weight = below(layer)
            weight.copy_(torch.where(mask.mask, weight, 0.0))
        make_ordinary(layer)


def permanent_by(layer: nn.Module) -> str:
    """What makes a layer's computed weight a parameter again, to go on after a colon."""
    hooks = {type(hook).__name__ for hook in layer._forward_pre_hooks.values()}
    known = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
    found = [f"torch.nn.utils.{remedy}" for name, remedy in known.items() if name in hooks]
    if parametrize.is_parametrized(layer):
        found = [_remover(layer)]
    elif any(isinstance(hook, BasePruningMethod) for hook in layer._forward_pre_hooks.values()):
        found = ["torch.nn.utils.prune.remove"]
    return f"{found[0]} makes it a parameter" if found else "make it a parameter"


def _remover(layer: nn.Module) -> str:
    """What takes a layer's parametrisations off: one call for the whole network where they are ours."""
    kinds = {type(one) for one in parametrizations(layer)}
    if kinds == {Mask}:
        return "pysolve.remove_masks"
    ours = all(kind.__module__.startswith("pysolve.") for kind in kinds)
    if kinds and ours and Mask not in kinds:
        return "pysolve.remove_sharing"
    return "torch.nn.utils.parametrize.remove_parametrizations"


def make_ordinary(layer: nn.Module) -> None:
    """Make a layer's computed weight a parameter of the value in use; in place."""
    # Torch takes the weight out of the class that it made for such layers, which copies share.
    kind = type(layer)
    layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(layer, "weight")
    # State dicts and optimisers go by the order of parameters: the weight was the first.
    own = layer._parameters
    ordered = {"weight": own.pop("weight"), **own}
    own.clear()
    own.update(ordered)


def unmasked(model: nn.Module) -> nn.Module:
    """The network if it has no masks, else a copy without them."""
    return changed_copy(model, remove_masks) if masks_of(model) else model


def changed_copy(model: nn.Module, change: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of a network, changed in place."""
    copied = copy_of(model)
    change(copied)
    return copied


def check_own_weight(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight is no parameter of its own, but computed or another layer's, too."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or parametrize.is_parametrized(layer, "weight"):
        raise ValueError(f"the weight of {name} is computed from other values: {permanent_by(layer)}.")
    for other, module in model.named_modules():
        if module is not layer and any(one is weight for one in module.parameters(recurse=False)):
            raise ValueError(f"{name} shares its weight with {other}: untie them first.")
