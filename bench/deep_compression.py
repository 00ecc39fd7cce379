"""Networks in files of so many bytes: ``ps.deep_compress`` beside torch and zlib, nothing trained on labels.

python bench/deep_compression.py [--only lenet,lenet-300-100,resnet20,speed] [--retrain SECONDS]

For each network, with 2,000 unlabelled images: the nearest of 16 means in a file of zlib's and in one of
pysolve's, 16 values in the metric of what layers read, and targets of bytes; beside each target the smallest
weights made zero, as many in every layer, the others at the nearest of 16 means, in pysolve's file. With
--retrain, each target also with so many seconds of matching the original's outputs on the same images.
speed: writing and reading files. Images and ResNet-20 come from the folder that PYSOLVE_DATA or --data names;
prints tables in Markdown and writes rows to JSON files.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from coded_peers import BITS, coded, make_sparse, zeros_of, zipped
from coded_speed import speed_table, speeds
from common import DATA, DataOption, OutOption, ThreadsOption, found
from experiment import file_bytes, show
from subjects import Subject
from torch import nn

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import nbytes
from pysolve.tables import Table

# How many times smaller than the tensors.
SMALLER = {"lenet": (39, 100, 200), "lenet-300-100": (40, 100, 200), "resnet20": (8, 16)}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Row:
    """A network in one file.

    Parameters
    ----------
    method : str
    smaller : float, optional
        How many times fewer bytes than the original's tensors were asked for.
    bytes : int
        On disk.
    ratio, accuracy : float
        Of the original's tensors to the file; per cent of the test images.
    seconds, cpu_seconds : float
        On a busy machine the processor's are the ones that repeat.
    """

    method: str
    smaller: float | None
    bytes: int
    ratio: float
    accuracy: float
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, eq=False)
class Trial:
    """One network on its way through all methods."""

    subject: Subject
    smaller: Sequence[float]
    retrain: float
    rows: list[Row] = field(default_factory=list)

    def judged(
        self, method: str, run: Callable[[nn.Module], Compressed | int], smaller: float | None = None
    ) -> Compressed | int:
        """Result of a method on a copy of the network, once measured; with ints the copy is the network."""
        model = copy.deepcopy(self.subject.model)
        start, cpu = time.perf_counter(), time.process_time()
        result = run(model)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        network, size = (model, result) if isinstance(result, int) else (result.model, file_bytes(result))
        score = self.subject.accuracy(network)
        ratio = nbytes(self.subject.model) / size
        self.rows.append(Row(method, smaller, size, ratio, score, seconds, cpu))
        return result


@app.command(help=__doc__)
def main(
    only: Annotated[str, typer.Option(help="Networks, and speed.")] = ",".join((*SMALLER, "speed")),
    retrain: Annotated[float, typer.Option(help="Seconds; 0: not at all.")] = 0.0,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Bytes, accuracy and seconds of every method on each network; megabytes a second of files."""
    torch.set_num_threads(threads)
    names = only.split(",")
    if unknown := set(names) - {*SMALLER, "speed"}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(SMALLER)}, speed.")
    print(f"Threads: {threads}. Load of the machine: {os.getloadavg()[0]:.1f}.")
    for name in names:
        measure(name, threads, retrain, data, out)


def measure(name: str, threads: int, retrain: float, data: Path, out: Path) -> None:
    """Print and keep one part."""
    title, rows = "", list[Any]()
    if name == "speed":
        parts, path = speeds(found("lenet", data, out).model), out / "deep" / "speed.json"
    else:
        parts = tried(found(name, data, out), name, retrain)
        path = out / "deep" / f"{name}{'-retrained' if retrain else ''}.json"
    for title, rows in parts:
        common.write(path, title, threads, rows)
    show(speed_table(rows) if name == "speed" else table(title, rows))


def tried(subject: Subject, name: str, retrain: float) -> Iterator[tuple[str, list[Row]]]:
    """Every method on one network, with all rows so far."""
    trial = Trial(subject, SMALLER[name], retrain)
    trial.judged("original", nbytes)
    trial.judged(f"nearest of {2**BITS} means, zlib", zipped)
    trial.judged(f"nearest of {2**BITS} means, pysolve's file", coded)
    trial.judged(f"quantize, {2**BITS} values in the metric", partial(in_metric, subject))
    yield subject.title, trial.rows
    for smaller in trial.smaller:
        result = trial.judged("deep_compress", partial(within, subject, smaller, 0), smaller)
        yield subject.title, trial.rows
        if retrain:
            name = f"deep_compress, {retrain:g} s of training"
            trial.judged(name, partial(within, subject, smaller, retrain), smaller)
        zeros = zeros_of(subject.model, result.model)
        trial.judged("magnitude, as many zeros", partial(by_magnitude, zeros), smaller)
        yield subject.title, trial.rows


def within(subject: Subject, smaller: float, retrain: float, model: nn.Module) -> Compressed:
    batches, target = subject.calibration, 1 / smaller
    return ps.deep_compress(model, batches, target={"bytes": target}, distill=retrain, progress=False)


def in_metric(subject: Subject, model: nn.Module) -> Compressed:
    return ps.quantize(model, subject.calibration, scheme="codebook", bits=BITS, progress=False)


def by_magnitude(zeros: dict[str, float], model: nn.Module) -> Compressed:
    make_sparse(model, zeros)
    return coded(model)


def table(title: str, rows: Sequence[Row]) -> Table:
    head = ("asked for", "method", "bytes", "times smaller", "accuracy", "change", "seconds", "CPU seconds")
    lines = []
    for row in rows:
        asked = f"1/{row.smaller:g}" if row.smaller else ""
        score = (f"{row.accuracy:.2f}", f"{row.accuracy - rows[0].accuracy:+.2f}")
        sizes = (f"{row.bytes:,}", f"{row.ratio:.1f}")
        lines.append((asked, row.method, *sizes, *score, f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}"))
    return Table(f"{title}: files, and accuracy on the test images (%)", head, tuple(lines), words=(0, 1))


if __name__ == "__main__":
    app()
