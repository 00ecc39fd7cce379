"""Networks that are trained once: their weights are kept with the recipe that made them."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import typer
from e1_linear_reconstruction import recipe_of
from safetensors.torch import load_file, save_file
from torch import nn

from pysolve.cli.datasets import Dataset


def kept_or_trained(
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module], object],
    path: Path,
    *,
    dataset: Dataset,
    seed: int,
    recipe: Mapping[str, object],
) -> nn.Module:
    """The network from ``path`` if this recipe made it from these data, else trained and written there.

    Parameters
    ----------
    make : callable
        A network with random weights, which ``seed`` decides.
    train : callable
        Trains it in place as ``recipe`` says.
    path : Path
    dataset, seed, recipe
        What the weights depend on.
    """
    text = json.dumps({"data": dataset.name, "images": len(dataset.x_train), "seed": seed, **recipe})
    model = seeded(make, seed)
    if recipe_of(path) == text:
        model.load_state_dict(load_file(path))
        return model
    train(model)
    part = path.with_suffix(".part")
    save_file(model.state_dict(), part, metadata={"recipe": text})
    os.replace(part, path)
    typer.echo(f"Trained {type(model).__name__} and wrote {path}")
    return model


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new network whose random weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()
