"""Running sums of products of a layer's inputs and outputs, in double precision at the machine's speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pysolve.correlations import Correlations

# Numbers of a row from which products are taken in single precision: below, they cost nothing.
SINGLE = 256
# Rows of one such product, whose rounding grows with their root.
ROWS = 1024
# Numbers in one block: larger ones the allocator returns to the system, and gets back zeroed.
ROOM = 2**20
# Rows of a product computed at once, of which only the columns up to the diagonal are needed.
_STRIP = 128


@dataclass(frozen=True, eq=False)
class Sums:
    """Running sums over samples, updated in place.

    With z = (x, y) less a shift near its mean, over a scale near its size, the sums  Σ z xᵀ, Σ y² and Σ z
    are float64. Shift and scale are those of the first rows; where products are float64 the scale is 1, and
    the shift 0 unless rows have weights. The mean of these is 1 but for rounding: that times the square of an
    input's mean may be more than all that the input varies. Products of single-precision rows of at least
    256 numbers are float32, of 1,024 rows each: relative to the sums in the Frobenius norm their rounding is
    below 1e-6, since inputs that hardly vary around a mean far from zero are shifted there, where no digits
    are lost.

    Parameters
    ----------
    products : (d + h, d) or (d + h, d + h) tensor
        Σ z xᵀ or Σ z zᵀ, each product once: below the diagonal.
    squares : (h,) tensor
        Σ y², shifted and scaled.
    total, shift, scale : (d + h,) tensors
        Σ z, what was taken from x and y, and powers of two by which they were divided: squares of the values
        of networks whose signals die out are no float32 numbers.
    d : int
        Inputs.
    counted : (1,) tensor
        Samples so far.
    double : bool
        Whether all products are float64.
    """

    products: Tensor
    squares: Tensor
    total: Tensor
    shift: Tensor
    scale: Tensor
    d: int
    counted: Tensor
    double: bool

    @classmethod
    def zeros(cls, d: int, h: int, device: torch.device, *, full: bool = False, double: bool = False) -> Sums:
        """Sums over no samples yet, of d inputs and h outputs; ``full``: with the products of outputs."""
        home = _home(device)
        products = torch.zeros(d + h, d + h if full else d, dtype=torch.float64, device=home)
        total, shift = products.new_zeros(2, d + h)
        counted = torch.zeros(1, dtype=torch.int64)
        return cls(products, products.new_zeros(h), total, shift, torch.ones_like(shift), d, counted, double)

    def state(self) -> dict[str, Tensor]:
        """All that ``resumed`` needs."""
        flags = torch.tensor([self.d, self.double])
        parts = ("products", "squares", "total", "shift", "scale", "counted")
        return {**{name: getattr(self, name) for name in parts}, "flags": flags}

    @classmethod
    def resumed(cls, state: Mapping[str, Tensor], device: torch.device) -> Sums:
        """Sums of a ``state``, to go on with."""
        flags, counted = state["flags"].tolist(), state["counted"].cpu()
        parts = {
            name: one.to(_home(device)) for name, one in state.items() if name not in ("flags", "counted")
        }
        return cls(**parts, d=int(flags[0]), counted=counted, double=bool(flags[1]))

    @property
    def count(self) -> int:
        """Samples so far."""
        return int(self.counted)

    @property
    def x_sum(self) -> Tensor:
        """Σ x, (d,)."""
        return (self.total * self.scale + self.count * self.shift)[: self.d]

    @property
    def y_sum(self) -> Tensor:
        """Σ y, (h,)."""
        return (self.total * self.scale + self.count * self.shift)[self.d :]

    def is_single(self, *parts: Tensor) -> bool:
        """Whether products of such rows are single precision."""
        size = len(self.shift)
        return not self.double and size >= SINGLE and all(part.dtype.itemsize < 8 for part in parts)

    @property
    def started(self) -> bool:
        """Whether shift and scale are chosen."""
        return self.count > 0 or bool((self.scale != 1).any() | (self.shift != 0).any())

    def is_shifted(self, *parts: Tensor, weighed: bool = False) -> bool:
        """Whether such rows are taken around a shift."""
        return weighed or self.is_single(*parts)

    def start_of(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale by the first rows."""
        home = self.products.device
        shifts, scales = zip(*(_near_mean(part[:ROWS].to(home)) for part in parts), strict=True)
        scale = torch.cat(scales)
        return torch.cat(shifts), scale if self.is_single(*parts) else torch.ones_like(scale)

    def start(self, shift: Tensor, scale: Tensor) -> None:
        """Choose shift and scale, of sums over no samples yet."""
        self.shift.copy_(shift)
        self.scale.copy_(scale)

    def add(self, *parts: Tensor, weights: Tensor | None = None) -> None:
        """Add samples, ``x`` (n, d) and ``y`` (n, h), of any dtype and on any device.

        ``weights`` (n, 1) multiply the terms of a sample; over all samples their mean must be 1.
        """
        home, size = self.products.device, len(self.shift)
        single = self.is_single(*parts)
        kind, step = (torch.float32, ROWS) if single else (torch.float64, max(1, 2 * ROOM // max(1, size)))
        shifted = self.is_shifted(*parts, weighed=weights is not None)
        if shifted and not self.started and len(parts[0]):
            self.start(*self.start_of(*parts))
        with _exact():
            for start in range(0, len(parts[0]), step):
                some = slice(start, start + step)
                own = None if weights is None else weights[some].to(home, kind)
                self._add([part[some].to(home) for part in parts], own, kind)

    def _add(self, parts: Sequence[Tensor], weights: Tensor | None, kind: torch.dtype) -> None:
        n, size = len(parts[0]), len(self.shift)
        # Laid out as x is: to turn it takes several times as long as to copy it.
        by_columns = parts[0].stride(0) == 1 and n > 1
        store = self.shift.new_empty((size, n) if by_columns else (n, size), dtype=kind)
        z, place = store.T if by_columns else store, 0
        for part in parts:
            width = part.shape[1]
            own = slice(place, place + width)
            torch.sub(part.to(kind), self.shift[own].to(kind), out=z[:, own])
            place += width
        if size >= SINGLE and not self.double:
            z /= self.scale.to(kind)
        self.counted.add_(n)
        # Of single precision, too: sums of so few rows around their mean lose no more than their rounding.
        weighed = z if weights is None else z * weights
        self.total.add_(weighed.sum(0))
        if size > self.d:
            # A norm along the columns in double precision takes five times as long.
            self.squares.add_((z[:, self.d :].double() * weighed[:, self.d :]).sum(0))
        # SciPy's symmetric update saves as much, but its threads and torch's then wait for each other.
        width = -(-size // -(-size // _STRIP))
        for start in range(0, size, width):
            rows, end = slice(start, start + width), min(start + width, self.products.shape[1])
            self.products[rows, :end].add_(weighed[:, rows].T @ z[:, :end])

    def correlations(self, group_size: int = 1, *, last: bool = False) -> Correlations:
        """The sums as NumPy arrays; without products of outputs, yy is the diagonal.

        ``last``: in the memory of the sums, which cannot go on.
        """
        d, n, shift, scale = self.d, self.count, self.shift.cpu(), self.scale.cpu()
        total = self.total.cpu() * scale
        sums, columns = total + n * shift, self.products.shape[1]
        products = self.products.cpu()
        products = products if last else products.clone()
        if bool((scale != 1).any()):
            products.mul_(scale[:, None]).mul_(scale[:columns])
        if bool(shift.any()):
            products.addr_(total, shift[:columns]).addr_(shift, sums[:columns])
        xx, yx, yy = products[:d, :d], products[d:, :d], products[d:, d:]
        _mirror(xx)
        if yy.numel():
            _mirror(yy)
        else:
            yy = self.squares.cpu() * scale[d:].square() + shift[d:] * (total + sums)[d:]
        return Correlations(
            xx.numpy(), yx.numpy(), yy.numpy(), n, sums[:d].numpy(), sums[d:].numpy(), group_size
        )


def _home(device: torch.device) -> torch.device:
    """Where sums are held: Apple's GPU has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 without the shorter formats (TF32, bfloat16) that users may have allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def room(inputs: int) -> int:
    """Numbers of inputs to add at once, of rows of so many."""
    return max(ROOM, ROWS * inputs)


def _near_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the columns, and powers of two near the sizes of what differs from them.

    The means have so few digits that products of what a ReLU makes zero are exact in float32: in single
    precision many equal terms are all rounded to the same side.
    """
    values = rows.double()
    if not values.shape[1]:
        return values.new_zeros(0), values.new_ones(0)
    mean, spread = values.mean(0), values.std(0, correction=0)
    step = torch.exp2((spread / 8).log2().floor())
    rounded = torch.where(step > 0, (mean / step).round() * step, mean)
    shift = rounded.to(rows.dtype).double().nan_to_num(0.0, 0.0, 0.0)
    found = 8 * step[(step > 0) & step.isfinite()]
    # A column that does not vary yet may do so later, about as others do.
    usual = found.median() if len(found) else torch.ones((), dtype=torch.float64, device=step.device)
    sizes = torch.where((step > 0) & step.isfinite(), 8 * step, usual)
    return shift, sizes.clamp(2.0**-120, 2.0**120)


def _mirror(lower: Tensor) -> None:
    """Make a matrix symmetric by what is on and below its diagonal, in place."""
    for start in range(0, len(lower), _STRIP):
        rows = slice(start, start + _STRIP)
        lower[:start, rows] = lower[rows, :start].T
        lower[rows, rows] = lower[rows, rows].tril() + lower[rows, rows].tril(-1).T
