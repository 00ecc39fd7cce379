"""What a GPU does: checks, then a decoder of 1.1 billion random parameters to 70 % of its MACs.

python bench/device.py [--device cuda] [--shape 1.1b] [--sequences 64] [--length 2048] [--out DIR]

Made to run in six minutes on one large GPU: sums, refits and divergences on the device beside the host's,
then seconds by stage and the most memory at any time.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import OutOption, write
from decoder import SHAPES, Shape, decoder, tokens

import pysolve as ps

app = typer.Typer(add_completion=False, help=__doc__)


def check(device: str) -> list[dict[str, object]]:
    """Sums and a compressed network of a small decoder, on the device and on the host."""
    shape = Shape(2, 64, 256, 4, words=500)
    model, batches = decoder(shape), tokens(shape, 64, 32)
    studies = [ps.study(model, batches, device=one, progress=False) for one in (None, device)]
    here, there = (one.correlations for one in studies)
    sums = max(float(np.linalg.norm(here[n].xx - there[n].xx) / np.linalg.norm(here[n].xx)) for n in here)
    found = [
        ps.compress(model, batches, target={"macs": 0.7}, device=one, progress=False)
        for one in (None, device)
    ]
    lost = [one.report.divergence for one in found]
    typer.echo(f"sums differ by {sums:.1e}; divergence {lost[0]:.3e} on the host, {lost[1]:.3e} on {device}")
    if sums > 1e-4 or lost[1] > 1.2 * lost[0] + 1e-6:
        typer.echo("Error: the device's results are not the host's.", err=True)
        raise typer.Exit(1)
    return [{"case": "check", "sums": sums, "host": lost[0], "device": lost[1]}]


@app.command()
def main(
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cuda",
    shape: Annotated[str, typer.Option(help="Of the decoder: " + ", ".join(SHAPES))] = "1.1b",
    sequences: Annotated[int, typer.Option(help="To calibrate on.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    memory: Annotated[str | None, typer.Option(help="Bound of the host's memory.")] = None,
    out: OutOption = Path("device"),
) -> None:
    """Check, then compress."""
    rows = check(device)
    write(out / "device.json", "device", torch.get_num_threads(), rows)
    sizes = SHAPES[shape]
    model = decoder(sizes, torch.bfloat16)
    batches = tokens(sizes, sequences, length, batch=1)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = ps.compress(
        model, batches, target={"macs": 0.7}, device=device, memory=memory, latency=False, progress=False
    )
    seconds = time.perf_counter() - start
    row = {
        "case": shape,
        "params": sum(one.numel() for one in model.parameters()),
        "tokens": sequences * length,
        "seconds": seconds,
        "stages": dict(result.report.seconds),
        "macs": result.report.after["macs"] / result.report.before["macs"],
        "divergence": result.report.divergence,
        "device_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "notes": result.report.notes,
    }
    typer.echo("\n".join(f"{name}: {value}" for name, value in row.items()))
    write(out / "device.json", "device", torch.get_num_threads(), [*rows, row])


if __name__ == "__main__":
    app()
