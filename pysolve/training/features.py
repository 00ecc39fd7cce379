"""Features inside two networks: outputs of layers, and maps between their channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pysolve.errors import PysolveError
from pysolve.nn.running import Output, find_layer

_CHANNELS_SECOND = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm)


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
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[Callable[[], list[Tensor]]]:
    """Record the layers' outputs; the function returns those of the last pass, once."""
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

    layers = {name: find_layer(model, name) for name in names}
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]

    def collect() -> list[Tensor]:
        if missing := layers.keys() - seen.keys():
            raise PysolveError(f"layer {min(missing)} was not run, so it has no features to match.")
        features = [seen[name] for name in names]
        seen.clear()
        return features

    try:
        yield collect
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
