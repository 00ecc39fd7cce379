"""Factor layers of trained networks without retraining, beside the selection of channels and torch's routine.

python bench/lowrank.py networks [--only lenet,mnist-cnn,resnet20] [--shares 0.5,0.25] [--costs params,macs]
python bench/lowrank.py ranks [--ranks 80,40,20,10,5,2]
python bench/lowrank.py layers [--sizes 512,1024,2048,4096] [--share 0.0625]

networks: ``ps.low_rank`` beside ``ps.compress`` at the same size, with 2,000 unlabelled images. ranks: each
layer of the perceptron of examples/e2_pruning.py alone. layers: one decomposition of random layers, beside
torch.svd_lowrank in the same run. Images come from the folder that PYSOLVE_DATA or --data names. Every
command prints tables in Markdown and writes its rows to a JSON file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import common
import numpy as np
import torch
import typer
from common import DATA, TIMED_BATCH, DataOption, OutOption, ThreadsOption, found
from decompositions import decomposed
from experiment import show
from subjects import Subject, Target
from torch import nn

import pysolve as ps
from pysolve.nn.evaluate import latency
from pysolve.tables import Table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

METHODS: dict[str, dict[str, str] | None] = {
    "channels (compress)": None,
    "svd, auto": {"method": "svd", "structure": "auto"},
    "activation, channel": {"method": "activation", "structure": "channel"},
    "activation, spatial": {"method": "activation", "structure": "spatial"},
    "activation, auto": {"method": "activation", "structure": "auto"},
}


@dataclass(frozen=True)
class Row:
    """One network, whole or smaller; accuracy is None where the size is out of reach.

    Parameters
    ----------
    network, method : str
    target : {"params" | "macs": float} or None
    accuracy : float or None
        Per cent of the test images.
    parameters, macs : int
    batch_seconds : float
        Median for one batch.
    seconds, cpu_seconds : float
        That it took; on a busy machine the processor's are the ones that repeat.
    """

    network: str
    method: str
    target: Target | None
    accuracy: float | None
    parameters: int
    macs: int
    batch_seconds: float
    seconds: float
    cpu_seconds: float


@app.command("networks")
def compare(
    only: Annotated[str, typer.Option(help="Networks to factor.")] = "lenet,mnist-cnn,resnet20",
    shares: Annotated[str, typer.Option(help="That may be left.")] = "0.5,0.25",
    of: Annotated[str, typer.Option("--costs", help="Of what.")] = "params,macs",
    methods: Annotated[str, typer.Option(help="What their names start with.")] = "channels,svd,activation",
    layout: Annotated[str, typer.Option(help="factored: whether or not it is faster; or auto.")] = "factored",
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Accuracy, latency and seconds of every way at every size."""
    torch.set_num_threads(threads)
    print(f"Threads: {threads}. Layout: {layout}.")
    targets = [{cost: float(share)} for cost in of.split(",") for share in shares.split(",")]
    chosen = [name for name in METHODS if name.startswith(tuple(methods.split(",")))]
    for name in only.split(","):
        subject, rows = found(name, data, out), list[Row]()
        for row in measured(subject, name, chosen, targets, layout):
            rows.append(row)
            common.write(out / "lowrank" / f"{name}.json", subject.title, threads, rows)
        for table in tables(subject, rows, targets):
            show(table)


def measured(
    subject: Subject, network: str, methods: Sequence[str], targets: Sequence[Target], layout: str
) -> Iterator[Row]:
    """The whole network, then every method at every target."""
    yield judged(subject, network, "original", None, lambda: subject.model)
    for method in methods:
        for target in targets:
            yield judged(subject, network, method, target, partial(smaller, subject, method, target, layout))


def smaller(subject: Subject, method: str, target: Target, layout: str) -> nn.Module:
    how = METHODS[method]
    if how is None:
        return ps.compress(subject.model, subject.calibration, target=target, progress=False).model
    return ps.low_rank(
        subject.model, subject.calibration, target=target, layout=layout, progress=False, **how
    ).model


