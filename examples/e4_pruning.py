"""A small convolutional network pruned: published files keep their size, ours shrink."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from experiment import measured, score, unlabelled
from torch import nn
from torch.nn.utils import prune as by_torch

import pysolve as ps
from pysolve.cli.datasets import Dataset
from pysolve.compressed import Compressed
from pysolve.nn.evaluate import parameters
from pysolve.report.drawing import COLORS, finish, new_axes
from pysolve.tables import Table

# Unlabelled training images.
COUNT = 2000
PUBLISHED_FILE = "488"


@dataclass(frozen=True)
class Cut:
    """One pruning: in words, as published by ``torch.nn.utils.prune``, and as ours.

    Parameters
    ----------
    name : str
    mask : callable
        Of a layer and a share: sets a mask.
    amount : {layer: float}
        Share of the layer's weights, or of its channels, that is removed.
    options : {str: object}
        Of ``prune``.
    """

    name: str
    mask: Callable[..., object]
    amount: Mapping[str, float]
    options: Mapping[str, object]


_magnitude = partial(by_torch.l1_unstructured, name="weight")
# Of all layers fc1 has most weights: 79 %.
CUTS = (
    Cut(
        "random 30 % of fc1",
        partial(by_torch.random_unstructured, name="weight"),
        {"fc1": 0.3},
        {"method": "random"},
    ),
    Cut("smallest 30 % of fc1", _magnitude, {"fc1": 0.3}, {"method": "magnitude"}),
    Cut("smallest 90 % of fc1", _magnitude, {"fc1": 0.9}, {"method": "magnitude"}),
    Cut(
        "50 % of both convolutions' channels by ‖·‖₂",
        partial(by_torch.ln_structured, name="weight", n=2, dim=0),
        {"conv1": 0.5, "conv2": 0.5},
        {"method": "ln", "norm": 2},
    ),
)


def pruning_table(model: nn.Module, dataset: Dataset, seed: int, count: int = COUNT) -> Table:
    """A row for every way to prune: as published, and ours without and with the other weights refitted."""
    whole = measured(model, model, dataset)
    rows = [("nothing", PUBLISHED_FILE, *whole, "", "", f"{parameters(model):,}", "")]
    for cut in CUTS:
        masked = as_published(model, cut, seed)
        plain, refitted = (
            by_prune(model, dataset, cut, refit, seed, count) for refit in ("none", "sequential")
        )
        left = f"{ps.nonzeros(plain.model).nonzeros:,}"
        theirs, ours = measured(masked, masked, dataset), measured(plain, plain.model, dataset)
        rows.append((cut.name, PUBLISHED_FILE, *theirs, *ours, left, f"{score(refitted.model, dataset):.2f}"))
    head = ("pruned", "published: kB", "as published: kB", "accuracy", "ours: kB", "accuracy")
    title = "Pruned, not trained again: files, and accuracy on the test set (%)"
    return Table(title, (*head, "parameters left", "others refitted"), tuple(rows))


def as_published(model: nn.Module, cut: Cut, seed: int) -> nn.Module:
    """Masks by torch, made permanent: zeros that are stored like all other weights."""
    network = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, share in cut.amount.items():
            layer = network.get_submodule(name)
            cut.mask(layer, amount=share)
            by_torch.remove(layer, "weight")
    return network


def by_prune(model: nn.Module, dataset: Dataset, cut: Cut, refit: str, seed: int, count: int) -> Compressed:
    """The same by ``prune``, with unlabelled images: zeros are not stored, channels are removed."""
    how = {"amount": cut.amount, "layout": "dense", "refit": refit, "seed": seed, "progress": False}
    return ps.prune(model, unlabelled(dataset, count, 500), **cut.options, **how)


def draw(table: Table, path: Path) -> None:
    """Files as published and ours."""
    ax = new_axes(height=3.0)
    names, theirs, ours = zip(
        *((row[0], float(row[2]), float(row[4])) for row in table.rows[1:]), strict=True
    )
    places = np.arange(len(names))
    ax.barh(places - 0.18, theirs, 0.36, color="0.7", label="as published: zeros are stored")
    ax.barh(places + 0.18, ours, 0.36, color=COLORS[0], label="ours")
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set(xlabel="file (kB)")
    finish(ax, path, grid="x", loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
