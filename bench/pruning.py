"""Prune trained networks by every method of ``ps.prune``, beside the peers; nothing is retrained.

python bench/pruning.py methods [--only lenet,mlp] [--kinds weights,patterns,channels]
python bench/pruning.py sweep [--size 4096] [--blas 1,2]
python bench/pruning.py surgery [--amount 0.985] [--seconds 840]

methods: LeNet-5 and the perceptron of examples/e2_pruning.py on MNIST, with 2,000 unlabelled images. sweep:
optimal brain surgeon over the columns of one large layer, each time in a process of its own. surgery: dynamic
network surgery on LeNet-5, with labels. Images come from the folder that PYSOLVE_DATA or --data names. Every
command prints a table in Markdown and writes its rows to a JSON file.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import common
import numpy as np
import torch
import typer
from common import DATA, DataOption, OutOption, ThreadsOption, found
from experiment import file_bytes, loader, show
from pruned import Way, make_permanent, of_channels, of_patterns, of_weights
from subjects import Subject

import pysolve as ps
from pysolve.cli.datasets import mnist
from pysolve.compressed import Compressed
from pysolve.layer.layer_problem import layer_problem
from pysolve.layer.searches import Zeros, sweep
from pysolve.nn.cost.nonzeros import nonzeros
from pysolve.tables import Table

# Shares of the weights that are removed, and of the parameters that are left.
GONE, LEFT = (0.5, 0.8, 0.9, 0.95), (0.5, 0.25)
# At which files are compared.
FILES = {"weights": 0.9, "patterns": 0.5, "channels": 0.25}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@dataclass(frozen=True)
class Row:
    """One network, pruned.

    Parameters
    ----------
    network, kind, method : str
    share : float
        Of the weights that are removed, or of the parameters that are left.
    accuracy : float
        Per cent of the test images.
    nonzeros : int
        Parameters that are not zero.
    seconds, cpu_seconds : float
        That pruning took; on a busy machine the processor's are the ones that repeat.
    file, plain_file : int
        Bytes on disk, as it comes out and with masks made permanent.
    """

    network: str
    kind: str
    method: str
    share: float
    accuracy: float
    nonzeros: int
    seconds: float
    cpu_seconds: float
    file: int
    plain_file: int


@app.command()
def methods(
    only: Annotated[str, typer.Option(help="Networks to prune.")] = "lenet,mlp",
    kinds: Annotated[str, typer.Option(help="Weights, patterns, channels.")] = ",".join(FILES),
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Accuracy, seconds and file size of every method."""
    torch.set_num_threads(threads)
    print(f"Threads: {threads}.")
    for name in only.split(","):
        subject = found(name, data, out)
        rows: list[Row] = []
        for kind in kinds.split(","):
            for row in measured(subject, name, kind):
                rows.append(row)
                common.write(out / "pruning" / f"{name}.json", subject.title, threads, rows)
            show(table(subject, [row for row in rows if row.kind == kind], kind))


def measured(subject: Subject, network: str, kind: str) -> Iterator[Row]:
    """The whole network, then every method at every share."""
    shares = LEFT if kind == "channels" else GONE
    if kind == "patterns":
        ways, shares = of_patterns(), (0.5,)
    else:
        ways = of_channels(subject) if kind == "channels" else of_weights()
    whole = Way("original", lambda subject, share: subject.model)
    yield judged(subject, network, kind, whole, FILES[kind])
    for way in ways:
        for share in shares:
            yield judged(subject, network, kind, way, share)


def judged(subject: Subject, network: str, kind: str, way: Way, share: float) -> Row:
    start, cpu = time.perf_counter(), time.process_time()
    result = way.run(subject, share)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model, first = result.model if isinstance(result, Compressed) else result, file_bytes(result)
    make_permanent(model)
    score = subject.accuracy(model)
    files = (first, file_bytes(result))
    return Row(network, kind, way.name, share, score, nonzeros(model).nonzeros, seconds, cpu, *files)


