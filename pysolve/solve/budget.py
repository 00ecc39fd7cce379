"""What a network costs as a function of the channels that its sites keep, and the sizes to choose from."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pysolve.errors import one_of, whole
from pysolve.plan import Array, Indices

MEASURES = ("params", "macs", "bytes")
# What targets may name; milliseconds are measured, not counted, and only where a target names them.
TARGETS = (*MEASURES, "ms")


@dataclass(frozen=True, eq=False)
class Costs:
    """Cost of a network as a function of k_s, the channels that each of its S sites keeps.

    With K_s channels in site s now, layer l is then as wide as

        out_l = outputs_l − Σ_s rows_ls (K_s − k_s),    in_l = inputs_l − Σ_s columns_ls (K_s − k_s),

    and measure m (parameters, multiply-accumulates of one sample, bytes) of the network is

        cost_m(k) = constant_m + Σ_l (product_ml out_l in_l + per_output_ml out_l + per_input_ml in_l)
                    + gradient_m · k + ½ kᵀ hessian_m k .

    ``channels`` (S,) is K; ``rows`` and ``columns`` (L, S) are the output and input channels of a layer that
    belong to one channel of a site; ``product``, ``per_output`` and ``per_input`` (3, L) have a row a
    measure, in the order of ``MEASURES``. ``added`` (3,) is the part of ``constant`` (3,) that the network
    does not have yet, such as biases that it will be given; ``layers`` are the layers' names. ``gradient``
    (3, S) and ``hessian`` (3, S, S), symmetric, are of what belongs to no layer, as attention does.

    With ``measures`` beyond ``MEASURES``, milliseconds, the arrays have one more row. Kernels take as long
    for some widths as for wider ones: ``seen[s]`` (K_s + 1,), not falling, are the channels that k_s counts
    as in that last row.
    """

    channels: Indices
    outputs: Array
    inputs: Array
    rows: Array
    columns: Array
    product: Array
    per_output: Array
    per_input: Array
    constant: Array
    added: Array = field(default_factory=lambda: np.zeros(len(MEASURES)))
    layers: tuple[str, ...] = ()
    gradient: Array = field(default_factory=lambda: np.zeros(0))
    hessian: Array = field(default_factory=lambda: np.zeros(0))
    measures: tuple[str, ...] = MEASURES
    seen: Sequence[Array] = ()

    def __post_init__(self) -> None:
        M, S = len(self.measures), len(self.channels)
        for name, shape in (("gradient", (M, S)), ("hessian", (M, S, S))):
            if not getattr(self, name).size:
                object.__setattr__(self, name, np.zeros(shape))

    @property
    def original(self) -> dict[str, float]:
        """Every measure of the network as it is, to which shares refer."""
        now = self.cost(self.channels)
        return {measure: now[measure] - float(self.added[m]) for m, measure in enumerate(self.measures)}

    def tied(self, groups: Sequence[Sequence[int]]) -> Costs:
        """The costs as a function of one k for each group of sites, which keep equally many."""
        one = np.zeros((len(self.channels), len(groups)))
        for g, group in enumerate(groups):
            one[list(group), g] = 1.0
        return replace(
            self,
            channels=self.channels[[group[0] for group in groups]],
            rows=self.rows @ one,
            columns=self.columns @ one,
            gradient=self.gradient @ one,
            hessian=one.T @ self.hessian @ one,
            seen=[np.mean([self.seen[s] for s in group], axis=0) for group in groups] if self.seen else (),
        )

    def cost(self, kept: npt.ArrayLike) -> dict[str, float]:
        """Every measure when site s keeps ``kept[s]`` channels."""
        k = np.asarray(kept)
        total = self._cost(k)
        if self.seen:
            total[-1] = self._cost(self.as_seen(k))[-1]
        return dict(zip(self.measures, total.tolist(), strict=True))

    def as_seen(self, kept: Array) -> Array:
        """(S,) channels that these count as in the last row."""
        return np.array([row[int(k)] for row, k in zip(self.seen, kept, strict=True)])

    def _cost(self, k: Array) -> Array:
        removed = self.channels - k
        out, into = self.outputs - self.rows @ removed, self.inputs - self.columns @ removed
        total = self.constant + self.product @ (out * into) + self.per_output @ out + self.per_input @ into
        found: Array = total + (self.gradient + 0.5 * self.hessian @ k) @ k
        return found

    def expansion(self) -> tuple[Array, Array, Array]:
        """(3,), (3, S) and (3, S, S) arrays c, g and H with  cost_m(k) = c_m + g_m·k + ½ kᵀ H_m k ."""
        out, into = self.outputs - self.rows @ self.channels, self.inputs - self.columns @ self.channels
        by_out, by_in = self.product * into + self.per_output, self.product * out + self.per_input
        both = self.rows.T @ (self.product[:, :, None] * self.columns)
        return (
            self.constant + by_out @ out + self.per_input @ into,
            by_out @ self.rows + by_in @ self.columns + self.gradient,
            both + both.swapaxes(1, 2) + self.hessian,
        )


def check_targets(targets: object) -> None:
    """TypeError or ValueError unless targets name measures, and for each a share or an integer."""
    if not isinstance(targets, Mapping):
        raise TypeError(f'targets are like {{"params": 0.5}}, got {type(targets).__name__}.')
    if not targets:
        raise ValueError(f"targets names no measure: expected one or more of {', '.join(TARGETS)}.")
    for measure, value in targets.items():
        one_of("measure", measure, TARGETS)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"the target for {measure} must be a number, got {type(value).__name__}.")
        if not 0 < value < sys.float_info.max or (value > 1 and value != int(value) and measure != "ms"):
            number = "a number" if measure == "ms" else "an integer"
            raise ValueError(
                f"the target for {measure} must be a share in (0, 1] or {number} above 1, got {value}."
            )


def limits_of(costs: Costs, targets: Mapping[str, float]) -> tuple[list[str], Array]:
    """The measures that targets name, and their limits in absolute numbers."""
    check_targets(targets)
    original = costs.original
    limits = [float(v) * original[m] if v <= 1 else float(v) for m, v in targets.items()]
    return list(targets), np.array(limits)


def site_sizes(
    costs: Costs, curves: Sequence[npt.ArrayLike], least: int = 1, round_to: int = 1
) -> tuple[list[Array], list[Array]]:
    """Sizes that each site may have, and their divergences.

    ``curves[s]`` (K_s + 1,) has the divergence increase with 0 … K_s kept channels of site s, infinite where
    that is not allowed; taken as not rising with k. Sizes are multiples of ``round_to`` from ``least`` on, or
    all channels of a site.
    """
    least, round_to = whole("least", least, 0), whole("round_to", round_to)
    if len(curves) != len(costs.channels):
        raise ValueError(f"expected one curve for each of {len(costs.channels)} sites, got {len(curves)}.")
    sizes, divergences = [], []
    for s, channels in enumerate(costs.channels.tolist()):
        curve, k = np.asarray(curves[s], dtype=float), np.arange(channels + 1)
        if curve.shape != k.shape:
            raise ValueError(
                f"curve {s} must have {channels + 1} values, for 0 … {channels} channels, "
                f"got an array of shape {curve.shape}."
            )
        if np.isnan(curve).any() or not np.isfinite(curve[-1]):
            raise ValueError(f"curve {s} must hold numbers, and a finite one for all its channels.")
        fine = (k >= min(least, channels)) & ((k % round_to == 0) | (k == channels)) & np.isfinite(curve)
        sizes.append(k[fine].astype(float))
        divergences.append(np.maximum.accumulate(curve[fine][::-1])[::-1])
    return sizes, divergences


def unreachable(measure: str, limit: float, smallest: float, original: float) -> str:
    """Message for a target below the cost of the smallest sizes."""

    def figure(cost: float) -> str:
        number = f"{cost:,.0f}" if cost >= 10 or cost == int(cost) else f"{cost:.2g}"
        return f"{number} ({100 * cost / original:.3g} %)" if original else number

    return (
        f"{measure} cannot go below {figure(smallest)}, what the smallest allowed sizes cost, but the target "
        f"is {figure(limit)}: raise it, or allow smaller sizes."
    )
