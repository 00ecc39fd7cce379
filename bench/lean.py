"""Accuracy of networks that were designed to be small: where it is lost, and what each remedy gives back.

python bench/lean.py train [--only lean,lean-gated]
python bench/lean.py losses [--only lean] [--shares 0.75,0.5]

Inverted residuals with depthwise convolutions, batch norms and ReLU6, and the same with hard-swish and
squeeze-and-excitation, trained on the 25,000 JPEG-recompressed CIFAR-10 images. ``networks.py compare --only
lean`` has them beside torch-pruning.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import common
import torch
import typer
from common import DATA, DataOption, OutOption, ThreadsOption, found
from experiment import terminal_table
from rich.console import Console
from subjects import CALIBRATION, Subject, with_norms
from torch import nn

import pysolve as ps
from pysolve.nn.divergence import kl_divergence, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, width=120)

OnlyOption = Annotated[str, typer.Option(help="Networks.")]


@dataclass(frozen=True)
class Row:
    """One network at one share of the MACs: accuracy and agreement in per cent of the test images.

    ``expected`` is the sum of the divergences of single sites, as the report has it.
    """

    share: float
    what: str
    accuracy: float
    agreement: float
    divergence: float
    expected: float | None = None


@app.command()
def train(
    only: OnlyOption = "lean,lean-gated",
    threads: ThreadsOption = 2,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Train the networks, which are kept in lean/ of --out."""
    torch.set_num_threads(threads)
    for name in only.split(","):
        subject = found(name, data, out)
        console.out(f"  {subject.title}: {subject.accuracy(subject.model):.2f} %")


@app.command()
def losses(
    only: OnlyOption = "lean",
    shares: Annotated[str, typer.Option(help="Of the multiply-accumulates that may be left.")] = "0.75,0.5",
    threads: ThreadsOption = 1,
    data: DataOption = DATA,
    out: OutOption = Path("results"),
) -> None:
    """Where accuracy is lost: channels alone, refits, batch norms, samples, and prices that do not add up."""
    torch.set_num_threads(threads)
    for name in only.split(","):
        subject, rows = found(name, data, out), list[Row]()
        head = ("MACs", "", "accuracy (%)", "agreement (%)", "divergence", "expected")
        table = terminal_table(subject.title, head, words=("",))
        for share in map(float, shares.split(",")):
            for row in measured(subject, share):
                rows.append(row)
                expected = "" if row.expected is None else f"{row.expected:.3f}"
                figures = (f"{row.accuracy:.2f}", f"{row.agreement:.2f}", f"{row.divergence:.3f}", expected)
                table.add_row(f"{row.share:.0%}", row.what, *figures)
                common.write(out / "lean" / f"{name}-losses.json", subject.title, threads, rows)
        console.print(table)


def measured(subject: Subject, share: float) -> Iterator[Row]:
    """The same target with parts of the method left out, with fewer samples, and with norms anew."""

    def made(images: int = CALIBRATION, **options: object) -> ps.Compressed:
        batches = list(torch.cat(subject.calibration)[:images].split(250))
        return ps.compress(subject.model, batches, target={"macs": share}, progress=False, **options)

    whole = made()
    yield judged(subject, share, "all of it", whole)
    yield judged(subject, share, "sizes and channels alone, weights as they were", made(refit="none"))
    yield judged(subject, share, "and biases", made(refit="bias"))
    yield judged(subject, share, "and readers on the original's inputs", made(refit="independent"))
    yield judged(
        subject, share, "all of it, and batch norms anew", with_norms(whole.model, subject.calibration)
    )
    yield judged(subject, share, 'select="sensitivity"', made(select="sensitivity"))
    for images in (500, 1000):
        yield judged(subject, share, f"{images:,} images", made(images))
    for seconds in (10, 60):
        yield judged(subject, share, f"and {seconds} s of matching", made(distill=seconds))


def judged(subject: Subject, share: float, what: str, result: ps.Compressed | nn.Module) -> Row:
    model = result if isinstance(result, nn.Module) else result.model
    batches = list(torch.from_numpy(subject.x_test).split(500))
    outputs = [torch.cat([*run(one, batches)]) for one in (subject.model, model)]
    same = (outputs[0].argmax(1) == outputs[1].argmax(1)).double().mean().item()
    predicted = (
        None if isinstance(result, nn.Module) else [site.predicted or 0.0 for site in result.report.sites]
    )
    return Row(
        share,
        what,
        subject.accuracy(model),
        100 * same,
        kl_divergence(*outputs).item(),
        None if predicted is None else sum(predicted),
    )


if __name__ == "__main__":
    app()