def table(subject: Subject, rows: Sequence[Row], kind: str) -> Table:
    """A row for every method: accuracies at every share, time, and files at one of them."""
    shares = sorted({row.share for row in rows[1:]}, reverse=kind == "channels")
    at = FILES[kind]
    head = (
        "method",
        *(f"{share:.0%}" for share in shares),
        "CPU seconds",
        f"kB at {at:.0%}",
        "masks removed",
    )
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.share: row for row in rows if row.method == method}
        cells = [f"{own[share if share in own else at].accuracy:.2f}" for share in shares]
        mean = np.mean([row.cpu_seconds for row in own.values()])
        sizes = [f"{size / 1e3:,.0f}" for size in (own[at].file, own[at].plain_file)]
        lines.append((method, *cells, f"{mean:.1f}", sizes[0], sizes[1] * (sizes[1] != sizes[0])))
    what = "parameters left" if kind == "channels" else "zeros"
    return Table(f"{subject.title}: {kind}, test accuracy (%) at shares of {what}", head, tuple(lines))


@app.command("sweep")
def sweeps(
    size: Annotated[int, typer.Option(help="Inputs and outputs of the layer.")] = 4096,
    blas: Annotated[str, typer.Option(help="BLAS threads.")] = "1,2",
    out: OutOption = Path("results"),
) -> None:
    """Half of a large layer's weights, column by column: seconds and memory."""
    rows = []
    for threads in map(int, blas.split(",")):
        command = [sys.executable, __file__, "one-sweep", str(size)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
        answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"threads": threads, **json.loads(answer.stdout)})
        common.write(out / "pruning" / "sweep.json", f"{size} x {size}, half of it zero", threads, rows)
    lines = tuple(tuple(f"{value:.3g}" for value in row.values()) for row in rows)
    heads = tuple(name.replace("_", " ") for name in rows[0])
    show(Table(f"{size} x {size} at 50 % zeros, method='sweep'", heads, lines, words=()))


@app.command("one-sweep", hidden=True)
def one_sweep(size: int) -> None:
    """One call in a process of its own; peak memory above its inputs, in matrices of the layer's size."""
    rng = np.random.default_rng(0)
    W, x = rng.standard_normal((size, size)), rng.standard_normal((size, size // 8))
    R = x @ x.T
    R /= size // 8
    R.ravel()[:: size + 1] += 0.1
    del x
    # From here on the kernel's high-water mark counts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    pruned = ps.obs_prune(W, R, amount=0.5, method="sweep")
    row = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    row |= {"matrices": (memory("VmHWM") - before) / W.nbytes, "error": pruned.error}
    del pruned
    start = time.process_time()
    problem = layer_problem(W, R)
    row["setup_cpu"] = time.process_time() - start
    start = time.process_time()
    _, M = sweep(problem, Zeros(size**2 // 2))
    row["sweep_cpu"] = time.process_time() - start
    row["refit_cpu"] = row["cpu_seconds"] - row["setup_cpu"] - row["sweep_cpu"]
    row["error_without_refit"] = problem.error(M)
    print(json.dumps(row))


def memory(what: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


@app.command()
def surgery(
    amount: Annotated[float, typer.Option(help="Share of the weights that is removed.")] = 0.985,
    seconds: Annotated[float, typer.Option(help="How long to train.")] = 840.0,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    threads: ThreadsOption = 2,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Dynamic network surgery on LeNet-5, with labels."""
    torch.set_num_threads(threads)
    subject, images = found("lenet", data, out), mnist(data / "mnist")
    start = time.perf_counter()
    result = ps.network_surgery(
        subject.model, loader(images), amount=amount, seconds=seconds, lr=lr, layout="dense", progress=False
    )
    taken, counts = time.perf_counter() - start, nonzeros(result.model)
    score = subject.accuracy(result.model)
    row = {"amount": amount, "accuracy": score, "parameters": counts.nonzeros}
    row |= {"times_fewer": counts.rate, "seconds": taken, "kilobytes": file_bytes(result) / 1e3}
    common.write(out / "pruning" / "surgery.json", "Dynamic network surgery, LeNet-5", threads, [row])
    lines = (tuple(f"{value:,.4g}" for value in row.values()),)
    title = f"Dynamic network surgery of LeNet-5 on MNIST, {threads} threads"
    show(Table(title, tuple(name.replace("_", " ") for name in row), lines, words=()))


if __name__ == "__main__":
    app()
