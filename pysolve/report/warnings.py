"""Warnings about a compressed network: possible problems and their remedies, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pysolve.correlations import Correlations
from pysolve.plan import Site
from pysolve.report.rows import REST, Latency, LayerMass, LayerReport

# A network is slower when it takes so many times as long as before.
SLOWER = 1.2
# Share of the parameters in layers that cannot shrink that is worth a warning.
PINNED = 0.3
# A fit needs this many samples, or this many rows (samples × positions) per input of a layer: with 256 images
# LeNet-5 loses 0.2 points and ResNet-20 1.3 against 2,000, with 512 nothing measurable.
SAMPLES, ROWS = 500, 4
# Share of a mixture's outputs that is lost with its first expert, from which on experts are not redundant.
NEEDED = 0.05
# Divergence from which on a network is said to be lean at its size: ResNet-20 at 75 % of its MACs, 0.04,
# loses half a point of accuracy, and at half of them, 0.2, four.
FAR = 0.1


def slower(latencies: Sequence[tuple[Latency, Latency]], layers: Sequence[LayerReport] = ()) -> list[str]:
    """Batches that the network takes longer for, by calls of both in turn, and layers timed as slower."""
    timed = [one for one in layers if one.layout != "dense" and one.dense_seconds is not None]
    names = [one.name for one in timed if (one.new_seconds or 0.0) > (one.dense_seconds or 0.0)]
    found = []
    for before, after in latencies:
        # Quartiles: where those of the two overlap, the machine was busy.
        if after.median > SLOWER * before.median and after.low > before.high:
            where = f" (slower alone: {', '.join(names)})" if names else ""
            found.append(
                f"a batch of {after.batch_size} takes {after.median / before.median:.1f} times as long as "
                f"before{where}: try round_to=8 for channels, layout='dense' for single weights, "
                "layout='auto' for factors, or leave layers alone with ignore."
            )
    return found


def pinned(mass: Sequence[LayerMass], sites: Sequence[Site]) -> list[str]:
    """Whether many parameters are in layers that no site can make smaller."""
    free = [site for site in sites if site.pinned is None]
    shrinks = {name for site in free for name in (*site.writers, *site.readers, *site.passed)}
    # Matrices in a parameter of a module, such as experts; of one without a row they are in the last.
    owners, rows = {name.rpartition(".")[0] for name in shrinks if ":" in name}, {one.name for one in mass}
    shrinks |= owners | ({REST} if owners - rows else set())
    stuck = [layer for layer in mass if layer.name not in shrinks and layer.macs]
    share = sum(layer.params for layer in stuck) / max(1, sum(layer.params for layer in mass))
    if share < PINNED:
        return []
    largest = sorted(stuck, key=lambda layer: -layer.params)[:3]
    names = ", ".join(layer.name for layer in largest) + ", …" * (len(stuck) > 3)
    return [
        f"{share:.0%} of the parameters are in layers that cannot shrink ({names}), so the others "
        "account for the whole reduction; inspect says why."
    ]


def few_samples(samples: int, names: Iterable[str], correlations: Mapping[str, Correlations]) -> list[str]:
    """Whether layers were fitted on few samples, and on few rows per input.

    Correlations of these names are held one at a time: on disk they may be more than memory has room for.
    """
    if samples >= SAMPLES:
        return []
    seen = ((name, correlations[name]) for name in names)
    rows = [(name, found.count, len(found.xx)) for name, found in seen]
    poor = [one for one in rows if one[1] / one[2] < ROWS]
    if not poor:
        return []
    worst, count, inputs = min(poor, key=lambda one: one[1] / one[2])
    return [
        f"few samples: {samples} were given, and {worst} was fitted on {count:,.0f} rows for its {inputs:,} "
        f"inputs. Give {SAMPLES} or better 1,000."
    ]


def not_finite(divergence: float) -> list[str]:
    """Whether outputs became NaN or infinite that were numbers before."""
    if math.isfinite(divergence):
        return []
    return [
        f"the divergence on held-out samples is {divergence}: outputs that were numbers are none any more, "
        "as where the network divides by the norm of what became zero. Give a larger target, or leave the "
        "layers before that alone with ignore."
    ]


def lean(divergence: float) -> list[str]:
    """Whether the outputs are far from the original's, and what brings them nearer."""
    if not divergence > FAR:
        return []
    return [
        "this network is lean: at this size its outputs are far from the original's (divergence "
        f"{divergence:.2g}). distill=60 brings them nearer in a minute, without labels; more samples may, "
        "too, and dry_run=True tells what larger targets would cost."
    ]


def needed_experts(lost: Mapping[str, tuple[int, int, float]]) -> list[str]:
    """Mixtures that lost experts though none is redundant.

    ``lost`` has, by the router, how many experts there were, how many stay, and the share of the mixture's
    outputs that the first one takes.
    """
    needed = {name: one for name, one in lost.items() if one[2] > NEEDED}
    if not needed:
        return []
    worst = max(needed, key=lambda name: needed[name][2])
    before, after, share = needed[worst]
    more = f" (and {len(needed) - 1} more)" * (len(needed) > 1)
    return [
        f"the experts of {worst}{more} are not redundant: the first that went takes {share:.0%} of the "
        f"mixture's outputs (E‖y − ŷ‖² / E‖y‖²), and of {before} {after} are left. "
        f"ignore=[{worst!r}] keeps them whole, and lets their neurons go."
    ]
