"""What compress costs on large networks: operations, bytes and passes, and seconds on several machines.

python bench/cost_model.py [--out DIR]

For n rows (samples × positions) of a layer with d inputs and h outputs, k of them kept, and P operations of a
pass over the data:

    gather     P + Σ n d²                        products of inputs, once for layers that read the same
    eliminate  5 Σ d³                            in double precision, on hosts: every size of every site
    measure    ½ P · probes · samples of each / samples     divergences, from the changed layer on
    refit      2 P + Σ n (k² + k d) + Σ (k³ / 3 + h k²)      the walk through both networks, and 2 P for
                                                 weights of rows where words are predicted

Sums take 8 d (d + h) bytes a layer. Rates of the two-core machine are measured (bench/scale.py); those of
other machines are assumed, so their seconds are extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import typer
from common import OutOption, write

from pysolve.nn.gathering.memory import in_bytes
from pysolve.tables import Table, as_markdown

app = typer.Typer(add_completion=False, help=__doc__)
# Sizes that each site is measured at first, and with the one that is chosen; rows of outputs that the first
# share, at most, and in passes; the fewest rows and samples of one; the share of the samples in the selection
# set, and its most; and of long texts, from how many words on, the fewest words.
FIRST, PROBES, SHARED, PASSES, LEAST_ROWS, LEAST, HELD, MOST = 2, 3, 32768, 4, 48, 4, 1 / 12, 256
LONG, LEAST_WORDS = 256, 512
# Share of the inputs that stays.
KEPT = 0.7


@dataclass(frozen=True)
class Reader:
    """Layers alike: inputs, outputs, positions of a sample, how many, and whether channels can go."""

    inputs: int
    outputs: int
    positions: int
    count: int = 1
    site: bool = True


@dataclass(frozen=True)
class Network:
    """A network by its layers, its samples, and outputs and further operations of each."""

    readers: tuple[Reader, ...]
    samples: int
    outputs: int = 1
    further: float = 0.0

    @property
    def one_pass(self) -> float:
        """Operations of a pass over all samples."""
        each = sum(2 * r.inputs * r.outputs * r.positions * r.count for r in self.readers)
        return self.samples * (each + self.further)


@dataclass(frozen=True)
class Machine:
    """Operations a second: of a pass, of sums, and of double precision on the host, over all of it."""

    forward: float
    sums: float
    double: float


def decoder(layers: int, width: int, inner: int, key: int, words: int, tokens: int) -> tuple[Reader, ...]:
    return (
        Reader(width, width + 2 * key, tokens, layers, site=False),
        Reader(width, width, tokens, layers),
        Reader(width, 2 * inner, tokens, layers, site=False),
        Reader(inner, width, tokens, layers),
        Reader(width, words, tokens, 1, site=False),
    )


def residual() -> tuple[Reader, ...]:
    """ResNet-50: 1 × 1, 3 × 3, 1 × 1 in four stages."""
    found = []
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        found += [
            Reader(4 * width, width, side**2, blocks, site=False),
            Reader(9 * width, width, side**2, blocks),
            Reader(width, 4 * width, side**2, blocks),
        ]
    return tuple(found)


def encoder(layers: int, width: int, inner: int, tokens: int) -> tuple[Reader, ...]:
    return (
        Reader(width, 3 * width, tokens, layers, site=False),
        Reader(width, width, tokens, layers),
        Reader(width, inner, tokens, layers, site=False),
        Reader(inner, width, tokens, layers),
    )


NETWORKS = {
    "BERT of MiniLM's shape, 1,024 × 32 tokens": Network(encoder(6, 384, 1536, 32), 1024),
    "ResNet-50, 1,024 images": Network(residual(), 1024),
    "ViT-B/16, 1,024 images": Network(encoder(12, 768, 3072, 197), 1024),
    "BERT-base, 1,024 × 128 tokens": Network(encoder(12, 768, 3072, 128), 1024),
    "decoder of 1.1 billion, 64 × 2,048": Network(decoder(22, 2048, 5632, 256, 32000, 2048), 64, 2048),
    "decoder of 8 billion, 64 × 2,048": Network(decoder(32, 4096, 14336, 1024, 128256, 2048), 64, 2048),
}
# The first is measured. GPUs: bfloat16 passes at 40 % of 800 TFLOP/s, sums at 60 % of 50; a host: 16 cores.
MACHINES = {
    "two cores": Machine(170e9, 150e9, 100e9),
    "1 GPU": Machine(320e12, 30e12, 1e12),
    "8 GPUs": Machine(8 * 320e12, 8 * 30e12, 2e12),
    "64 GPUs": Machine(64 * 320e12, 64 * 30e12, 16e12),
}


def operations(network: Network) -> dict[str, tuple[float, float, float]]:
    """Of every stage: operations of passes, of sums, and of double precision on the host."""
    sums = eliminated = crossed = fitted = sites = 0.0
    for r in network.readers:
        n, d, k = network.samples * r.positions, r.inputs, KEPT * r.inputs
        rows = min(n, 60 * d)
        crossed += r.count * rows * (k * k + (k * d if d < r.outputs else k * r.outputs))
        fitted += r.count * (k**3 / 3 + r.outputs * k * k)
        if r.site:
            sums += r.count * rows * d * d
            eliminated += r.count * 5 * d**3
            sites += r.count
    shared = min(SHARED / network.outputs, PASSES * network.samples)
    least = max(LEAST, LEAST_ROWS / network.outputs)
    if network.outputs >= LONG:
        least = ceil(LEAST_WORDS / network.outputs)
    each = max(least, shared / (FIRST * sites))
    share = 0.5 * PROBES * sites * min(each, HELD * network.samples, MOST) / network.samples
    whole = network.one_pass
    return {
        "gather": (whole, sums, 0.0),
        "eliminate": (0.0, 0.0, eliminated),
        "measure": (share * whole, 0.0, 0.0),
        "refit": ((4 if network.outputs > 1 else 2) * whole, crossed, fitted),
    }


def seconds(network: Network, machine: Machine) -> dict[str, float]:
    """Of every stage."""
    rates = (machine.forward, machine.sums, machine.double)
    return {
        stage: sum(one / rate for one, rate in zip(parts, rates, strict=True))
        for stage, parts in operations(network).items()
    }


def table() -> Table:
    """Seconds of every network on every machine."""
    rows = []
    for name, network in NETWORKS.items():
        held = [8 * r.inputs * (r.inputs + r.outputs) for r in network.readers if r.site]
        every = sum(8 * r.count * r.inputs * (r.inputs + r.outputs) for r in network.readers if r.site)
        for place, machine in MACHINES.items():
            found = seconds(network, machine)
            stages = (*found.values(), sum(found.values()))
            spent = [f"{one:,.0f}" if one >= 10 else f"{one:.1f}" for one in stages]
            rows.append((name, in_bytes(every), in_bytes(max(held)), place, *spent))
    heads = ("", "sums", "the largest", "on", "gather", "eliminate", "measure", "refit", "seconds")
    return Table("", heads, tuple(rows), words=(0, 3))


@app.command()
def main(out: OutOption = Path("scale")) -> None:
    """Print the table."""
    found = table()
    typer.echo("\n".join(as_markdown(found)))
    write(out / "cost_model.json", "cost model", 0, [list(row) for row in found.rows])


if __name__ == "__main__":
    app()
