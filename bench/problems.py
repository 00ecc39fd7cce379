"""The reconstruction problems that the solvers are timed on."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ReconstructionProblem:
    """min_M ½⟨M R, M⟩ − ⟨C, M⟩ + lam Σ_g ‖M_g‖."""

    name: str
    r_xx: np.ndarray
    r_yx: np.ndarray
    lam: float
    group_size: int = 1


def published(
    d: int, h: int, r: int, n: int, lam: float, *, name: str, seed: int = 0
) -> ReconstructionProblem:
    """The published random problem: x of rank r, y linear in x, correlations divided by d as published."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((d, r)) @ rng.standard_normal((r, n))
    y = rng.standard_normal((h, d)) @ x
    return ReconstructionProblem(name, (x / d) @ (x.T / n), (y / d) @ (x.T / n), lam)


def toy() -> ReconstructionProblem:
    return published(100, 200, 80, 10_000, 0.1, name="toy, d=100 h=200")


def benchmark() -> ReconstructionProblem:
    return published(500, 200, 450, 60_000, 0.1, name="benchmark, d=500 h=200")


def relu_layer(d: int, h: int, share: float, *, group_size: int = 1, seed: int = 0) -> ReconstructionProblem:
    """A layer after a ReLU, uncentred: correlated inputs of decaying spectrum, random outgoing weights."""
    rng = np.random.default_rng(seed)
    n, latent = 4 * d, d // 16
    factors = rng.standard_normal((n, latent)) / np.arange(1, latent + 1)
    x = factors @ rng.standard_normal((latent, d)) / np.sqrt(latent) + 0.03 * rng.standard_normal((n, d))
    x = np.maximum(x + 0.5, 0)
    r_xx = x.T @ x / n
    r_yx = rng.standard_normal((h, d)) / np.sqrt(d) @ r_xx
    lam_max = np.sqrt(np.square(r_yx).sum(0).reshape(-1, group_size).sum(1)).max()
    name = f"ReLU layer, d={d} h={h}" + (f" groups of {group_size}" if group_size > 1 else "")
    return ReconstructionProblem(f"{name}, {share} lam_max", r_xx, r_yx, share * lam_max, group_size)


def convolution() -> ReconstructionProblem:
    """A 3 x 3 convolution of 512 channels."""
    return relu_layer(4608, 512, 0.01, group_size=9)


def unequal_channels(d: int, h: int, group_size: int, samples: int, *, name: str) -> ReconstructionProblem:
    """Channels that share half as many causes, rectified, of unequal strength; a random layer reads them."""
    rng = np.random.default_rng(0)
    channels = d // group_size
    causes = rng.standard_normal((samples, channels // 2))
    shared = causes @ rng.standard_normal((channels // 2, channels)) / np.sqrt(channels / 2)
    x = np.repeat(shared, group_size, axis=1) + 0.7 * rng.standard_normal((samples, d))
    x = np.maximum(x, 0) * 10 ** np.repeat(rng.uniform(-0.5, 0.5, channels), group_size)
    r_xx = x.T @ x / samples
    weight = rng.standard_normal((h, d)) / np.sqrt(d * np.diag(r_xx))
    return ReconstructionProblem(name, r_xx, weight @ r_xx, 0.0, group_size)


def few_active(d: int, h: int, active: int) -> ReconstructionProblem:
    """``active`` strong inputs make the outputs, the rest is noise: the active set does not grow with d."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * d, d))
    x[:, :active] *= 3
    r_xx = x.T @ x / len(x)
    W = np.zeros((h, d))
    W[:, :active] = rng.standard_normal((h, active))
    r_yx = W @ r_xx
    return ReconstructionProblem(
        f"{active} active of d={d}", r_xx, r_yx, 0.2 * np.linalg.norm(r_yx, axis=0).max()
    )


def lenet_fc1(share: float) -> ReconstructionProblem | None:
    """fc1 of LeNet-5 after one epoch on MNIST, centred, groups of 16 pixels; None without the data."""
    folder = Path(os.environ.get("PYSOLVE_DATA", "data"), "mnist")
    if not folder.is_dir():
        print("LeNet's fc1 left out: set PYSOLVE_DATA to a folder that holds mnist/")
        return None
    import torch

    import pysolve as ps
    from pysolve.cli.datasets import mnist
    from pysolve.nn.zoo import LeNet5
    from pysolve.training.fit import fit

    data = mnist(folder)
    torch.manual_seed(0)
    model = LeNet5()
    fit(model, data.x_train[:20_000], data.y_train[:20_000], epochs=1, progress=False)
    images = torch.from_numpy(data.x_train[:20_000]).split(1000)
    layer = ps.gather(model, images, layers=["fc1"], progress=False)["fc1"].centered()
    lam = share * ps.lam_max(layer.r_xx, layer.r_yx, group_size=16)
    return ReconstructionProblem(
        f"LeNet-5 fc1, d=800 h=500 groups of 16, {share} lam_max", layer.r_xx, layer.r_yx, lam, 16
    )
