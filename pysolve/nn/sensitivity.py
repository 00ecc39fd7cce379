"""What an error at a layer's outputs does to the network's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Array
from pysolve.nn.divergence import main_output
from pysolve.nn.layer_matrix import Layer, channels, outputs
from pysolve.nn.running import device_of, evaluating, forward

# Random directions of the network's outputs for each batch.
PROBES = 8


def sensitivities(
    model: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Any], *, seed: int = 0
) -> dict[str, Array]:
    """E[Jᵀ J] of each layer, J the derivative of the network's outputs by the layer's.

    To first order an error e at the layer's outputs moves the network's by eᵀ Jᵀ J e. Outputs count without
    their mean over classes, which no softmax sees. Jᵀ J is estimated without bias by the gradients of the
    outputs in random directions v of signs: E[(Jᵀ v)(Jᵀ v)ᵀ] = E[Jᵀ J]; over positions it is summed.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode.
    layers : {name: layer}
    batches : sequence of batches
    seed : int
        Of the directions.

    Returns
    -------
    {name: (h, h) array}
        Scaled to a trace of h. Of layers that have no part in the output, and of networks that allow no
        gradients: the identity.
    """
    sums = {
        name: torch.zeros((channels(layer)[1],) * 2, dtype=torch.float64) for name, layer in layers.items()
    }
    random = torch.Generator().manual_seed(seed)
    offsets: list[tuple[str, Tensor]] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(_offset, offsets, name)).remove)
        for batch in batches:
            offsets.clear()
            result = main_output(forward(model, batch, device_of(model)))
            for _ in range(PROBES if result.requires_grad else 0):
                signs = torch.randint(0, 2, result.shape, generator=random).to(result) * 2 - 1
                try:
                    _add(sums, layers, offsets, result, _without_mean(signs))
                except RuntimeError:
                    # Something that the gradient needs was changed in place.
                    return {name: np.eye(len(total)) for name, total in sums.items()}
    return {name: _scaled(total.numpy()) for name, total in sums.items()}


def _offset(offsets: list[tuple[str, Tensor]], name: str, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
    """The layer's output with zeros added whose gradient is the output's."""
    offset = torch.zeros_like(y).requires_grad_()
    offsets.append((name, offset))
    return y.detach() + offset if not y.requires_grad else y + offset


def _without_mean(v: Tensor) -> Tensor:
    """Along the classes, as ``kl_divergence`` finds them."""
    if v.ndim < 2:
        return v
    return v - v.mean(1 if v.ndim == 2 or v.ndim >= 4 else -1, keepdim=True)


def _add(
    sums: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    offsets: Sequence[tuple[str, Tensor]],
    result: Tensor,
    direction: Tensor,
) -> None:
    inputs = [offset for _, offset in offsets]
    found = torch.autograd.grad(result, inputs, direction, retain_graph=True, allow_unused=True)
    for (name, _), gradient in zip(offsets, found, strict=True):
        if gradient is not None:
            rows = outputs(layers[name], gradient).double()
            sums[name].add_((rows.T @ rows).cpu())


def _scaled(total: Array) -> Array:
    trace = float(np.trace(total))
    return total * (len(total) / trace) if np.isfinite(trace) and trace > 0 else np.eye(len(total))
