"""Divergence of a network's outputs from the original's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from pysolve.nn.running import Batch, Output, arguments, evaluating, forward, without_classes

# From the original's output and another one to the mean divergence per sample.
Divergence = Callable[[Output, Output], Tensor]


def kl_divergence(original: Output, output: Output) -> Tensor:
    """Mean of KL(softmax(original) ‖ softmax(output)) over samples and positions.

    Classes lie along dimension 1 of outputs with 2 or 4 and more dimensions, along the last otherwise. Of a
    mapping with ``logits`` these are compared. An output without classes, a mapping without ``logits`` or a
    single number a sample, is compared by  ½ E‖output − original‖² / E‖original − mean‖², with the mean over
    samples, or 0 where these do not differ.

    References
    ----------
    S. Kullback, R. A. Leibler, On information and sufficiency, 1951.
    """
    classified = not isinstance(original, Mapping) or "logits" in original
    p, q = main_output(original).double(), main_output(output).double()
    dim = class_dim(p)
    if classified and p.ndim > 1 and p.shape[dim] > 1:
        log_p, log_q = p.log_softmax(dim), q.log_softmax(dim)
        # A class of logit −∞ adds nothing, where 0 · (∞ − ∞) would be NaN.
        parts = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        return parts.sum(dim).mean().clamp_min(0.0)
    return 0.5 * (q - p).square().mean() / _spread(p)


def class_dim(output: Tensor) -> int:
    """Dimension of the classes: 1 of outputs with 2 or 4 and more dimensions, the last otherwise."""
    return 1 if output.ndim == 2 or output.ndim >= 4 else -1


def run(
    model: nn.Module, batches: Sequence[Batch], values: Mapping[str, Tensor] | None = None
) -> Iterator[Output]:
    """Outputs batch by batch, with the parameters and buffers in ``values`` replaced."""
    for batch in batches:
        # Inside the loop: a generator that is abandoned must not leave gradients switched off.
        with evaluating(model):
            if values is None:
                output = forward(model, batch)
            else:
                # As in ``forward``, in-place layers cannot change the batch.
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, arguments(batch))
                # Ties would leave the values in a layer that has several names.
                output = functional_call(model, dict(values), args, kwargs, tie_weights=False)
        yield output


def mean_divergence(
    originals: Sequence[Output], outputs: Iterator[Output], sizes: Sequence[int], divergence: Divergence
) -> float:
    """Mean over all samples of several batches."""
    parts = [divergence(a, b).item() * n for a, b, n in zip(originals, outputs, sizes, strict=True)]
    return sum(parts) / sum(sizes)


def _spread(p: Tensor) -> Tensor:
    """E‖p − mean‖² over samples; where that is 0, E‖p‖², or 1."""
    around = (p - p.mean(0)).square().mean() if p.ndim else torch.zeros_like(p)
    whole = p.square().mean()
    return torch.where(around > 0, around, torch.where(whole > 0, whole, 1.0))


def main_output(output: Output) -> Tensor:
    """The main tensor of a network's output: its logits, or the first one."""
    output = without_classes(output)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and output:
        return main_output(output["logits"] if "logits" in output else next(iter(output.values())))
    if isinstance(output, tuple | list) and output:
        return main_output(output[0])
    raise TypeError(f"expected a tensor in the network's output, got {type(output).__name__}.")
