"""Pruning, 8 bits and distillation of small convolutional networks on CIFAR-10, as published, beside ours.

    python examples/e4_efficiency.py --data DIR

1. SimpleCNN, trained once (simple.safetensors) and pruned: published files keep their 488 kB, because zeros
   are stored; ours shrink.
2. The same network at 8 bits, in the Linear layers with inputs rounded too, as published, and in all layers.
3. A ResNet-18, trained once (resnet18.safetensors), teaches a padded SimpleCNN: α T² KL + (1 − α) CE with
   T = 5 and α = 0.5, by SGD with a momentum of 0.9 at 1e-3; beside it the same student on a better schedule.

The images are JPEG-recompressed CIFAR-10: 25,000 to train on, 5,000 to test. ResNet-18 sees them 3 times and
students 5 times, so that all of it fits half an hour on two cores; no augmentation. Published accuracies are
not at hand. Tables are in Markdown; files are pictured in files.png.
"""

from pathlib import Path

import experiment
from e4_distillation import SEEDS, STUDENT, TEACHER, distillation_table, trained_teacher
from e4_networks import SimpleCnn
from e4_pruning import COUNT, draw, pruning_table
from e4_quantization import int8_table
from experiment import kept, show

from pysolve.cli.datasets import Dataset, cifar

RECIPE = {"epochs": 6, "batch_size": 64, "lr": 2e-3}
QUICK = {"images": 320, "count": 100, "epochs": 1}


def run(dataset: Dataset, out: Path, seed: int, *, quick: bool) -> None:
    """Train, prune, quantise, distil, print and draw."""
    shorter = {"epochs": QUICK["epochs"]} if quick else {}
    model = kept(SimpleCnn, dataset, out / "simple.safetensors", RECIPE | shorter, seed)
    count = QUICK["count"] if quick else COUNT
    table = pruning_table(model, dataset, seed, count)
    show(table)
    draw(table, out / "files.png")
    show(f"Wrote {out / 'files.png'}\n")
    show(int8_table(model, dataset, count))
    teacher = trained_teacher(dataset, out / "resnet18.safetensors", TEACHER | shorter, seed)
    show(distillation_table(teacher, dataset, STUDENT | shorter, SEEDS[:1] if quick else SEEDS))


app = experiment.script(run, lambda data: cifar(data), out="e4", data="cifar10_jpeg", few=QUICK["images"])


if __name__ == "__main__":
    app()
