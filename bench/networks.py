"""Compress trained networks with 2,000 unlabelled images, beside torch-pruning at the same size.

python bench/networks.py compare [--only lenet,resnet20,mnist-cnn] [--methods pysolve,torch-pruning]
python bench/networks.py depth [--depths 20,32,56]

Real networks and images come from the folder that PYSOLVE_DATA or --data names. Nothing is trained on labels:
accuracies stand right after compression, and with --match SECONDS also after so many seconds of matching the
original's outputs on the same images. One JSON file is written a network, row by row.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import common
import torch
import typer
from common import DATA, TIMED_BATCH, DataOption, OutOption, ThreadsOption, found
from experiment import terminal_table
from pruners import Compressor
from pruners import contenders as peers
from rich.console import Console
from rich.table import Table
from subjects import CALIBRATION, Subject, Target, with_norms
from torch import nn

import pysolve as ps
from pysolve.cli.datasets import cifar
from pysolve.nn.evaluate import latency, macs
from pysolve.nn.running import evaluating
from pysolve.nn.zoo import ResNet

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, width=120)


@dataclass(frozen=True)
class Row:
    """One network, whole or compressed: accuracy in per cent of the test images, costs, and seconds taken."""

    method: str
    target: Target | None
    accuracy: float
    parameters: int
    macs: int
    batch_seconds: float
    seconds: float


@app.command()
def compare(
    only: Annotated[str, typer.Option(help="Networks to compress.")] = "lenet,resnet20,mnist-cnn",
    methods: Annotated[
        str, typer.Option(help="Contenders: what their names start with.")
    ] = "pysolve,torch-pruning",
    match_seconds: Annotated[float, typer.Option("--match", help="Match the original so long, too.")] = 0.0,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Accuracy, size, speed and time of each contender on each network."""
    torch.set_num_threads(threads)
    for name in only.split(","):
        subject = found(name, data, out)
        path = out / "networks" / f"{name}.json"
        rows: list[Row] = []
        for row in measured(subject, tuple(methods.split(",")), match_seconds):
            rows.append(row)
            common.write(path, subject.title, threads, rows)
            console.out(f"  {subject.title}: {row.method}, {row.accuracy:.2f} %, {row.seconds:.1f} s")
        console.print(comparison(subject, rows))
        console.out(f"Wrote {path}")


def measured(subject: Subject, methods: tuple[str, ...], match_seconds: float) -> Iterator[Row]:
    """The whole network, then what every contender makes of it at every target."""
    yield judged(subject, "original", None, subject.model, 0.0)
    contenders: dict[str, Compressor] = {"pysolve": compressed, **peers(subject)}
    runs = {name: run for name, run in contenders.items() if name.startswith(methods)}
    for target in subject.targets:
        for name, run in runs.items():
            start = time.perf_counter()
            smaller = run(subject, target)
            seconds = time.perf_counter() - start
            yield judged(subject, name, target, smaller, seconds)
            if match_seconds:
                student = copy.deepcopy(smaller)
                how = {"loss": "mse", "batch_size": 32, "mix": 0.5, "frozen": True, "seconds": match_seconds}
                ps.distill(student, subject.model, subject.calibration, **how, progress=False)
                yield judged(subject, f"{name}, then matched", target, student, seconds + match_seconds)


def compressed(subject: Subject, target: Target) -> nn.Module:
    return ps.compress(subject.model, subject.calibration, target=target, progress=False).model


def judged(subject: Subject, method: str, target: Target | None, model: nn.Module, seconds: float) -> Row:
    return Row(
        method=method,
        target=target,
        accuracy=subject.accuracy(model),
        parameters=subject.cost("params", model),
        macs=subject.cost("macs", model),
        batch_seconds=latency(model, subject.x_test[:TIMED_BATCH], repeats=20).median,
        seconds=seconds,
    )


def comparison(subject: Subject, rows: list[Row]) -> Table:
    whole = rows[0]
    head = ("", "accuracy (%)", "parameters", "MACs", f"ms for {TIMED_BATCH} images", "seconds taken")
    table = terminal_table(subject.title, head)
    before: Target | None = None
    for one in rows:
        if one.target is not None and one.target != before:
            table.add_section()
            table.add_row(*(f"[bold]{share:.1%} of the {what}" for what, share in one.target.items()))
        before = one.target
        table.add_row(
            one.method,
            f"{one.accuracy:.2f}",
            f"{one.parameters:,} ({one.parameters / whole.parameters:6.1%})",
            f"{one.macs:,} ({one.macs / whole.macs:6.1%})",
            f"{1e3 * one.batch_seconds:.1f}",
            f"{one.seconds:.1f}",
        )
    return table


@app.command()
def depth(
    depths: Annotated[str, typer.Option(help="Of the residual networks.")] = "20,32,56",
    share: Annotated[float, typer.Option(help="Of the multiply-accumulates that may be left.")] = 0.5,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """How the time of a compression grows with the network: residual networks of random weights."""
    torch.set_num_threads(threads)
    images = torch.from_numpy(cifar(data / "cifar10_jpeg", train=CALIBRATION).x_train).split(250)
    head = ("depth", "MACs", "one pass over the images (s)", "compression (s)", "passes", "s a million MACs")
    table = terminal_table(f"Residual networks of random weights to {share:.0%} of their MACs", head)
    rows: list[dict[str, object]] = []
    for number in map(int, depths.split(",")):
        rows.append(timed_compression(number, list(images), share))
        common.write(out / "networks" / "depth.json", str(table.title), threads, rows)
        table.add_row(
            *(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in rows[-1].values())
        )
    console.print(table)


def timed_compression(number: int, images: list[torch.Tensor], share: float) -> dict[str, float | int]:
    torch.manual_seed(0)
    model = with_norms(ResNet(number), images[:2]).eval()
    start = time.perf_counter()
    with evaluating(model):
        for batch in images:
            model(batch)
    forward, start = time.perf_counter() - start, time.perf_counter()
    ps.compress(model, images, target={"macs": share}, progress=False)
    seconds, cost = time.perf_counter() - start, macs(model, images[0][:1])
    return {
        "depth": number,
        "macs": cost,
        "pass_seconds": forward,
        "seconds": seconds,
        "passes": seconds / forward,
        "seconds_per_million_macs": 1e6 * seconds / cost,
    }


if __name__ == "__main__":
    app()
