"""How far a network's outputs are from the original's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pysolve.nn.network import Device, arguments, evaluating, forward

# Mean divergence per sample of outputs from the original's, both as the network returns them.
Divergence = Callable[[Any, Any], Tensor]


def kl_divergence(original: Any, output: Any) -> Tensor:
    """Mean of KL(softmax(original) ‖ softmax(output)) over samples and positions.

    Classes lie along dimension 1 of outputs with 2 or 4 and more dimensions, along the last otherwise. Of a
    mapping with ``logits`` these are compared. An output without classes, a mapping without ``logits`` or a
    single number a sample, is compared by  ½ E‖output − original‖² / E‖original − mean‖².
    """
    classified = not isinstance(original, Mapping) or "logits" in original
    p, q = _main(original).double(), _main(output).double()
    dim = 1 if p.ndim == 2 or p.ndim >= 4 else -1
    if classified and p.ndim > 1 and p.shape[dim] > 1:
        log_p, log_q = p.log_softmax(dim), q.log_softmax(dim)
        return (log_p.exp() * (log_p - log_q)).sum(dim).mean()
    spread = (p - p.mean(0)).square().mean().clamp_min(torch.finfo(p.dtype).tiny)
    return 0.5 * (q - p).square().mean() / spread


def run(
    model: nn.Module, batches: Sequence[Any], values: Mapping[str, Tensor] | None = None
) -> Iterator[Any]:
    """Outputs batch by batch, with other parameters and buffers if ``values`` names some."""
    with evaluating(model):
        for batch in batches:
            if values is None:
                yield forward(model, batch)
            else:
                args, kwargs = arguments(batch)
                yield functional_call(model, dict(values), args, kwargs)


def mean_divergence(
    originals: Sequence[Any], outputs: Iterator[Any], sizes: Sequence[int], divergence: Divergence
) -> float:
    """Mean over all samples of several batches."""
    parts = [divergence(a, b).item() * n for a, b, n in zip(originals, outputs, sizes, strict=True)]
    return sum(parts) / sum(sizes)


def _main(output: Any) -> Tensor:
    """The tensor that matters in a network's output: its logits, or the first one."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return _main(output["logits"] if "logits" in output else next(iter(output.values())))
    if isinstance(output, tuple | list) and output:
        return _main(output[0])
    raise TypeError(f"expected a tensor in the network's output, got {type(output).__name__}.")
