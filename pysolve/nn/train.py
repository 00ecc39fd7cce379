"""One plain training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from pysolve.errors import PysolveError
from pysolve.nn.network import Values, device_of, keeping_modes, labelled


def fit(
    model: nn.Module,
    x: Values,
    y: Values,
    *,
    epochs: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    progress: bool = True,
) -> list[float]:
    """Train in place with Adam on a one-cycle schedule.

    The same seed gives the same network; torch's global random state is left alone.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained; its mode is restored afterwards.
    x : (n, …) array or tensor
    y : (n,) array or tensor
    epochs, batch_size : int
    lr : float
        The highest learning rate of the cycle.
    weight_decay : float
    seed : int
        Of the shuffling and of dropout.
    loss : callable
        Of outputs and labels, averaged over the batch.
    progress : bool
        Show a progress bar when on a terminal.

    Returns
    -------
    list of float
        Mean loss of each epoch.

    References
    ----------
    L. N. Smith, N. Topin, Super-convergence, 2019.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
    inputs, labels = labelled(model, x, y)
    device, steps = device_of(model), math.ceil(len(inputs) / batch_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Adam(trained, lr=lr, weight_decay=weight_decay)
    schedule = OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    shuffle = torch.Generator().manual_seed(seed)

    def step(rows: Tensor) -> float:
        optimizer.zero_grad()
        value = loss(model(inputs[rows].to(device)), labels[rows].to(device))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        bar.update()
        return value.item() * len(rows)

    history: list[float] = []
    bar = tqdm(total=epochs * steps, desc="train", unit="batch", disable=None if progress else True)
    with bar, _training(model, seed, device):
        while len(history) < epochs:
            # Parts of nearly equal size: batch norm cannot train on a last batch of one sample.
            parts = torch.randperm(len(inputs), generator=shuffle).tensor_split(steps)
            history.append(sum(map(step, parts)) / len(inputs))
            bar.set_postfix(epoch=len(history), loss=f"{history[-1]:.4f}")
            if not math.isfinite(history[-1]):
                raise PysolveError(f"the loss became {history[-1]} in epoch {len(history)}: lower lr ({lr}).")
    return history


@contextmanager
def _training(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Training mode and a random state of its own (for dropout); both are put back afterwards."""
    with keeping_modes(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        yield
