"""Distillation and low rank on MNIST, as published, beside ours.

    python examples/e2_lowrank_distill.py --data DIR

1. Teacher conv 32@5×5 – maxpool 5 – fc 128 – fc 10, trained once and kept in teacher.safetensors; student
   784–128–10, from the teacher's outputs as published and ours, in the same number of epochs.
2. fc3 of the MLP of e2_pruning.py (mlp.safetensors) at low rank: by its weights alone, and by what it reads
   of unlabelled training images. Operations for 32 images by the best order of multiplication.

Every figure is printed next to the published one, in Markdown, and drawn (ranks.png).
"""

from pathlib import Path

import experiment
from e2_pruning import read, trained
from e2_ranks import COUNTS, RANKS, accuracies, draw, ranks_table
from e2_student import RECIPE, SEEDS, students_table, trained_teacher
from experiment import score, show

from pysolve.cli.datasets import Dataset

QUICK = {"images": 600, "counts": (100, 600), "epochs": 1, "ranks": 4}


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Distil, factor, print and draw."""
    recipe = RECIPE | ({"epochs": QUICK["epochs"]} if quick else {})
    teacher = trained_teacher(dataset, out / "teacher.safetensors", recipe, seed)
    show(students_table(teacher, dataset, recipe, SEEDS[:1] if quick else SEEDS))
    model = trained(dataset, out / "mlp.safetensors", seed, quick=quick)
    ranks, counts = (RANKS[:: QUICK["ranks"]], QUICK["counts"]) if quick else (RANKS, COUNTS)
    scores = {rank: accuracies(model, dataset, rank, counts) for rank in ranks}
    show(ranks_table(model, scores, counts, score(model, dataset)))
    draw(scores, out / "ranks.png")
    show(f"Wrote {out / 'ranks.png'}")


app = experiment.script(run, read, out="e2", few=QUICK["images"])


if __name__ == "__main__":
    app()
