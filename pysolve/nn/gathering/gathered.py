"""What was summed of layers so far, from one batch after the other, and the correlations that it makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Correlations
from pysolve.errors import DataError
from pysolve.nn import layer_matrix as rows
from pysolve.nn.batches.padding import Masks, mask_of_rows, token_masks
from pysolve.nn.gathering.sums import Sums, room
from pysolve.nn.gathering.watching import watching
from pysolve.nn.layer_kinds import LINEAR
from pysolve.nn.layer_matrix import Layer
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Batch, Device

# Called with the name, the layer, the input and the output of one call.
Record = Callable[[str, Layer, Tensor, Tensor], None]
# Rows that tell whether a layer's outputs are  M x + b, and what rounding of half types may make of them.
_TRIED, _NEAR = 64, 0.02


class Gathered:
    """What was summed of some layers so far; it can be put away, and taken up again.

    Parameters
    ----------
    layers : {name: layer}
    shares : {name: share}
        Of the positions of each call.
    double : collection of str
        Layers whose products are all float64.
    own : bool
        Whether outputs are the layers' own.
    rounded : bool
        Whether those of half precision may be taken for exact ones.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        shares: Mapping[str, float],
        double: Collection[str] = (),
        *,
        own: bool = True,
        rounded: bool = True,
    ) -> None:
        self.layers, self.shares, self.double = layers, shares, double
        self.own, self.rounded = own, rounded
        self.sums: dict[str, _Seen] = {}
        self.choices: dict[str, torch.Generator] = {}
        self.starts: dict[str, tuple[Tensor, Tensor]] = {}
        self.masks: Masks = {}

    def start_as(self, model: nn.Module, batch: Batch) -> None:
        """Shift and scale every layer's sums as if this batch were the first."""
        other = Gathered(self.layers, self.shares, self.double, own=self.own, rounded=self.rounded)
        other.run(model, batch)
        self.starts = {name: (seen.sums.shift, seen.sums.scale) for name, seen in other.sums.items()}

    def run(self, model: nn.Module, batch: Batch, device: Device = None) -> None:
        """Add what the layers read and write in one batch, but for padding; in evaluation mode."""
        self.masks = token_masks(batch)
        run_watched(model, self.layers, batch, device, self.record)

    def record(self, name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        """Add the samples of one call."""
        share, real = self.shares.get(name, 1.0), self._real(layer, x)
        chosen = real
        if share < 1 and (x.ndim > 2 or not isinstance(layer, LINEAR)):
            random = self.choices.setdefault(name, torch.Generator().manual_seed(0))
            chosen = rows.choice(rows.positions(layer, y) if real is None else len(real), share, random)
            chosen = chosen if real is None or chosen is None else real[chosen]
        for values, what in ((x, "inputs"), (y, "outputs")):
            # A sum is read faster than a mask is made; one that is too large is not what is looked for.
            if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
                raise DataError(f"the {what} of {name} hold NaN or infinity: check batches and weights.")
        limit = room(rows.channels(layer)[0] * rows.taps(layer))
        for some_x, some_y in rows.blocks(layer, x, y, chosen, limit=limit):
            if name not in self.sums:
                exact = self.rounded or y.dtype.itemsize >= 4
                double = name in self.double
                self.sums[name] = _Seen.of(layer, some_x, some_y, own=self.own and exact, double=double)
                if name in self.starts:
                    self.sums[name].sums.start(*self.starts[name])
            seen = self.sums[name]
            seen.sums.add(*([some_x, some_y] if seen.bias is None else [some_x]))

    def _real(self, layer: Layer, x: Tensor) -> Tensor | None:
        """Rows of real tokens; None for all."""
        mask = mask_of_rows(self.masks, x.shape[:-1]) if isinstance(layer, LINEAR) else None
        return None if mask is None or mask.all() else mask.nonzero()[:, 0]

    def pop(self, name: str, group_size: int = 1, *, full: bool = False) -> Correlations | None:
        """The correlations of a layer, whose sums are dropped; None without samples."""
        seen = self.sums.pop(name)
        return _correlations(seen, group_size, full=full)

    def state(self) -> dict[str, AnyArray]:
        """All sums so far as arrays, to put away."""
        parts = {
            f"{name}:{part}": one for name, seen in self.sums.items() for part, one in seen.state().items()
        }
        random = {f"{name}:random": one.get_state() for name, one in self.choices.items()}
        return {name: np.asarray(one.cpu()) for name, one in {**parts, **random}.items()}

    def resume(self, state: Mapping[str, AnyArray]) -> None:
        """Go on from sums that were put away."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, values in state.items():
            name, part = key.rsplit(":", 1)
            layers.setdefault(name, {})[part] = torch.from_numpy(np.array(values))
        for name, parts in layers.items():
            if (random := parts.pop("random", None)) is not None:
                self.choices[name] = torch.Generator()
                self.choices[name].set_state(random)
            if parts:
                self.sums[name] = _Seen.resumed(self.layers[name], parts)


def run_watched(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, device: Device, record: Record
) -> None:
    """Run one batch and record every call of the layers."""

    def detached(name: str, layer: Layer, x: Tensor, y: Tensor) -> None:
        record(name, layer, x.detach(), y.detach())

    with watching(layers, detached):
        output_of(model, batch, device)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What was summed of a layer: of its inputs alone where outputs are  M x + bias, and the layer as called.

    ``bias`` is None where outputs were summed too.
    """

    layer: Layer
    sums: Sums
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Layer, x: Tensor, y: Tensor, *, own: bool, double: bool) -> _Seen:
        """For rows like these; ``own``: y is what the layer made of x."""
        bias = _own_bias(layer, x[:_TRIED], y[:_TRIED]) if own else None
        outputs, full = (y.shape[1], True) if bias is None else (0, False)
        return cls(layer, Sums.zeros(x.shape[1], outputs, x.device, full=full, double=double), bias)

    def state(self) -> dict[str, Tensor]:
        """The sums as tensors, by what they are."""
        return {**self.sums.state(), **({} if self.bias is None else {"bias": self.bias})}

    @classmethod
    def resumed(cls, layer: Layer, state: Mapping[str, Tensor]) -> _Seen:
        """What ``state`` was of, on the layer's device."""
        home = layer.weight.device
        bias = state.get("bias")
        sums = Sums.resumed({name: one for name, one in state.items() if name != "bias"}, home)
        return cls(layer, sums, None if bias is None else bias.to(home))


