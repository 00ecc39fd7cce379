"""Accuracy and costs of a network: parameters, bytes, MACs, latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.errors import DataError, whole
from pysolve.nn.cost.counting import layer_macs as layer_macs
from pysolve.nn.cost.counting import macs as macs
from pysolve.nn.layer_kinds import WEIGHTED
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.nn.layers.sharing import unshared
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear
from pysolve.nn.refusal import output_of
from pysolve.nn.running import Values, as_input, device_of, evaluating, keeping_modes, labelled
from pysolve.report.rows import Latency

# Layers that have a line of their own in reports, whatever they multiply.
COUNTED = (*WEIGHTED, SparseLinear, SparseConv2d, QuantWeight)
Evaluate = Callable[[nn.Module], float]


def accuracy(model: nn.Module, x: Values, y: Values, *, batch_size: int = 1000) -> float:
    """Top-1 accuracy in per cent.

    Parameters
    ----------
    model : nn.Module
        Returns (n, classes) scores; its mode is kept.
    x : (n, …) array or tensor
    y : (n,) integer array or tensor
    batch_size : int

    Raises
    ------
    DataError
        When there is not one class number for each input, or one is beyond the network's classes.
    TypeError
        When the network returns anything but scores.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Identity()
    >>> ps.accuracy(model, torch.eye(4), torch.tensor([0, 1, 2, 0]))
    75.0
    """
    batch_size = whole("batch_size", batch_size)
    inputs, labels = labelled(model, x, y)
    if labels.ndim != 1:
        raise DataError(f"expected one class number for each input, got labels of {tuple(labels.shape)}.")
    low, high = (float(one) for one in labels.aminmax())
    device, right = device_of(model), 0
    with evaluating(model):
        for start in range(0, len(inputs), batch_size):
            scores = output_of(model, inputs[start : start + batch_size], device)
            if not isinstance(scores, Tensor) or scores.ndim != 2:
                what = (
                    f"a tensor of {tuple(scores.shape)}"
                    if isinstance(scores, Tensor)
                    else type(scores).__name__
                )
                raise TypeError(f"accuracy is that of a tensor of (samples, classes) scores, got {what}.")
            if not 0 <= low <= high < scores.shape[1]:
                known = f"0 … {scores.shape[1] - 1}, the classes of the network"
                raise DataError(f"expected labels of {known}, got {low:g} … {high:g}.")
            right += int((scores.argmax(1).cpu() == labels[start : start + batch_size].cpu()).sum())
    return 100.0 * right / len(labels)


def score_of(evaluate: Evaluate, network: nn.Module) -> float:
    """What the user's function says of a network.

    Raises
    ------
    TypeError
        It returns no single number.
    """
    # Users' functions often call ``eval()`` themselves.
    with keeping_modes(network):
        score: object = evaluate(network)
    if isinstance(score, Tensor | np.ndarray) and score.reshape(-1).shape == (1,):
        score = score.item()
    if isinstance(score, bool) or not isinstance(score, Real | np.number):
        raise TypeError(f"evaluate must return a number, the network's score, got {type(score).__name__}.")
    return float(score)


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once; codes count as the weights they stand for."""
    model = unshared(model)
    codes = [layer for layer in model.modules() if isinstance(layer, QuantWeight)]
    more = sum(layer.codes.numel() - layer.scales.numel() for layer in codes)
    return more + sum(parameter.numel() for parameter in model.parameters())


def nbytes(model: nn.Module) -> int:
    """Bytes of the state dict's tensors, shared ones once."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return sum({(t.data_ptr(), t.shape): t.nbytes for t in tensors}.values())


def latency(model: nn.Module, x: Values, *, repeats: int = 50) -> Latency:
    """Seconds of the network for a batch ``x``, (n, …), on its device; a fifth as many calls warm up."""
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    batch = as_input(model, x).to(device_of(model))
    with evaluating(model, as_used=True):
        for _ in range(1 + repeats // 5):
            model(batch)
        times = [seconds_of(lambda: model(batch), batch.device) for _ in range(repeats)]
    return summary(times, len(batch))


def summary(times: Sequence[float], batch_size: int) -> Latency:
    """Median and quartiles of the times of several calls."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    return Latency(median, low, high, batch_size, torch.get_num_threads())


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, with the accelerator's queue empty before and after."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
