"""Warnings about a compressed network: possible problems and their remedies, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pysolve.correlations import Correlations
from pysolve.plan import Site
from pysolve.report.rows import LayerMass

# A layer is slower when it takes this many times as long, and this share of the network's time longer.
SLOWER, MATTERS = 1.2, 0.03
# Share of the parameters in layers that cannot shrink that is worth a warning.
PINNED = 0.3
# A fit needs this many samples, or this many rows (samples × positions) per input of a layer: with 256 images
# LeNet-5 loses 0.2 points and ResNet-20 1.3 against 2,000, with 512 nothing measurable.
SAMPLES, ROWS = 500, 4


def slower(mass: Sequence[LayerMass]) -> list[str]:
    """Layers that take longer than before."""
    total = sum(layer.seconds or 0.0 for layer in mass)
    found = []
    for layer in mass:
        # Differences in the times of unchanged layers are noise.
        if layer.seconds is None or layer.seconds_left is None or layer.macs == layer.macs_left:
            continue
        if layer.seconds_left > max(SLOWER * layer.seconds, layer.seconds + MATTERS * total):
            found.append(
                f"{layer.name} takes {layer.seconds_left / layer.seconds:.1f} times as long as before: leave "
                "it alone with ignore, or try round_to=8 for channels, layout='dense' for single weights, "
                "layout='auto' for factors."
            )
    return found


def pinned(mass: Sequence[LayerMass], sites: Sequence[Site]) -> list[str]:
    """Whether many parameters are in layers that no site can make smaller."""
    free = [site for site in sites if site.pinned is None]
    shrinks = {name for site in free for name in (*site.writers, *site.readers, *site.passed)}
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


def few_samples(samples: int, correlations: Mapping[str, Correlations]) -> list[str]:
    """Whether layers were fitted on few samples, and on few rows per input."""
    if samples >= SAMPLES:
        return []
    rows = {name: found.count / len(found.xx) for name, found in correlations.items()}
    poor = {name: share for name, share in rows.items() if share < ROWS}
    if not poor:
        return []
    worst = min(poor, key=poor.__getitem__)
    count, inputs = correlations[worst].count, len(correlations[worst].xx)
    return [
        f"few samples: {samples} were given, and {worst} was fitted on {count:,.0f} rows for its {inputs:,} "
        f"inputs. Give {SAMPLES} or better 1,000."
    ]
