"""Targets in milliseconds: wanted, measured, and by how much that is off.

python bench/latency_target.py [--only resnet20,decoder] [--share .7 .5] [--runs 3] [--data DIR]

ResNet-20 and a character decoder are compressed to shares of their milliseconds, several times each; then the
result and the original are timed by turns once more, by calls that the choice of widths has not seen: the
fastest of each (what the choice goes by) and the medians. Beside each, for the first run, the same by a
target of as many MACs as that result has left.
"""

import os
from collections.abc import Callable
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
from pysolve.nn.profile import times_of
from pysolve.nn.running import arguments
from pysolve.nn.samples import samples_in, take

WINDOWS, SECONDS = 96, 2.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


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
    """Share of the fastest calls and of the medians, and what the original's median is above its fastest."""
    while samples_in(batch) < count:
        batch = twice(batch)
    before, after = times_of([model, small], take(batch, 0, count), SECONDS)
    return (
        min(after) / min(before),
        float(np.median(after) / np.median(before)),
        float(np.median(before) / min(before) - 1),
    )


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
    rows, console = [], Console()
    for name in only.split(","):
        model, batches, score = NETWORKS[name](data, out)
        console.print(f"{name}: score {score(model):.4g}, load {os.getloadavg()[0]:.1f}")
        head = (
            "wanted",
            "run",
            "measured",
            "off",
            "by medians",
            "busy",
            "score",
            "MACs",
            "same MACs: ms",
            "score",
        )
        table = Table(*head, title=name)
        for wanted in share or [0.7, 0.5]:
            for run in range(runs):
                small = ps.compress(model, batches, target={"ms": wanted}, progress=False)
                report = small.report
                count = report.latencies[-1][0].batch_size
                fastest, median, busy = left(model, small.model, batches[0], count)
                cells = [f"{wanted:.2f}", f"{run + 1}", f"{fastest:.3f}", f"{fastest / wanted - 1:+.1%}"]
                cells += [
                    f"{median:.3f}",
                    f"{busy:.0%}",
                    f"{score(small.model):.4g}",
                    f"{report.share('macs'):.2f}",
                ]
                if run == 0:
                    target = {"macs": report.share("macs")}
                    other = ps.compress(model, batches, target=target, progress=False, latency=False)
                    slower, _, _ = left(model, other.model, batches[0], count)
                    cells += [f"{slower:.3f}", f"{score(other.model):.4g}"]
                table.add_row(*cells)
                rows.append(
                    {"network": name, **dict(zip(head[:8], cells, strict=False)), "notes": report.notes}
                )
                write(out / "latency_target.json", "Targets in milliseconds", threads, rows)
                console.print(" | ".join(cells), report.notes[0])
        console.print(table)


if __name__ == "__main__":
    app()
