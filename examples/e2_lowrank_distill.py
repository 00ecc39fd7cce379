"""Distillation and low rank on MNIST, as published, beside ours.

    python examples/e2_lowrank_distill.py --data DIR

1. Teacher conv 32@5×5 – maxpool 5 – fc 128 – fc 10, trained once and kept in teacher.safetensors; student
   784–128–10, from the teacher's outputs as published and ours, in the same number of epochs.
2. fc3 of the MLP of e2_pruning.py (mlp.safetensors) at low rank: by its weights alone, and by what it reads
   of unlabelled training images. Operations for 32 images by the best order of multiplication.

Every figure is printed next to the published one, in Markdown, and drawn (ranks.png).
"""

import os
from pathlib import Path
from typing import Annotated

# Two BLAS threads on two busy cores wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import e2_pruning
import typer
from e2_pruning import first_images, show
from e2_ranks import COUNTS, RANKS, accuracies, draw, ranks_table
from e2_student import RECIPE, SEEDS, students_table, trained_teacher

import pysolve as ps
from pysolve.cli.datasets import Dataset, mnist
from pysolve.cli.demo import threads
from pysolve.nn.evaluate import accuracy

QUICK = {"images": 600, "counts": (100, 600), "epochs": 1, "ranks": 4}
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"), "mnist")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Option(help="Folder with the four MNIST files.")] = DATA,
    out: Annotated[Path, typer.Option(help="Folder for the weights and the picture.")] = Path("results/e2"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the shuffling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few images and ranks, one epoch.")] = False,
) -> None:
    """The whole experiment."""
    try:
        dataset = mnist(data, mean=0.5, std=0.5)
        # More threads wait for each other on a busy machine.
        with threads(1):
            run(first_images(dataset, QUICK["images"]) if quick else dataset, out, seed, quick=quick)
    except (ps.PysolveError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Distil, factor, print and draw."""
    out.mkdir(parents=True, exist_ok=True)
    shorter = {"epochs": QUICK["epochs"]} if quick else {}
    teacher = trained_teacher(dataset, out / "teacher.safetensors", RECIPE | shorter, seed)
    show(students_table(teacher, dataset, RECIPE | shorter, SEEDS[:1] if quick else SEEDS))
    model = e2_pruning.trained(dataset, out / "mlp.safetensors", e2_pruning.RECIPE | shorter, seed)
    ranks, counts = (RANKS[:: QUICK["ranks"]], QUICK["counts"]) if quick else (RANKS, COUNTS)
    scores = {rank: accuracies(model, dataset, rank, counts) for rank in ranks}
    show(ranks_table(model, scores, counts, accuracy(model, dataset.x_test, dataset.y_test)))
    draw(scores, out / "ranks.png")
    typer.echo(f"Wrote {out / 'ranks.png'}")


if __name__ == "__main__":
    app()
