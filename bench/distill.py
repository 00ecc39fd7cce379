"""Distillation: accuracy that a compressed network regains without labels, students, and the loop's speed.

python bench/distill.py match [--share 0.5] [--seconds 60,600]
python bench/distill.py students [--seconds 20,60]
python bench/distill.py speed [--steps 120]

match: ResNet-20 by ``ps.compress``, then taught by the original for so many seconds, without labels.
students: 784–128–10 taught by LeNet-5 and by labels alone. speed: steps per processor second beside a loop
of torch that is written out by hand, by turns in the same run. Networks and images come from the folder that
PYSOLVE_DATA or --data names. Every command prints a table in Markdown and writes its rows to a JSON file.
"""

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import common
import torch
import typer
from common import DATA, DataOption, OutOption, ThreadsOption, found
from experiment import fitted, labelled, seeded, show
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax

import pysolve as ps
from pysolve.cli.datasets import cifar, mnist
from pysolve.nn.zoo import Mlp
from pysolve.tables import Table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ROUNDS = 3
# Time from which on it is worth to ask the teacher about all images, mirrored too.
LONG = 300
# Options of ``ps.distill``; None: labels alone, without a teacher.
WAYS: dict[str, dict[str, float] | None] = {
    "labels alone": None,
    "outputs, T = 1": {},
    "outputs, T = 4": {"temperature": 4.0},
    "outputs, T = 4, inputs mixed": {"temperature": 4.0, "mix": 0.3},
    "outputs and labels, T = 4": {"temperature": 4.0, "alpha": 0.7},
}


def recipe(seconds: float) -> dict[str, Any]:
    """Arguments of ``ps.distill`` for so many seconds without labels."""
    steps = {"batch_size": 64, "lr": 2e-3} if seconds >= LONG else {"batch_size": 32, "lr": 1e-3}
    return {"loss": "mse", "frozen": True, "seconds": seconds, **steps}


def training_batches(x: Tensor, seconds: float) -> list[Tensor]:
    """As many images as there is time for, in batches."""
    long = seconds >= LONG
    images = x if long else x[:10_000]
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in images.split(250)]
    return batches + [batch.flip(3) for batch in batches] if long else batches