def _own_bias(layer: Layer, x: Tensor, y: Tensor) -> Tensor | None:
    """The b of  y = M x + b  where this is what the layer does: its bias, or zero; else None."""
    M = rows.matrix(layer).double()
    rest, near = y.double() - x.double() @ M.T, _NEAR * y.double().norm()
    given = layer.bias
    for b in ([] if given is None else [given.detach().double()]) + [M.new_zeros(len(M))]:
        if (rest - b).norm() <= near:
            return b
    return None


def _correlations(seen: _Seen, group_size: int, *, full: bool) -> Correlations | None:
    """The sums of a layer, with those that follow from its weights."""
    if not seen.sums.count:
        return None
    known = seen.sums.correlations(group_size, last=True)
    return known if seen.bias is None else own_outputs(known, seen.layer, bias=seen.bias, full=full)


def own_outputs(
    known: Correlations, layer: Layer, *, bias: Tensor | None = None, full: bool = False
) -> Correlations:
    """Correlations of inputs with  y = M x + b.

    Parameters
    ----------
    known : Correlations
        Of the inputs; its outputs do not matter.
    layer : one of LAYERS
    bias : (h,) tensor, optional
        b, by default the layer's own.
    full : bool
        Whether Σ y yᵀ is wanted in full, rather than its diagonal.
    """
    M = np.asarray(rows.matrix(layer).double().cpu().numpy())
    given = layer.bias if bias is None else bias
    b = np.zeros(len(M)) if given is None else np.asarray(given.detach().double().cpu().numpy())
    explained, mean = M @ known.xx, M @ known.x_sum
    yy = explained @ M.T if full else np.einsum("ij,ij->i", explained, M)
    if full:
        yy += np.outer(b, 2 * mean + known.count * b)
        yy = (yy + yy.T) / 2
    else:
        yy = yy + 2 * b * mean + known.count * b * b
    yx = explained + np.outer(b, known.x_sum)
    return replace(known, yx=yx, yy=yy, y_sum=mean + known.count * b)
