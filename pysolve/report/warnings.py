"""What may be wrong with a compressed network, and what to do about it, in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pysolve.correlations import Correlations
from pysolve.plan import Site
from pysolve.report.rows import LayerMass

# A layer is called slower when it takes so many times as long, and so much of the network's time longer.
SLOWER, MATTERS = 1.2, 0.03
# Share of the parameters in layers that cannot shrink from which that is worth a warning.
PINNED = 0.3
# Samples, and rows (samples × positions) for each input of a layer, of which a fit should have one: with 256
# images LeNet-5 loses 0.2 points and ResNet-20 1.3 against 2,000, with 512 nothing that can be told.
SAMPLES, ROWS = 500, 4


def slower(mass: Sequence[LayerMass]) -> list[str]:
    """Layers that take longer than before."""
    total = sum(layer.seconds or 0.0 for layer in mass)
    found = []
    for layer in mass:
        # What is as it was takes as long as it did, whatever a clock says.
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
    """Whether much of the network is in layers that no site can make smaller."""
    free = [site for site in sites if site.pinned is None]
    shrinks = {name for site in free for name in (*site.writers, *site.readers, *site.passed)}
    stuck = [layer for layer in mass if layer.name not in shrinks and layer.macs]
    share = sum(layer.params for layer in stuck) / max(1, sum(layer.params for layer in mass))
    if share < PINNED:
        return []
    largest = sorted(stuck, key=lambda layer: -layer.params)[:3]
    names = ", ".join(layer.name for layer in largest) + ", …" * (len(stuck) > 3)
    return [
        f"{share:.0%} of the parameters are in layers that cannot shrink ({names}), so the others gave all "
        "that was asked for; inspect says why."
    ]


def few_samples(samples: int, correlations: Mapping[str, Correlations]) -> list[str]:
    """Whether layers were fitted on few samples, and on few rows for their number of inputs."""
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