@app.command()
def match(
    share: Annotated[float, typer.Option(help="Of the multiply-accumulates that may be left.")] = 0.5,
    seconds: Annotated[str, typer.Option(help="How long to teach.")] = "60,600",
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """ResNet-20 compressed, then taught by what it was."""
    torch.set_num_threads(threads)
    subject, rows = found("resnet20", data, out), list[dict[str, Any]]()
    x = torch.from_numpy(cifar(data / "cifar10_jpeg").x_train)

    def note(what: str, model: nn.Module, taken: float, steps: int) -> None:
        row = {"network": what, "accuracy (%)": subject.accuracy(model), "MACs": subject.cost("macs", model)}
        rows.append({**row, "seconds": taken, "steps": steps})
        common.write(out / "distill" / "match.json", subject.title, threads, rows)

    note("original", subject.model, 0.0, 0)
    start = time.perf_counter()
    target = {"macs": share}
    smaller = ps.compress(subject.model, subject.calibration, target=target, progress=False).model
    note("compressed", smaller, time.perf_counter() - start, 0)
    for limit in map(float, seconds.split(",")):
        student, count = copy.deepcopy(smaller).to(memory_format=torch.channels_last), Counter()
        start = time.perf_counter()
        how = {**recipe(limit), "progress": False, "after_step": count}
        ps.distill(student, subject.model, training_batches(x, limit), **how)
        note(f"taught for {limit:g} s", student, time.perf_counter() - start, count.steps)
    show(table(f"{subject.title}, taught without labels, {threads} threads", rows))


class Counter:
    """How many steps were taken."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, done: float) -> None:
        self.steps += 1


@app.command()
def students(
    seconds: Annotated[str, typer.Option(help="How long to train.")] = "20,60",
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """A new 784–128–10, by LeNet-5's outputs and by labels alone."""
    torch.set_num_threads(threads)
    subject, rows = found("lenet", data, out), list[dict[str, Any]]()
    images = mnist(data / "mnist")
    for name, options in WAYS.items():
        row: dict[str, Any] = {"taught by": name}
        for limit in map(float, seconds.split(",")):
            student = new_student()
            how = {"batch_size": 64, "lr": 5e-3, "seconds": limit, "progress": False}
            if options is None:
                fitted(student, images, **how)
            else:
                ps.distill(student, subject.model, labelled(images, 500), **options, **how)
            row[f"after {limit:g} s (%)"] = subject.accuracy(student)
        rows.append(row)
        common.write(out / "distill" / "students.json", "784–128–10 taught by LeNet-5", threads, rows)
    score = subject.accuracy(subject.model)
    show(table(f"784–128–10 taught by LeNet-5 ({score:.2f} %) on MNIST, {threads} threads", rows))


def new_student() -> Mlp:
    return seeded(lambda: Mlp((784, 128, 10)))


@app.command()
def speed(
    steps: Annotated[int, typer.Option(help="In each run; fewer of ResNet-20.")] = 120,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Steps per processor second, teacher and all, beside a bare loop of torch; medians of runs by turns."""
    torch.set_num_threads(threads)
    rows = list[dict[str, Any]]()
    title = f"Steps per processor second in batches of {batch_size}"
    for name, share in (("lenet", 1.0), ("resnet20", 0.05)):
        subject = found(name, data, out)
        student = new_student() if name == "lenet" else copy.deepcopy(subject.model)
        # Four epochs of a few steps.
        few = max(2, round(share * steps / 4))
        x = torch.cat(subject.calibration)[: few * batch_size]
        rows += compared(subject.title, student, subject.model, x, batch_size, 4)
        common.write(out / "distill" / "speed.json", title, threads, rows)
    show(table(f"{title}, {threads} threads", rows))


def compared(
    title: str, student: nn.Module, teacher: nn.Module, x: Tensor, batch_size: int, epochs: int
) -> list[dict[str, Any]]:
    """Both loops with and without what the teacher says being kept."""
    runs: dict[tuple[str, bool], list[float]] = {}
    count = epochs * len(x.split(batch_size))
    for _ in range(ROUNDS):
        for kept in (False, True):
            for name, run in {"by hand": by_hand, "ps.distill": ours}.items():
                network, start = copy.deepcopy(student), time.process_time()
                run(network, teacher, x, batch_size, epochs, kept)
                runs.setdefault((name, kept), []).append(count / (time.process_time() - start))
    return [
        {
            "subject": title,
            "teacher": "asked once" if kept else "asked at every step",
            "by hand": median(runs["by hand", kept]),
            "ps.distill": median(runs["ps.distill", kept]),
            "ratio": median(runs["ps.distill", kept]) / median(runs["by hand", kept]),
        }
        for kept in (False, True)
    ]


def ours(student: nn.Module, teacher: nn.Module, x: Tensor, batch_size: int, epochs: int, kept: bool) -> None:
    ps.distill(
        student, teacher, [x], batch_size=batch_size, epochs=epochs, cache=kept, lr=1e-3, progress=False
    )


def by_hand(
    student: nn.Module, teacher: nn.Module, x: Tensor, batch_size: int, epochs: int, kept: bool
) -> None:
    """A loop as one would write it: shuffled batches, KL of the outputs, Adam."""
    adam = torch.optim.Adam(student.parameters(), lr=1e-3)
    teacher.eval()
    student.train()

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            return softmax(teacher(images), 1)

    answers = torch.cat([answer(part) for part in x.split(250)]) if kept else None
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch_size):
            images = x[rows]
            wanted = answer(images) if answers is None else answers[rows]
            adam.zero_grad()
            kl_div(log_softmax(student(images), 1), wanted, reduction="batchmean").backward()
            adam.step()


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as they are."""
    words = tuple(i for i, value in enumerate(rows[0].values()) if isinstance(value, str))
    lines = [tuple(cell(value) for value in row.values()) for row in rows]
    return Table(title, tuple(rows[0]), tuple(lines), words=words)


def cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return value if isinstance(value, str) else f"{value:,}"


if __name__ == "__main__":
    app()
