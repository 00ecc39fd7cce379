"""Accuracy and costs of a network: parameters, bytes, MACs, latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.errors import DataError
from pysolve.nn.layer_kinds import WEIGHTED, inputs_first
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.nn.layers.sharing import unshared
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear
from pysolve.nn.running import Batch, Values, as_input, device_of, evaluating, forward, labelled
from pysolve.report.rows import Latency

# Layers whose multiplications count.
COUNTED = (*WEIGHTED, SparseLinear, SparseConv2d, QuantWeight)


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
        When there is not one class number for each input.
    """
    inputs, labels = labelled(model, x, y)
    if labels.ndim != 1:
        raise DataError(f"expected one class number for each input, got labels of {tuple(labels.shape)}.")
    device, right = device_of(model), 0
    with evaluating(model):
        for start in range(0, len(inputs), batch_size):
            scores = forward(model, inputs[start : start + batch_size], device)
            right += int((scores.argmax(1).cpu() == labels[start : start + batch_size].cpu()).sum())
    return 100.0 * right / len(labels)


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


def macs(model: nn.Module, example: Batch) -> int:
    """Multiply-accumulates of all Linear and convolution calls on one batch; of sparse ones by their entries.

    Parameters
    ----------
    model : nn.Module
    example : one batch
        In the forms that ``gather`` takes; with one sample in it, the result is per sample.
    """
    return sum(layer_macs(model, example).values())


def layer_macs(model: nn.Module, example: Batch) -> dict[str, int]:
    """``macs`` of each layer with weights, by its first name."""
    calls: dict[str, int] = {}

    def count(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, SparseLinear | SparseConv2d):
            calls[name] += output.numel() // module.shape[0] * module.values.numel()
            return
        weight = module.codes if isinstance(module, QuantWeight) else module.weight
        assert isinstance(weight, Tensor)
        # Every output, or input where these come first, is multiplied with one slice of the weight.
        calls[name] += (args[0] if inputs_first(module) else output).numel() * weight[0].numel()

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, module in model.named_modules():
            if isinstance(module, COUNTED):
                calls[name] = 0
                stack.callback(module.register_forward_hook(partial(count, name)).remove)
        forward(model, example, device_of(model))
    return calls


def latency(model: nn.Module, x: Values, *, repeats: int = 50) -> Latency:
    """Seconds of the network for one batch, after a warm-up of a fifth as many calls.

    Parameters
    ----------
    model : nn.Module
    x : (n, …) array or tensor
        The batch, moved to the network's device beforehand.
    repeats : int

    Raises
    ------
    ValueError
        When ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    batch = as_input(model, x).to(device_of(model))
    with evaluating(model):
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
