"""Networks whose weights share few values, taught by what they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pysolve.errors import PysolveError
from pysolve.nn.sharing import shared_of
from pysolve.training.distill import distill

# For ternary weights of ResNet-20, 800 steps: within noise of KL at T = 4, of twice the rate, and of mixed
# inputs. With batch norms that keep their statistics (frozen), 1.4 points less.
RECIPE: dict[str, Any] = {"loss": "mse", "batch_size": 64, "lr": 1e-3}


def train_shared(
    model: nn.Module, teacher: nn.Module, batches: Iterable[Any], how: Mapping[str, Any]
) -> list[float]:
    """Train a network whose weights share values to give another one's outputs; in place, without labels.

    Parameters
    ----------
    model : nn.Module
        With weights that ``share_weights`` or ``ternary_weights`` made; they share their values afterwards.
    teacher : nn.Module
        Such as the network before its weights were rounded.
    batches : iterable of batches
        As ``distill`` has them.
    how : mapping
        Options of ``distill``; ``epochs`` or ``seconds`` among them. By default ``loss`` is "mse",
        ``batch_size`` 64 and ``lr`` 1e-3.

    Returns
    -------
    list of float
        Mean loss of each epoch.

    Raises
    ------
    PysolveError
        When no weights share values; and as ``distill``.
    """
    if not shared_of(model):
        raise PysolveError(
            "no weights of the network share values: call share_weights or ternary_weights first."
        )
    return distill(model, teacher, batches, **{**RECIPE, **how})
