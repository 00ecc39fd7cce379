"""Targets in milliseconds: wanted, measured, and by how much that is off.

python bench/latency_target.py [--only resnet20,decoder] [--share .7 .5] [--runs 3] [--data DIR]

ResNet-20 and a character decoder are compressed to shares of their milliseconds, several times each; then the
result and the original are timed by turns once more, by calls that the choice of widths has not seen: the
median share of two neighbouring calls, which other work disturbs least, the share of the fastest calls, and
how far above the original's fastest call its median is. Beside the first run, what a target of as many MACs
leaves.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import DATA, DataOption, OutOption, ThreadsOption, write
from compress_llm import decoder as trained_decoder
from compress_llm import loss, texts, windows
from rich.console import Console
from rich.table import Table
from subjects import SUBJECTS
from torch import Tensor, nn

import pysolve as ps
from pysolve.nn.batches.samples import samples_in, take
from pysolve.nn.cost.profile import times_of
from pysolve.nn.running import arguments

WINDOWS, SECONDS = 96, 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@dataclass(frozen=True)
class Row:
    """Shares of the original's time that were wanted and measured, and what became of the network."""

    network: str
    wanted: float
    measured: float
    fastest: float
    busy: float
    macs: float
    score: float
    by_macs: tuple[float, float] | None
    note: str


def resnet20(data: Path, out: Path) -> tuple[nn.Module, list[Tensor], Callable[[nn.Module], float]]:
    """Trained on JPEG-recompressed CIFAR-10; accuracy in per cent."""
    subject = SUBJECTS["resnet20"](data, out)
    return subject.model, subject.calibration, subject.accuracy


def decoder(data: Path, _: Path) -> tuple[nn.Module, list[dict[str, Tensor]], Callable[[nn.Module], float]]:
    """Of characters; loss in nats on the last tenth of the text."""
    train, test = texts(data)
    model = trained_decoder(data / "shakespeare_llama")
    return model, windows(train, WINDOWS), lambda one: loss(one, test[::4])


NETWORKS = {"resnet20": resnet20, "decoder": decoder}


def left(model: nn.Module, small: nn.Module, batch: object, count: int) -> tuple[float, float, float]:
    """Median share of neighbouring calls, that of the fastest, and by how much calls were disturbed."""
    while samples_in(batch) < count:
        batch = twice(batch)
    before, after = map(np.array, times_of([model, small], take(batch, 0, count), SECONDS))
    share, fastest = np.median(after / before), after.min() / before.min()
    return float(share), float(fastest), float(np.median(before) / before.min() - 1)


def twice(batch: object) -> object:
    """All samples of a batch two times."""
    args, kwargs = arguments(batch)
    if kwargs:
        return {name: torch.cat([one, one]) for name, one in kwargs.items()}
    return torch.cat([args[0], args[0]])


@app.command()
def main(
    only: Annotated[str, typer.Option(help="Networks.")] = ",".join(NETWORKS),
    share: Annotated[list[float] | None, typer.Option(help="Of the milliseconds.")] = None,
    runs: Annotated[int, typer.Option(help="Of each.")] = 3,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("bench-out"),
) -> None:
    """Compress to shares of the milliseconds, and measure what is left."""
    torch.set_num_threads(threads)
    rows, console = list[Row](), Console()
    for name in only.split(","):
        model, batches, score = NETWORKS[name](data, out)
        console.print(f"{name}: score {score(model):.4g}, load {os.getloadavg()[0]:.1f}")
        for wanted in share or [0.7, 0.5]:
            for run in range(runs):
                small = ps.compress(model, batches, target={"ms": wanted}, progress=False)
                count, macs = small.report.latencies[-1][0].batch_size, small.report.share("macs")
                found = left(model, small.model, batches[0], count)
                same = None
                if run == 0:
                    other = ps.compress(model, batches, target={"macs": macs}, progress=False, latency=False)
                    same = left(model, other.model, batches[0], count)[0], score(other.model)
                rows.append(Row(name, wanted, *found, macs, score(small.model), same, small.report.notes[0]))
                write(out / "latency_target.json", "Targets in milliseconds", threads, rows)
                console.print(f"{found[0] / wanted - 1:+.1%}: {rows[-1].note}")
    table = Table(
        "network", "wanted", "measured", "off", "fastest", "busy", "MACs", "score", "by MACs: ms, score"
    )
    for row in rows:
        off, by_macs = row.measured / row.wanted - 1, row.by_macs or ()
        numbers = (f"{one:.3f}" for one in (row.measured, row.fastest))
        cells = f"{row.wanted:.2f}", *numbers, f"{row.busy:.0%}", f"{row.macs:.2f}", f"{row.score:.4g}"
        table.add_row(
            row.network, *cells[:2], f"{off:+.1%}", *cells[2:], ", ".join(f"{x:.4g}" for x in by_macs)
        )
    console.print(table)


if __name__ == "__main__":
    app()
