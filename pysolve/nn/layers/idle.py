"""Layers none of whose channels are left: they compute nothing, and what follows them runs on."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pysolve.nn.layer_kinds import LINEAR, TRANSPOSED, WEIGHTED, plain
from pysolve.nn.layer_matrix import margins
from pysolve.nn.layers.base import seen, weight_of
from pysolve.nn.state import copy_of

# Of each spatial dimension (up, more, down): a size becomes (size · up + more) // down + 1.
Spatial = tuple[tuple[int, int, int], ...]


class Empty(nn.Module):
    """Takes the place of a Linear or a convolution without outputs: a tensor of no channels, of its shape.

    Parameters
    ----------
    nothing : (0, …) tensor
        The layer's weight without outputs.
    spatial : tuple of (int, int, int)
        Of convolutions, how each spatial dimension changes; none of a Linear.
    """

    nothing: Tensor
    bias = None

    def __init__(self, nothing: Tensor, spatial: Spatial = ()) -> None:
        super().__init__()
        self.register_buffer("nothing", nothing, persistent=False)
        self.spatial = spatial

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(sizes(x, 0, self.spatial))

    @property
    def weight(self) -> Tensor:
        """A weight of no outputs, for code that asks a layer for it."""
        return seen(self.nothing)

    def extra_repr(self) -> str:
        return f"spatial={self.spatial}" if self.spatial else ""


class Constant(nn.Module):
    """Takes the place of a layer without inputs: its bias, in the shape of its outputs and of no other bytes.

    Parameters
    ----------
    bias : (h,) parameter
    spatial : tuple of (int, int, int)
        As of ``Empty``; none of a Linear.
    written : bool
        Whether the result is written into, and so needs bytes of its own.
    """

    bias: nn.Parameter

    def __init__(self, bias: nn.Parameter, spatial: Spatial = (), *, written: bool = False) -> None:
        super().__init__()
        self.bias, self.spatial, self.written = bias, spatial, written

    def forward(self, x: Tensor) -> Tensor:
        # Views of parameters ask for gradients where there are none, which torch's counters do not expect.
        bias = self.bias if torch.is_grad_enabled() else self.bias.detach()
        bias = bias.to(x.dtype).reshape(-1, *(1 for _ in self.spatial))
        y = bias.expand(sizes(x, len(bias), self.spatial))
        return y.clone(memory_format=torch.contiguous_format) if self.written else y

    @property
    def weight(self) -> Tensor:
        """A weight of no inputs, for code that asks a layer for it."""
        return seen(self.bias.detach().new_empty((len(self.bias), 0)))

    def extra_repr(self) -> str:
        return f"{len(self.bias)}" + (f", spatial={self.spatial}" if self.spatial else "")


class PassedBy(nn.Module):
    """Takes the place of a module, such as attention, all of whose result is a constant.

    Parameters
    ----------
    path : str
        Name in the module of the layer that made the constant, under which it stays.
    constant : Constant
    argument : int or str
        Argument whose shape the result has.
    results, position : int
        Size of the tuple that is returned, 0 for the tensor alone, and the constant's place in it.
    """

    def __init__(
        self, path: str, constant: Constant, argument: int | str, results: int, position: int
    ) -> None:
        super().__init__()
        self.path, self.argument, self.results, self.position = path, argument, results, position
        *owners, leaf = path.split(".")
        place: nn.Module = self
        for name in owners:
            place.add_module(name, nn.Module())
            place = place.get_submodule(name)
        place.add_module(leaf, constant)

    def forward(self, *args: object, **kwargs: object) -> object:
        x = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        y = self.get_submodule(self.path)(x)
        return tuple(y if i == self.position else None for i in range(self.results)) if self.results else y


def sizes(x: Tensor, channels: int, spatial: Spatial) -> tuple[int, ...]:
    """Sizes of what a layer of so many outputs makes of an input, of one sample alone or of several."""
    lead = x.ndim - 1 - len(spatial)
    behind = x.shape[lead + 1 :]
    moved = ((n * up + more) // down + 1 for n, (up, more, down) in zip(behind, spatial, strict=True))
    return (*x.shape[:lead], channels, *moved)


def spatial_of(layer: nn.Module) -> Spatial:
    """How a Linear or a convolution changes spatial dimensions."""
    kind = cast(nn.ConvTranspose2d, layer)
    if plain(layer) in LINEAR:
        return ()
    reach = [d * (k - 1) for k, d in zip(kind.kernel_size, kind.dilation, strict=True)]
    if plain(layer) in TRANSPOSED:
        parts = zip(reach, kind.stride, cast(tuple[int, ...], kind.padding), kind.output_padding, strict=True)
        return tuple((s, r - s - 2 * p + more, 1) for r, s, p, more in parts)
    borders = margins(cast(nn.Conv2d, layer))
    around = [before + after for before, after in zip(borders[::2], borders[1::2], strict=True)][::-1]
    return tuple((1, both - r - 1, s) for both, r, s in zip(around, reach, kind.stride, strict=True))


def without_outputs(layer: nn.Module) -> nn.Module:
    """What takes the place of a layer that makes or passes no channels."""
    if plain(layer) not in WEIGHTED:
        return nn.Identity().train(layer.training)
    weight = weight_of(layer).detach()
    return Empty(weight.new_empty((0, *weight.shape[1:])), spatial_of(layer)).train(layer.training)


def without_inputs(layer: nn.Module, *, written: bool = False) -> Constant:
    """What takes the place of a Linear or a convolution that reads nothing."""
    own = cast(nn.Conv2d, layer)
    weight = own.weight
    outputs = (
        layer.out_features if isinstance(layer, nn.Linear) else getattr(own, "nf", 0) or own.out_channels
    )
    bias = weight.new_zeros(outputs) if own.bias is None else own.bias.detach().clone()
    trained = weight.requires_grad if own.bias is None else own.bias.requires_grad
    return Constant(nn.Parameter(bias, trained), spatial_of(layer), written=written).train(layer.training)


def norm_of_nothing(norm: nn.Module, layer: nn.Module, *, written: bool = False) -> Constant:
    """What takes the place of a batch norm behind a layer that reads nothing:  γ (b − μ) / √(σ² + ε) + β ."""
    own = cast(nn.BatchNorm2d, copy_of(norm).eval())
    bias = without_inputs(layer).bias.detach()
    shape = (1, -1, *(1 for _ in spatial_of(layer)))
    with torch.no_grad():
        value = own(bias.reshape(shape)).flatten()
    trained = own.weight.requires_grad if own.weight is not None else bool(layer.weight.requires_grad)
    # Behind the layer, sizes stay.
    same = tuple((1, -1, 1) for _ in spatial_of(layer))
    return Constant(nn.Parameter(value, trained), same, written=written).train(norm.training)