def judged(
    subject: Subject, network: str, method: str, target: Target | None, make: Callable[[], nn.Module]
) -> Row:
    start, cpu = time.perf_counter(), time.process_time()
    try:
        model: nn.Module | None = make()
    except ps.PysolveError:
        model = None
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if model is None:
        return Row(network, method, target, None, 0, 0, 0.0, seconds, cpu)
    score = subject.accuracy(model)
    costs = (subject.cost("params", model), subject.cost("macs", model))
    median = latency(model, subject.x_test[:TIMED_BATCH], repeats=20).median
    return Row(network, method, target, score, *costs, median, seconds, cpu)


def tables(subject: Subject, rows: Sequence[Row], targets: Sequence[Target]) -> Iterator[Table]:
    """Accuracies, and times for a batch, at every target."""
    sizes = [f"{share:.0%} of {cost}" for target in targets for cost, share in target.items()]
    whole, *others = rows
    by_place = {(row.method, *one_of(row.target)): row for row in others}
    scores = [("original", *[f"{whole.accuracy:.2f}"] * len(sizes), "")]
    times = [("original", *[f"{1e3 * whole.batch_seconds:.1f}"] * len(sizes))]
    for method in dict.fromkeys(row.method for row in others):
        own = [by_place[method, *one_of(target)] for target in targets]
        cells = ["out of reach" if row.accuracy is None else f"{row.accuracy:.2f}" for row in own]
        scores.append((method, *cells, f"{np.mean([row.cpu_seconds for row in own]):.1f}"))
        times.append(
            (method, *("" if not row.parameters else f"{1e3 * row.batch_seconds:.1f}" for row in own))
        )
    yield Table(
        f"{subject.title}: test accuracy (%), not retrained", ("", *sizes, "CPU seconds"), tuple(scores)
    )
    yield Table(f"{subject.title}: ms for {TIMED_BATCH} images", ("", *sizes), tuple(times))


def one_of(target: Target | None) -> tuple[str, float]:
    ((cost, share),) = (target or {"": 1.0}).items()
    return cost, share


@app.command()
def ranks(
    wanted: Annotated[str, typer.Option("--ranks", help="Of each layer alone.")] = "80,40,20,10,5,2",
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Layers of the perceptron, one at a time: accuracy by weights alone and by what they read."""
    torch.set_num_threads(threads)
    subject, rows = found("mlp", data, out), list[dict[str, object]]()
    for layer in [name for name, _ in subject.model.named_children()][:-1]:
        for rank in map(int, wanted.split(",")):
            row: dict[str, object] = {"layer": layer, "rank": rank}
            for method in ("svd", "activation"):
                batches = None if method == "svd" else subject.calibration
                how = {"rank": {layer: rank}, "method": method, "layout": "factored", "progress": False}
                start = time.process_time()
                model = ps.low_rank(subject.model, batches, **how).model
                row[f"{method} CPU seconds"] = time.process_time() - start
                row[method] = subject.accuracy(model)
            rows.append(row)
            common.write(out / "lowrank" / "ranks.json", subject.title, threads, rows)
    heads = ("layer", "rank", "svd", "activation", "svd CPU seconds", "activation CPU seconds")
    lines = [
        (str(row["layer"]), str(row["rank"]), *(f"{row[head]:.2f}" for head in heads[2:])) for row in rows
    ]
    dense = subject.accuracy(subject.model)
    show(
        Table(
            f"{subject.title}, {dense:.2f} %: one layer at low rank, test accuracy (%)", heads, tuple(lines)
        )
    )


@app.command()
def layers(
    sizes: Annotated[str, typer.Option(help="Inputs and outputs.")] = "512,1024,2048,4096",
    share: Annotated[float, typer.Option(help="Rank over size.")] = 1 / 32,
    threads: ThreadsOption = 1,
    out: OutOption = Path("results"),
) -> None:
    """Seconds and errors of one decomposition, beside torch's randomised one of the same matrix."""
    torch.set_num_threads(threads)
    rows = list[dict[str, object]]()
    for size in map(int, sizes.split(",")):
        rows.append(decomposed(size, max(1, round(share * size))))
        common.write(out / "lowrank" / "layers.json", f"Layers at {share:.3g} of full rank", threads, rows)
    heads = tuple(rows[0])
    lines = [tuple(f"{value:,.4g}" for value in row.values()) for row in rows]
    show(
        Table(f"Random layers at {share:.3g} of full rank, {threads} threads", heads, tuple(lines), words=())
    )


if __name__ == "__main__":
    app()
