"""Number of channels that each site keeps under a limit on the cost of the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pysolve.errors import PysolveError, one_of
from pysolve.plan import Array, Indices
from pysolve.solve.knapsack import Knapsack, pack, solve

MEASURES = ("params", "macs", "bytes")


@dataclass(frozen=True, eq=False)
class Costs:
    """Cost of a network as a function of k_s, the channels that each of its S sites keeps.

    With K_s channels in site s now, layer l is then as wide as

        out_l = outputs_l − Σ_s rows_ls (K_s − k_s),    in_l = inputs_l − Σ_s columns_ls (K_s − k_s),

    and measure m (parameters, multiply-accumulates of one sample, bytes) of the network is

        cost_m(k) = constant_m + Σ_l (product_ml out_l in_l + per_output_ml out_l + per_input_ml in_l) .

    Parameters
    ----------
    channels : (S,) int array
        K.
    outputs, inputs : (L,) array
        Widths of the layers now.
    rows, columns : (L, S) array
        Output and input channels of a layer that belong to one channel of a site.
    product, per_output, per_input : (3, L) array
        One row a measure, in the order of ``MEASURES``.
    constant : (3,) array
    added : (3,) array
        The part of this that the network does not have yet, such as biases that it will be given.
    layers : tuple of str
        Names of the layers.
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

    @property
    def original(self) -> dict[str, float]:
        """Every measure of the network as it is, to which shares refer."""
        now = self.cost(self.channels)
        return {measure: now[measure] - float(self.added[m]) for m, measure in enumerate(MEASURES)}

    def cost(self, kept: npt.ArrayLike) -> dict[str, float]:
        """Every measure when site s keeps ``kept[s]`` channels."""
        removed = self.channels - np.asarray(kept)
        out, into = self.outputs - self.rows @ removed, self.inputs - self.columns @ removed
        total = self.constant + self.product @ (out * into) + self.per_output @ out + self.per_input @ into
        return dict(zip(MEASURES, total.tolist(), strict=True))

    def expansion(self) -> tuple[Array, Array, Array]:
        """(3,), (3, S) and (3, S, S) arrays c, g and H with  cost_m(k) = c_m + g_m·k + ½ kᵀ H_m k ."""
        out, into = self.outputs - self.rows @ self.channels, self.inputs - self.columns @ self.channels
        by_out, by_in = self.product * into + self.per_output, self.product * out + self.per_input
        both = self.rows.T @ (self.product[:, :, None] * self.columns)
        return (
            self.constant + by_out @ out + self.per_input @ into,
            by_out @ self.rows + by_in @ self.columns,
            both + both.swapaxes(1, 2),
        )


def allocate(
    costs: Costs,
    curves: Sequence[npt.ArrayLike],
    targets: Mapping[str, float],
    *,
    least: int = 1,
    round_to: int = 1,
) -> Indices:
    """Number of channels that each site keeps, for the least divergence of a network within its targets.

    Seeks  min_k Σ_s curves[s][k_s]  subject to  cost_m(k) ≤ target_m  for each measure m of the targets.

    Channels are removed where the divergence, on the lower convex hulls of the curves, rises least per cost
    saved at the widths reached so far (a channel saves in its writers and in its readers, so sites interact),
    and restored while they fit; then sites exchange channels in pairs while the sum falls. Optimal for up to
    two sites of up to 64 sizes; on random networks of 3 or 4 small sites less than 1 % above the optimum on
    average.

    Parameters
    ----------
    costs : Costs
    curves : sequence of (K_s + 1,) arrays
        Divergence increase with 0 … K_s kept channels of site s; infinite where that is not allowed. Taken as
        not rising with k: fewer channels have at least the divergence of more.
    targets : {"params", "macs" or "bytes": number}
        Up to 1: a share of the original network's; above: the integer itself. All of them hold.
    least : int
        Channels that every site keeps at least, or all that it has.
    round_to : int
        Sizes are multiples of this, or all channels of a site.

    Returns
    -------
    (S,) int array
        No site can have its next size without breaking a target. So one target is used to within 1 % when
        no such step costs more than 1 % of any; a step is ``round_to`` channels where curves are finite.

    Raises
    ------
    PysolveError
        When even the smallest allowed sizes cost more than a target: tells how much.
    ValueError, TypeError
        For targets, curves or options that are not as described.
    """
    rows, limits = limits_of(costs, targets)
    least, round_to = _integer("least", least, 0), _integer("round_to", round_to, 1)
    sizes, divergences = site_sizes(costs, curves, least, round_to)
    smallest = costs.cost([row[0] for row in sizes])
    for measure, limit in zip(rows, limits, strict=True):
        if smallest[measure] > limit:
            raise PysolveError(unreachable(measure, limit, smallest[measure], costs.original[measure]))
    which = [MEASURES.index(measure) for measure in rows]
    parts = (part[which] for part in costs.expansion())
    return solve(Knapsack(*pack(sizes, divergences), limits, *parts)).astype(np.intp)


def check_targets(targets: object) -> None:
    """TypeError or ValueError unless targets name measures, and for each a share or an integer."""
    if not isinstance(targets, Mapping):
        raise TypeError(f'targets are like {{"params": 0.5}}, got {type(targets).__name__}.')
    if not targets:
        raise ValueError(f"targets names no measure: expected one or more of {', '.join(MEASURES)}.")
    for measure, value in targets.items():
        one_of("measure", measure, MEASURES)
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"the target for {measure} must be a number, got {type(value).__name__}.")
        if not 0 < value < np.inf or (value > 1 and value != int(value)):
            raise ValueError(
                f"the target for {measure} must be a share in (0, 1] or an integer above 1, got {value}."
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
    """Sizes that each site may have, and their divergences."""
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


def _integer(name: str, value: object, smallest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}.")
    if value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value}.")
    return int(value)


def unreachable(measure: str, limit: float, smallest: float, original: float) -> str:
    """Message for a target below the cost of the smallest sizes."""

    def figure(cost: float) -> str:
        number = f"{cost:,.0f}" if cost >= 10 or cost == int(cost) else f"{cost:.2g}"
        return f"{number} ({100 * cost / original:.3g} %)" if original else number

    return (
        f"{measure} cannot go below {figure(smallest)}, what the smallest allowed sizes cost, but the target "
        f"is {figure(limit)}: raise it, or allow smaller sizes."
    )
