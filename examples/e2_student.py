"""A convolutional teacher and a student of one hidden layer: as published, and ours in as many epochs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from experiment import adam, kept, labelled, score, seeded
from torch import Tensor, nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import parameters
from pysolve.nn.running import evaluating
from pysolve.nn.zoo import Mlp
from pysolve.tables import Table

RECIPE = {"epochs": 5, "batch_size": 64, "lr": 1e-3}
SEEDS = (0, 1, 2)
# Published: accuracies, and seconds for the test set.
TEACHER, STUDENT = ("98.53", "1.61"), ("96.34", "1.09")


@dataclass(frozen=True)
class Way:
    """One way to train the student: its name, the published accuracy, and options of ``distill``."""

    name: str
    published: str
    options: Mapping[str, object]


PUBLISHED = {"lr": 1e-3, "schedule": "constant"}
OURS = {"lr": 5e-3, "temperature": 4.0}
WAYS = (
    Way("student, labels alone", "", {**PUBLISHED, "alpha": 0.0}),
    Way("student, labels alone, one-cycle", "", {"lr": 5e-3, "alpha": 0.0}),
    Way("student, as published", STUDENT[0], PUBLISHED),
    Way("student, ours", "", OURS),
    Way("student, ours with labels, too", "", {**OURS, "alpha": 0.7}),
)


def conv_teacher() -> nn.Sequential:
    """conv 32@5×5 – maxpool 5 – fc 128 – fc 10."""
    ends = (nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(5), *ends)


def small_student() -> Mlp:
    return Mlp((784, 128, 10))


def trained_teacher(dataset: Dataset, path: Path, recipe: Mapping[str, float], seed: int) -> nn.Module:
    """The teacher, trained with labels as published, or from ``path``."""
    return kept(conv_teacher, dataset, path, recipe, seed, train=adam)


def distilled(
    teacher: nn.Module,
    dataset: Dataset,
    options: Mapping[str, object],
    recipe: Mapping[str, float],
    seed: int,
) -> nn.Module:
    """A new student, trained for as many epochs and in batches as large as the recipe says."""
    student = seeded(small_student, seed)
    how = {"epochs": recipe["epochs"], "batch_size": recipe["batch_size"], "seed": seed}
    ps.distill(student, teacher, labelled(dataset, 500), progress=False, **{**how, **options})
    return student


def students_table(
    teacher: nn.Module, dataset: Dataset, recipe: Mapping[str, float], seeds: tuple[int, ...] = SEEDS
) -> Table:
    """The teacher, and a row for every way; accuracies are means over the seeds."""
    x = torch.from_numpy(dataset.x_test)
    first = (TEACHER[0], f"{score(teacher, dataset):.2f}", "", f"{parameters(teacher):,}")
    rows = [("teacher", *first, TEACHER[1], f"{seconds_of_all(teacher, x):.2f}")]
    for way in WAYS:
        networks = [distilled(teacher, dataset, way.options, recipe, seed) for seed in seeds]
        scores = [score(network, dataset) for network in networks]
        known = bool(way.published)
        ours = (f"{mean(scores):.2f}", f"{min(scores):.2f} to {max(scores):.2f}")
        times = (STUDENT[1], f"{seconds_of_all(networks[0], x):.2f}") if known else ("", "")
        rows.append((way.name, way.published, *ours, f"{parameters(networks[0]):,}" * known, *times))
    head = ("network", "published (%)", "ours (%)", f"{len(seeds)} seeds", "parameters")
    title = f"Distillation in {recipe['epochs']} epochs: accuracy on the test set, seconds for all of it"
    return Table(title, (*head, "published (s)", "ours (s)"), tuple(rows))


def seconds_of_all(model: nn.Module, x: Tensor, repeats: int = 5) -> float:
    """Median time for all images, in batches of 64."""
    times = []
    with evaluating(model):
        for _ in range(repeats):
            start = time.perf_counter()
            for batch in x.split(RECIPE["batch_size"]):
                model(batch)
            times.append(time.perf_counter() - start)
    return median(times)
