"""The published experiments in parts: functions of the examples, a table or two each.

Import ``common`` before: it says where the examples are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import e1_layers
import e1_network
import e1_solvers
import e2_pruning
import e2_quantization
import e2_ranks
import e2_student
import e2_thresholds
import e3_svd_mlp as e3
import e4_distillation
import e4_efficiency
import e4_networks
import e4_pruning
import e4_quantization
import e5_channels
import e5_deep_compression
import e5_prune_retrain
import e5_stages
import e5_surgery
import e5_weights
from e5_deep_compression import NETWORKS
from experiment import adam, kept, score
from rich.console import RenderableType
from torch import nn

from pysolve.cli.datasets import Dataset, cifar, mnist
from pysolve.nn.zoo import LeNetC5, Mlp
from pysolve.tables import Table

Shown = Iterator[Table | RenderableType]


@dataclass(frozen=True)
class Part:
    """A part of a published experiment.

    Parameters
    ----------
    name : str
        Of its file, too; begins with its experiment.
    title : str
    script : str
        The example that prints it.
    measure : callable
        Of the folder of the data, the one of trained networks and pictures, and a seed: tables and lines, as
        ``experiment.show`` takes them.
    note : str
        Published figures and conditions that the tables do not hold.
    """

    name: str
    title: str
    script: str
    measure: Callable[[Path, Path, int], Shown]
    note: str = ""


def lenet(name: str, data: Path, out: Path, seed: int) -> tuple[nn.Module, Dataset]:
    dataset, one = mnist(data / "mnist"), NETWORKS[name]
    return kept(one.make, dataset, out / one.file, one.recipe, seed), dataset


lenet5 = partial(lenet, "LeNet-5")


def perceptron(data: Path, out: Path, seed: int) -> tuple[Mlp, Dataset]:
    dataset = e2_pruning.read(data / "mnist")
    return e2_pruning.trained(dataset, out / "mlp.safetensors", seed), dataset


def deep_mlp(data: Path, out: Path, seed: int) -> tuple[Mlp, Dataset]:
    dataset, path = mnist(data / "mnist"), out / "deep-mlp.safetensors"
    return kept(lambda: Mlp(e3.SIZES), dataset, path, e3.RECIPE, seed, train=adam), dataset


def simple_cnn(data: Path, out: Path, seed: int) -> tuple[e4_networks.SimpleCnn, Dataset]:
    dataset, path = cifar(data / "cifar10_jpeg"), out / "simple.safetensors"
    return kept(e4_networks.SimpleCnn, dataset, path, e4_efficiency.RECIPE, seed), dataset


def solvers(data: Path, out: Path, seed: int) -> Shown:
    return e1_solvers.compare_solvers(out / "e1-solvers.png")


def fc2(data: Path, out: Path, seed: int) -> Shown:
    model, dataset = lenet5(data, out, seed)
    yield from e1_layers.compress_fc2(model, dataset, e1_layers.gather_readers(model, dataset)["fc2"])


def layers(data: Path, out: Path, seed: int) -> Shown:
    model, dataset = lenet5(data, out, seed)
    found = e1_layers.gather_readers(model, dataset)
    for site in (e1_layers.CONV2, e1_layers.FC1, e1_layers.FC2):
        yield e1_layers.compare_selectors(model, dataset, site, found[site.readers[0]])


def sizes(data: Path, out: Path, seed: int) -> Shown:
    yield e1_network.sizes_table(e1_network.compare_sizes(*lenet5(data, out, seed)))


def students(data: Path, out: Path, seed: int) -> Shown:
    dataset, recipe = e2_pruning.read(data / "mnist"), e2_student.RECIPE
    teacher = e2_student.trained_teacher(dataset, out / "teacher.safetensors", recipe, seed)
    yield e2_student.students_table(teacher, dataset, recipe)


def zeros(data: Path, out: Path, seed: int) -> Shown:
    trained, few = perceptron(data, out, seed), e2_thresholds.FEW
    outcomes = [e2_thresholds.without_weights(*trained, tau, few) for tau in e2_thresholds.ZEROS]
    yield e2_thresholds.zeros_table(outcomes, few)


def neurons(data: Path, out: Path, seed: int) -> Shown:
    trained, few = perceptron(data, out, seed), e2_thresholds.FEW
    outcomes = [e2_thresholds.without_neurons(*trained, limit, few) for limit in e2_thresholds.NEURONS]
    yield e2_thresholds.neurons_table(outcomes, few)


def ranks(data: Path, out: Path, seed: int) -> Shown:
    (model, dataset), counts = perceptron(data, out, seed), e2_ranks.COUNTS
    scores = {rank: e2_ranks.accuracies(model, dataset, rank, counts) for rank in e2_ranks.RANKS}
    yield e2_ranks.ranks_table(model, scores, counts, score(model, dataset))


def perceptron_int8(data: Path, out: Path, seed: int) -> Shown:
    yield e2_quantization.int8_table(*perceptron(data, out, seed))


def deep_ranks(data: Path, out: Path, seed: int) -> Shown:
    model, dataset = deep_mlp(data, out, seed)
    counts = (e3.FEW, len(dataset.x_train))
    networks = {
        rank: e3.factored(model, dataset, rank, counts if rank in e3.LARGE_RANKS else counts[:1])
        for rank in e3.PUBLISHED
    }
    scores = {rank: [score(one, dataset) for one in row] for rank, row in networks.items()}
    yield e3.ranks_table(score(model, dataset), scores, networks, model, counts)


def deep_training(data: Path, out: Path, seed: int) -> Shown:
    model, dataset = deep_mlp(data, out, seed)
    smaller = e3.factored(model, dataset, e3.TRAINED, (len(dataset.x_train),))[-1]
    yield e3.trained_table(model, smaller, dataset, e3.ON, seed)


def pruned_files(data: Path, out: Path, seed: int) -> Shown:
    yield e4_pruning.pruning_table(*simple_cnn(data, out, seed), seed)


def simple_int8(data: Path, out: Path, seed: int) -> Shown:
    yield e4_quantization.int8_table(*simple_cnn(data, out, seed))


def taught(data: Path, out: Path, seed: int) -> Shown:
    dataset, path = cifar(data / "cifar10_jpeg"), out / "resnet18.safetensors"
    teacher = e4_distillation.trained_teacher(dataset, path, e4_distillation.TEACHER, seed)
    yield e4_distillation.distillation_table(teacher, dataset, e4_distillation.STUDENT)


def deviations(data: Path, out: Path, seed: int) -> Shown:
    dataset, path = mnist(data / "mnist"), out / "c5.safetensors"
    model = kept(LeNetC5, dataset, path, e5_prune_retrain.C5_RECIPE, seed)
    return e5_weights.compare_weights(model, dataset, out / "e5-weights.png")


def importance(data: Path, out: Path, seed: int) -> Shown:
    yield e5_channels.compare_rankings(*lenet5(data, out, seed))


def surgery(name: str) -> Callable[[Path, Path, int], Shown]:
    """Both ways to prune one of the networks while it is trained."""

    def measure(data: Path, out: Path, seed: int) -> Shown:
        path = out / f"e5-surgery-{name}.png"
        return e5_surgery.compare_surgery(*lenet(name, data, out, seed), path, name=name)

    return measure


def stages(name: str) -> Callable[[Path, Path, int], Shown]:
    """Deep compression of one of the networks."""
    one = NETWORKS[name]

    def measure(data: Path, out: Path, seed: int) -> Shown:
        model, dataset = lenet(name, data, out, seed)
        found = e5_stages.all_stages(model, dataset, one.published, epochs=one.epochs)
        title = f"{name} on MNIST: files, and accuracy on the test set (%)"
        yield e5_stages.stages_table(title, model, found, one.published)

    return measure


def ternary(data: Path, out: Path, seed: int) -> Shown:
    yield e5_deep_compression.taught(*lenet5(data, out, seed), data, seconds=300.0, quick=False)


EXPERIMENTS = {
    "E1": "Network compression by linear activation reconstruction",
    "E2": "Four classical techniques on MNIST",
    "E3": "Singular values of a deep perceptron",
    "E4": "Introduction to model efficiency",
    "E5": "Deep compression and after",
}
E1 = "e1_linear_reconstruction.py"
OWN_CIFAR = "JPEG-recompressed CIFAR-10: 25,000 images to train on, 5,000 to test."
PARTS = (
    Part("e1-solvers", "Solvers", E1, solvers, "Published seconds are of the author's machine."),
    Part("e1-fc2", "One layer", E1, fc2),
    Part("e1-layers", "Each layer by itself", E1, layers, "Left to the reader by the publication."),
    Part("e1-network", "The whole network", E1, sizes),
    Part("e2-distillation", "Distillation", "e2_lowrank_distill.py", students),
    Part(
        "e2-zeros",
        "Zero pruning",
        "e2_pruning.py",
        zeros,
        "Published at τ = 0.03: 2.161 MB dense, 0.843 MB as CSR, values alone. Our bytes count the indices.",
    ),
    Part("e2-neurons", "Activation pruning", "e2_pruning.py", neurons),
    Part("e2-ranks", "Low rank", "e2_lowrank_distill.py", ranks),
    Part("e2-int8", "Eight bits", "e2_quantization.py", perceptron_int8),
    Part("e3-ranks", "Without training", "e3_svd_mlp.py", deep_ranks, "Trained for 12 epochs instead of 53."),
    Part("e3-training", "Trained on", "e3_svd_mlp.py", deep_training),
    Part("e4-pruning", "Pruning", "e4_efficiency.py", pruned_files, OWN_CIFAR),
    Part("e4-int8", "Eight bits", "e4_efficiency.py", simple_int8, OWN_CIFAR),
    Part(
        "e4-distillation",
        "Distillation",
        "e4_efficiency.py",
        taught,
        f"{OWN_CIFAR} Published accuracies are not at hand; ResNet-18 is trained for 3 epochs.",
    ),
    Part("e5-weights", "Weights by standard deviation", "e5_prune_retrain.py", deviations),
    Part("e5-channels", "Global instead of local", "e5_prune_retrain.py", importance, "Nothing published."),
    Part("e5-surgery5", "Dynamic network surgery: LeNet-5", "e5_prune_retrain.py", surgery("LeNet-5")),
    Part(
        "e5-surgery300",
        "Dynamic network surgery: LeNet-300-100",
        "e5_prune_retrain.py",
        surgery("LeNet-300-100"),
    ),
    Part("e5-lenet5", "Deep compression: LeNet-5", "e5_deep_compression.py", stages("LeNet-5")),
    Part("e5-lenet300", "Deep compression: LeNet-300-100", "e5_deep_compression.py", stages("LeNet-300-100")),
    Part("e5-ternary", "Trained ternary quantisation", "e5_deep_compression.py", ternary),
)
