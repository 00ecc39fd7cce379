"""How long a layer takes at other widths on this machine: timed alone at a few, interpolated between."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Array
from pysolve.nn.cost.profile import times_of
from pysolve.nn.cut.slicing import Cut, inputs, narrow, outputs
from pysolve.nn.layer_kinds import LINEAR, WEIGHTED, plain
from pysolve.nn.running import Batch, evaluating, forward, hooked
from pysolve.nn.state import copy_of

# Widths of a layer that are timed; shares of its time that may be open between two, and that are none.
MOST_WIDTHS, OPEN, SAME = 24, 0.05, 0.02
# Seconds for which a layer is called at one width, or FEWEST calls.
SECONDS = 0.01


@dataclass(frozen=True, eq=False)
class Seen:
    """What passed through a module on a batch.

    Parameters
    ----------
    shape : tuple of int
        Of its first call's input.
    last : bool
        Whether channels lay last in memory.
    read, written : int
        Numbers in inputs and outputs, of all calls.
    calls : int
    """

    shape: tuple[int, ...]
    last: bool
    read: int
    written: int
    calls: int = 1


@dataclass(frozen=True, eq=False)
class WidthTimes:
    """Seconds of a layer, and as shares of them its times at fewer outputs or inputs.

    Parameters
    ----------
    seconds : float
        Of all its calls.
    by_outputs, by_inputs : (width + 1,) array
        From no channel to all; below the least that may be left, as there.
    """

    seconds: float
    by_outputs: Array
    by_inputs: Array


def seen_by(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Seen]:
    """What passes through modules that are called with a tensor and return one."""
    found: dict[str, Seen] = {}
    modules = dict(model.named_modules(remove_duplicate=False))

    def note(name: str, _: nn.Module, args: tuple[object, ...], output: object) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        x, old = args[0], found.get(name)
        last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        new = Seen(tuple(x.shape), last, x.numel(), output.numel())
        found[name] = (
            new
            if old is None
            else Seen(old.shape, old.last, old.read + new.read, old.written + new.written, old.calls + 1)
        )

    hooks = (modules[name].register_forward_hook(partial(note, name)) for name in names if name in modules)
    with evaluating(model), hooked(hooks):
        forward(model, batch)
    return found


def width_times(
    layer: nn.Module,
    seen: Seen,
    least: tuple[int, int],
    steps: tuple[int, int],
    known: dict[Hashable, WidthTimes],
) -> WidthTimes | None:
    """Times of a Linear layer or a convolution; None of others, and where it cannot be called alone.

    Parameters
    ----------
    layer : nn.Module
    seen : Seen
    least, steps : (int, int)
        Fewest outputs and inputs that may be left, and of how many channels they lose a multiple.
    known : {layer: WidthTimes}
        Of equal layers, which are timed once; the new one is added.
    """
    if plain(layer) not in WEIGHTED:
        return None
    groups = getattr(layer, "groups", 1)
    apart = groups == inputs(layer) == outputs(layer)
    if groups > 1 and not apart:
        return None
    shapes = layer.weight.shape, layer.weight.dtype, seen.shape, seen.last
    key = plain(layer), repr(layer), *shapes, least, steps
    if key not in known:
        timer = _Timer(layer, seen, apart=apart)
        try:
            whole = timer.seconds(outputs(layer), inputs(layer))
            by_outputs = _curve(
                lambda n: timer.seconds(n, inputs(layer)), least[0], outputs(layer), steps[0], whole
            )
            by_inputs = np.ones(inputs(layer) + 1)
            if not apart:
                by_inputs = _curve(
                    lambda n: timer.seconds(outputs(layer), n), least[1], inputs(layer), steps[1], whole
                )
        # Whatever a layer's own code raises when it is called alone.
        except Exception:
            return None
        known[key] = WidthTimes(whole, by_outputs, by_inputs)
    one = known[key]
    return WidthTimes(one.seconds * seen.calls, one.by_outputs, one.by_inputs)


class _Timer:
    """A layer at any width, called alone."""

    def __init__(self, layer: nn.Module, seen: Seen, *, apart: bool) -> None:
        self.layer, self.seen, self.apart = layer, seen, apart
        self.known: dict[tuple[int, int], float] = {}

    def seconds(self, out: int, into: int) -> float:
        """Of the fastest call: others were disturbed."""
        if (out, into) not in self.known:
            layer = copy_of(self.layer)
            rows, columns = (np.arange(n) < k for n, k in ((outputs(layer), out), (inputs(layer), into)))
            whole = np.ones_like(rows)
            # What passes channels loses the same of both.
            cut = Cut(whole, rows, whole) if self.apart else Cut(rows, whole, columns)
            narrow(layer, cut)
            x = self._input(out if self.apart else into)
            (times,) = times_of([layer], (x,), SECONDS)
            self.known[out, into] = min(times)
        return self.known[out, into]

    def _input(self, channels: int) -> Tensor:
        shape, weight = [*self.seen.shape], self.layer.weight
        assert isinstance(weight, Tensor)
        dims = 0 if plain(self.layer) in LINEAR else weight.ndim - 2
        shape[len(shape) - 1 - dims] = channels
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
        return x.to(memory_format=torch.channels_last) if self.seen.last else x


def _curve(seconds: Callable[[int], float], least: int, width: int, step: int, whole: float) -> Array:
    """(width + 1,) times as shares of the whole layer's, in steps that rise with the width.

    Widths are timed where most is open: in the middle, at a round number, of the two neighbours whose times
    differ most. All others count as the next larger one that was timed, and so do those that save next to
    nothing: of widths for which a kernel takes equally long, the largest is the one to choose.
    """
    known = {width: whole, least: seconds(least)} if least < width else {width: whole}
    while len(known) < MOST_WIDTHS:
        gaps = [(abs(known[b] - known[a]), a, b) for a, b in pairwise(sorted(known)) if b - a > step]
        if not gaps or (largest := max(gaps))[0] <= OPEN * whole:
            break
        middle = _between(largest[1], largest[2], step)
        known[middle] = seconds(middle)
    found, now = np.ones(width + 1), 1.0
    for n in sorted(known, reverse=True)[1:]:
        if known[n] / whole < now - SAME:
            now = known[n] / whole
        found[: n + 1] = now
    return found


def _between(low: int, high: int, step: int) -> int:
    """The roundest width in the middle half of a gap, in steps from its upper end."""
    quarter = (high - low) // 4
    inside = range(high - step, low, -step)
    middle = [n for n in inside if low + quarter <= n <= high - quarter] or [inside[len(inside) // 2]]
    return max(middle, key=lambda n: (n & -n, -abs(2 * n - low - high)))
