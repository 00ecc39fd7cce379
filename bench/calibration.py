"""Compress trained networks with few calibration samples, and with samples of the wrong kind.

python bench/calibration.py counts [--only lenet,resnet20] [--counts 32,64,…] [--draws 3]
python bench/calibration.py kinds
python bench/calibration.py matching [--counts 500,2000] [--shown 16000]

Real networks and images come from the folder that PYSOLVE_DATA or --data names. Counts: random images of
the training split, drawn anew with other seeds where there are at most 1,000. Kinds: 2,000 inputs each for
LeNet-5. Matching: ResNet-20, with and without distillation on the same number of images shown, some of them
more often when there are fewer. Every command prints a table in Markdown and writes its rows to a JSON file.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
import typer
from networks import DATA, DataOption, OutOption, ThreadsOption, found, write
from rich.console import Console
from subjects import CALIBRATION, Subject

from pysolve.cli.datasets import Images, cifar, mnist
from pysolve.methods.compress import made
from pysolve.methods.goal import Options
from pysolve.methods.kinds.channels import Channels
from pysolve.methods.price import price, probe
from pysolve.methods.result import distance
from pysolve.methods.sizes import Sized, within
from pysolve.methods.studied import studied
from pysolve.methods.study import Clock, Study
from pysolve.methods.tasks import cuts_of
from pysolve.nn.evaluate import accuracy
from pysolve.nn.layer_matrix import channels, taps
from pysolve.tables import Table, as_markdown

TARGETS = {"lenet": {"params": 0.1}, "resnet20": {"macs": 0.5}}
# Training images that subsets are drawn from.
POOL = 10_000
# Subsets of at most so many images are drawn several times.
SMALL = 1000
BATCH = 250

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, width=150)


@dataclass(frozen=True)
class Row:
    """One compression: what it was given, and what became of the network.

    Parameters
    ----------
    network : str
    given : str
        The calibration data, in words.
    draw : int
        Seed of the subset.
    accuracy : float
        Per cent of the test images.
    divergence : float
        Of the outputs for the test images from the original's.
    told : float
        The same as the report has it, on samples held out from all choices.
    samples, held : int
        That layers were fitted on, and that the report is measured on.
    rows : float
        Rows (samples × positions) for each input that a layer keeps, of the layer that loses inputs and has
        the fewest.
    layer : str
        That layer.
    warned : bool
        Whether the report warns of few samples.
    """

    network: str
    given: str
    draw: int
    accuracy: float
    divergence: float
    told: float
    samples: int
    held: int
    rows: float
    layer: str
    warned: bool


@app.command()
def counts(
    only: Annotated[str, typer.Option(help="Networks to compress.")] = ",".join(TARGETS),
    counts: Annotated[str, typer.Option(help="Calibration images.")] = "32,64,128,256,512,1000,2000,4000",
    draws: Annotated[int, typer.Option(min=1, help="Subsets of each count up to 1,000.")] = 3,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Accuracy against the number of calibration images."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    for name in only.split(","):
        subject, pool = found(name, data, out), pool_of(name, data)
        for count in map(int, counts.split(",")):
            for draw in range(draws if count <= SMALL else 1):
                images = drawn(pool, count, draw)
                rows.append(compressed(subject, images, name, f"{count:,} images", draw))
                record(out / "calibration" / "counts.json", threads, rows)
    console.print("\n".join(as_markdown(table(rows))))


@app.command()
def kinds(threads: ThreadsOption = 1, data: DataOption = DATA, out: OutOption = Path("results")) -> None:
    """Accuracy of LeNet-5 with calibration data of the wrong kind."""
    torch.set_num_threads(threads)
    subject = found("lenet", data, out)
    rows: list[Row] = []
    for given, images in wrong_kinds(data):
        rows.append(compressed(subject, images, "lenet", given, 0))
        record(out / "calibration" / "kinds.json", threads, rows)
    console.print("\n".join(as_markdown(table(rows))))


@app.command()
def matching(
    counts: Annotated[str, typer.Option(help="Calibration images.")] = "500,2000",
    shown: Annotated[int, typer.Option(help="Images to match the original's outputs on, in all.")] = 16_000,
    draws: Annotated[int, typer.Option(min=1, help="Subsets of each count.")] = 1,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """What distillation adds on ResNet-20, by the number of calibration images."""
    torch.set_num_threads(threads)
    subject, pool = found("resnet20", data, out), pool_of("resnet20", data)
    rows: list[Row] = []
    for count in map(int, counts.split(",")):
        for draw in range(draws):
            for epochs in (0, shown // count):
                given = f"{count:,} images" + f", matched for {epochs} epochs" * bool(epochs)
                images = drawn(pool, count, draw)
                rows.append(compressed(subject, images, "resnet20", given, draw, epochs))
                record(out / "calibration" / "matching.json", threads, rows)
    console.print("\n".join(as_markdown(table(rows))))


def pool_of(name: str, data: Path) -> Images:
    """Training images to draw from."""
    if name == "lenet":
        return mnist(data / "mnist").x_train[:POOL].copy()
    return cifar(data / "cifar10_jpeg", train=POOL).x_train


def drawn(pool: Images, count: int, draw: int) -> Images:
    """Random images; a larger count has those of a smaller one in it."""
    return pool[np.random.default_rng(draw).permutation(len(pool))[:count]]


def wrong_kinds(data: Path) -> Iterator[tuple[str, Images]]:
    """2,000 inputs for LeNet-5: the right ones first, then those of each mistake, in words."""
    digits = mnist(data / "mnist")
    right = drawn(digits.x_train[:POOL], CALIBRATION, 0)
    yield "MNIST, as trained on", right
    clothes = mnist(data / "fashion-mnist", mean=0.2860, std=0.3530)
    yield "Fashion-MNIST", drawn(clothes.x_train[:POOL], CALIBRATION, 0)
    rng = np.random.default_rng(0)
    noise = right.mean() + right.std() * rng.standard_normal(right.shape, np.float32)
    yield "Gaussian noise of the same mean and variance", noise
    yield "MNIST, pixels from 0 to 1", 0.1307 + 0.3081 * right
    yield "MNIST, pixels from 0 to 255", 255 * (0.1307 + 0.3081 * right)
    yield "MNIST, the digit 3 alone", digits.x_train[digits.y_train == 3][:CALIBRATION]


def compressed(subject: Subject, images: Images, name: str, given: str, draw: int, epochs: int = 0) -> Row:
    """``ps.compress`` in its steps, to see what layers were fitted on."""
    batches = torch.from_numpy(images).split(BATCH)
    target = TARGETS[name]
    clock, known = Clock(), studied(subject.model, batches, Options(progress=False), sites=True)
    where = probe(known, len(known.free))
    sizes = within(known, price(known, [Channels().menu(known, s) for s in known.free], where), target, where)
    length: dict[str, object] = {"epochs": epochs} if epochs else {}
    result = made(subject.model, known, sizes, clock, target, "sequential", length, None)
    rows = rows_per_input(known, sizes)
    worst = min(rows, key=rows.__getitem__)
    report, test = result.report, torch.from_numpy(subject.x_test).split(BATCH)
    row = Row(
        network=name,
        given=given,
        draw=draw,
        accuracy=accuracy(result.model, subject.x_test, subject.y_test),
        divergence=distance(subject.model, result.model, test),
        told=report.divergence,
        samples=report.samples,
        held=report.held,
        rows=rows[worst],
        layer=worst,
        warned=any(text.startswith("few samples") for text in report.warnings),
    )
    console.out(f"  {name}, {given}, draw {draw}: {row.accuracy:.2f} %")
    return row


def rows_per_input(known: Study, sizes: Sized) -> dict[str, float]:
    """Rows for each input that is kept, of all layers that lose some."""
    cuts = cuts_of(sizes.keep, known.layers)
    found = {}
    for name, sums in known.correlations.items():
        layer = known.layers[name].module
        if name in cuts and len(cuts[name].inputs) < channels(layer)[0]:
            found[name] = sums.count / (len(cuts[name].inputs) * taps(layer))
    return found


def record(path: Path, threads: int, rows: Sequence[Row]) -> None:
    """All rows so far in a JSON file."""
    write(path, str(__doc__).partition("\n")[0], threads, [asdict(row) for row in rows])


def table(rows: Sequence[Row]) -> Table:
    """Means over draws, with the lowest and the highest accuracy."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row.network, row.given), []).append(row)
    head = (
        "network",
        "given",
        "accuracy",
        "lowest",
        "highest",
        "divergence",
        "told",
        "fitted on",
        "held out",
    )
    more = ("rows a kept input", "warned")
    return Table("", (*head, *more), tuple(map(cells, together.values())), words=(0, 1, 10))


def cells(draws: Sequence[Row]) -> tuple[str, ...]:
    """One row of the table from draws of one size."""
    scores, first = [row.accuracy for row in draws], draws[0]
    ends = (min(scores), max(scores)) if len(draws) > 1 else ()
    return (
        first.network,
        first.given,
        f"{np.mean(scores):.2f}",
        *([f"{end:.2f}" for end in ends] or ["", ""]),
        f"{np.mean([row.divergence for row in draws]):.4f}",
        f"{np.mean([row.told for row in draws]):.4f}",
        f"{first.samples:,}",
        f"{first.held:,}",
        f"{first.rows:.2f} ({first.layer})",
        "yes" if first.warned else "",
    )


if __name__ == "__main__":
    app()
