"""Sensitivity of a network's outputs to errors at layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Array
from pysolve.nn.batches.padding import zero_padding
from pysolve.nn.divergence import class_dim
from pysolve.nn.gathering.gates import watching_gates
from pysolve.nn.gathering.sums import Sums
from pysolve.nn.gathering.watching import watching
from pysolve.nn.layer_matrix import Layer, channels, outputs
from pysolve.nn.outputs import main_output
from pysolve.nn.running import Batch, device_of, evaluating, forward, same_draws

# Random directions of the network's outputs per batch.
PROBES = 8


def sensitivities(
    model: nn.Module,
    layers: Mapping[str, Layer],
    batches: Sequence[Batch],
    *,
    probes: int | None = None,
    gates: Mapping[str, Tensor] = MappingProxyType({}),
    seed: int = 0,
) -> dict[str, Array]:
    """E[Jᵀ J] of each layer, J the derivative of the network's outputs by the layer's.

    To first order an error e at the layer's outputs changes the network's by J e, of squared norm eᵀ Jᵀ J e.
    The mean of the outputs over classes is removed, as softmax ignores it. Jᵀ J is estimated without bias
    from random sign vectors v,  E[(Jᵀ v)(Jᵀ v)ᵀ] = E[Jᵀ J],  and summed over positions.

    Parameters
    ----------
    model : nn.Module
        Runs in evaluation mode.
    probes : int, optional
        Random directions of the network's outputs per batch, by default ``PROBES``: of many samples a few do.
    gates : {name: tensor}
        Weights of recurrent layers; J is the derivative by the sums that they make.
    seed : int
        Of the directions.

    Returns
    -------
    {name: (h, h) array}
        Scaled to a trace of h; the identity for layers without effect on the output, and for networks that
        allow no gradients.

    References
    ----------
    M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
    """
    # Products of many outputs are float32 there: in double precision they take longer than the gradients.
    sums = {name: Sums.zeros(channels(layer)[1], 0, layer.weight.device) for name, layer in layers.items()}
    sums |= {name: Sums.zeros(len(weight), 0, weight.device) for name, weight in gates.items()}
    random = torch.Generator().manual_seed(seed)
    offsets: list[tuple[str, Tensor]] = []
    with (
        evaluating(model),
        same_draws(model),
        torch.enable_grad(),
        watching(layers, partial(with_offset, offsets)),
        watching_gates(model, gates, offsets),
    ):
        for batch in batches:
            offsets.clear()
            result = main_output(forward(model, batch, device_of(model)))
            for _ in range((probes or PROBES) if offsets and result.requires_grad else 0):
                signs = torch.randint(0, 2, result.shape, generator=random).to(result) * 2 - 1
                try:
                    found = by_offsets(result, offsets, zero_padding(without_mean(signs), batch), again=True)
                except RuntimeError:
                    # A tensor that the gradient needs was changed in place.
                    return {name: np.eye(one.d) for name, one in sums.items()}
                for name, gradient in found:
                    # Inputs and states meet in one sum.
                    for one in {name, name.replace("weight_ih", "weight_hh")} & gates.keys():
                        sums[one].add(gradient.flatten(0, -2))
                    if name in layers:
                        sums[name].add(outputs(layers[name], gradient))
    return {
        name: _scaled(one.correlations().xx) if one.count else np.eye(one.d) for name, one in sums.items()
    }


def with_offset(offsets: list[tuple[str, Tensor]], name: str, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """Record that adds zeros to the layer's output; their gradient is the output's."""
    offset = torch.zeros_like(y).requires_grad_()
    offsets.append((name, offset))
    return y.detach() + offset if not y.requires_grad else y + offset


def by_offsets(
    result: Tensor, offsets: list[tuple[str, Tensor]], direction: Tensor, *, again: bool = False
) -> list[tuple[str, Tensor]]:
    """Gradients of direction · result by the offsets, with their layers' names; ``again``: more follow."""
    made = [*offsets]
    found = torch.autograd.grad(
        result, [offset for _, offset in made], direction, retain_graph=again, allow_unused=True
    )
    # Code in torch.utils.checkpoint ran again meanwhile, and was recorded again.
    offsets[:] = made
    return [(name, gradient) for (name, _), gradient in zip(made, found, strict=True) if gradient is not None]


def without_mean(v: Tensor) -> Tensor:
    """Remove the mean over classes."""
    return v if v.ndim < 2 else v - v.mean(class_dim(v), keepdim=True)


def _scaled(total: Array) -> Array:
    trace = float(np.trace(total))
    return total * (len(total) / trace) if np.isfinite(trace) and trace > 0 else np.eye(len(total))
