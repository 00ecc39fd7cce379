"""A ResNet-18 teaches a small convolutional network: as published, and ours in as many epochs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from e4_networks import ResNet18, SimpleCnn
from experiment import file_bytes, fitted, kept, labelled, score, seeded
from torch import from_numpy, nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.nn.evaluate import macs
from pysolve.tables import Table

# Few epochs, so that all of it fits half an hour on two cores. In bfloat16 the teacher takes half the time.
TEACHER = {"epochs": 3, "batch_size": 64, "lr": 1e-3, "precision": "bfloat16"}
STUDENT = {"epochs": 5, "batch_size": 32}
SEEDS = (0,)

PUBLISHED = {"optimizer": "sgd", "lr": 1e-3, "schedule": "constant"}
OURS = {"optimizer": "adam", "lr": 2e-3}
DISTILLED = {"temperature": 5.0, "alpha": 0.5}
PUBLISHED_TEACHER, PUBLISHED_STUDENT = "44.8 MB", "1.09 MB"


@dataclass(frozen=True)
class Way:
    """One way to train the student: with the teacher or with labels alone."""

    name: str
    options: Mapping[str, object]


WAYS = (
    Way("student, labels alone, SGD as published", {**PUBLISHED, "alpha": 0.0}),
    Way("student, distilled as published", {**PUBLISHED, **DISTILLED}),
    Way("student, labels alone, Adam on one cycle", {**OURS, "alpha": 0.0}),
    Way("student, distilled, Adam on one cycle (ours)", {**OURS, **DISTILLED}),
)


def trained_teacher(dataset: Dataset, path: Path, recipe: Mapping[str, object], seed: int) -> nn.Module:
    """ResNet-18, trained with labels, or from ``path``."""
    return kept(ResNet18, dataset, path, recipe, seed)


def distilled(
    teacher: nn.Module, dataset: Dataset, options: Mapping[str, object], recipe: Mapping[str, int], seed: int
) -> nn.Module:
    """A new padded student, taught on all training images; ``alpha`` of 0 means by their labels alone."""
    student = seeded(lambda: SimpleCnn(padding=2), seed)
    how = {**recipe, **options, "seed": seed, "progress": False}
    if how["alpha"] == 0:
        del how["alpha"]
        fitted(student, dataset, **how)
        return student
    # ResNet-18 is asked about every image once.
    ps.distill(student, teacher, labelled(dataset, 250), cache=True, **how)
    return student


def distillation_table(
    teacher: nn.Module, dataset: Dataset, recipe: Mapping[str, int], seeds: Sequence[int] = SEEDS
) -> Table:
    """The teacher, and a row for every way; accuracies are means over the seeds."""
    whole = f"{score(teacher, dataset):.2f}"
    rows = [("teacher ResNet-18", PUBLISHED_TEACHER, *costs(teacher, dataset), whole, "")]
    for way in WAYS:
        networks = [distilled(teacher, dataset, way.options, recipe, seed) for seed in seeds]
        scores = [score(network, dataset) for network in networks]
        each = ", ".join(f"{one:.2f}" for one in scores) if len(scores) > 1 else ""
        rows.append((way.name, PUBLISHED_STUDENT, *costs(networks[0], dataset), f"{mean(scores):.2f}", each))
    head = ("network", "published file", "ours", "million MACs", "accuracy")
    title = f"Distillation in {recipe['epochs']} epochs: accuracy on the test set (%)"
    return Table(title, (*head, f"seeds {', '.join(map(str, seeds))}"), tuple(rows))


def costs(model: nn.Module, dataset: Dataset) -> tuple[str, str]:
    """Megabytes of the file that torch writes, and multiply-accumulates of one image in millions."""
    count = macs(model, from_numpy(dataset.x_test[:1]))
    return f"{megabytes(model):.3g} MB", f"{count / 1e6:.1f}"


def megabytes(model: nn.Module) -> float:
    """Size of the file that torch writes."""
    return file_bytes(model) / 1e6
