"""Deep compression as published: pruned, sharing values and Huffman-coded, trained on labels in between."""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from e5_weights import loader
from torch import Tensor, nn

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import accuracy
from pysolve.training.finetune import finetune

# Bits of a published gap between weights that are not zero.
GAP_BITS = 5
LR = 1e-3
HUFFMAN, ANS = "coded by Huffman's codes", "coded by numeral systems"


@dataclass(frozen=True)
class Published:
    """What a network's weights are cut to, and how it comes out.

    Parameters
    ----------
    kept : {layer: share}
        Of its weights that are not made zero.
    bits : int
        Of a weight's code.
    rates : {stage: times smaller}
    scores : (before, after)
        Accuracies.
    """

    kept: Mapping[str, float]
    bits: int
    rates: Mapping[str, float]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Entry:
    """A network after one stage: bytes as the stage stores it, and per cent of the test images."""

    way: str
    stage: str
    bytes: int
    accuracy: float
    seconds: float


# Tables 1 to 3 of S. Han, H. Mao, W. J. Dally, Deep compression, 2016; convolutions there have 8 bits.
LENET5 = Published(
    {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
    5,
    {"pruned": 12, "shared": 33, HUFFMAN: 39},
    (99.20, 99.26),
)
LENET_300_100 = Published(
    {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    6,
    {"pruned": 12, "shared": 32, HUFFMAN: 40},
    (98.36, 98.42),
)

WAY = "as published, on labels"


def as_published(model: nn.Module, dataset: Dataset, published: Published, epochs: int) -> Iterator[Entry]:
    """The published stages, each trained on labels."""

    def entry(stage: str, network: nn.Module, size: int) -> Entry:
        score = accuracy(network, dataset.x_test, dataset.y_test)
        return Entry(WAY, stage, size, score, time.perf_counter() - start)

    start = time.perf_counter()
    amount = {name: 1 - share for name, share in published.kept.items()}
    pruned = ps.prune(model, method="magnitude", amount=amount, layout="masked")
    finetune(pruned.model, loader(dataset), epochs=epochs, lr=LR)
    # Positions and float32 values; nothing is entropy-coded.
    yield entry("pruned", pruned.model, file_bytes(pruned, "none"))
    start = time.perf_counter()
    sparse = copy.deepcopy(pruned.model)
    ps.remove_masks(sparse)
    options = {"scheme": "codebook", "bits": published.bits, "method": "nearest", "layout": "shared"}
    shared = ps.quantize(sparse, progress=False, **options)
    finetune(shared.model, loader(dataset), epochs=epochs, lr=LR)
    yield entry("shared", shared.model, packed_bytes(shared.model, published))
    for stage, coding in ((HUFFMAN, "huffman"), (ANS, "ans")):
        start = time.perf_counter()
        yield entry(stage, shared.model, file_bytes(shared, coding))


def unlabelled(dataset: Dataset, count: int) -> tuple[Tensor, ...]:
    """The first training images."""
    return torch.from_numpy(dataset.x_train[:count]).split(250)


def file_bytes(result: Compressed, coding: str) -> int:
    """Bytes on disk."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.safetensors")
        ps.save(result, path, coding=coding)
        return path.stat().st_size


def packed_bytes(model: nn.Module, published: Published) -> int:
    """Bytes with codes of equal length and gaps of 5 bits, a filler wherever a gap is too long for them."""
    bits = 0
    for name in published.kept:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().numpy().ravel()
        gaps = np.diff(np.flatnonzero(weight), prepend=-1) - 1
        codes = len(gaps) + int((gaps >> GAP_BITS).sum())
        bits += (published.bits + GAP_BITS) * codes + 32 * len(np.unique(weight)) + 8 * layer.bias.nbytes
    return -(-bits // 8)
