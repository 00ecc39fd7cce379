"""Divergence of a network's outputs from the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.utils import _pytree as pytree

from pysolve.correlations import Indices
from pysolve.errors import DataError
from pysolve.nn.batches.padding import is_of_tokens, output_mask
from pysolve.nn.batches.samples import samples_in
from pysolve.nn.cut.routers import choosing
from pysolve.nn.outputs import floating, logits_of, main_output, tensors_of, with_tensors
from pysolve.nn.running import Batch, Output, arguments, evaluating, forward, same_draws

# From the original's output and another one to the mean divergence per sample.
Divergence = Callable[[Output, Output], Tensor | float]
# Numbers that are compared at once: about what a core's caches hold. (A quarter of it takes nine tenths of
# the time of one thread, but many times that of two where other work takes their cores.)
_BLOCK = 2**19
# Differences of logits whose exponentials single precision holds.
_LARGEST = 60.0


def kl_divergence(original: Output, output: Output) -> Tensor:
    """Mean of KL(softmax(original) ‖ softmax(output)) over samples and positions.

    Classes lie along dimension 1 of outputs with 2 or 4 and more dimensions, along the last otherwise. Of a
    mapping with ``logits`` these are compared. An output without classes, a mapping without ``logits`` or a
    single number a sample, is compared by  ½ E‖output − original‖² / E‖original − mean‖², with the mean over
    samples, or 0 where these do not differ. So is every floating-point output after the first, but for single
    numbers and those whose shape data decide, and it is added. Verbs leave out padding, where batches have an
    attention mask.

    References
    ----------
    S. Kullback, R. A. Leibler, On information and sufficiency, 1951.
    """
    if isinstance(original, Distribution) and isinstance(output, Distribution):
        with suppress(NotImplementedError):
            return torch.distributions.kl_divergence(original, output).mean()
    return _apart(original, output)


def _apart(original: Output, output: Output, mask: Tensor | None = None) -> Tensor:
    """``kl_divergence`` of all that is compared, at the tokens of a mask."""

    def real(value: Tensor) -> Tensor:
        return value[mask] if mask is not None and is_of_tokens(value, mask) else value

    p, q = main_output(original), main_output(output)
    if p.shape != q.shape:
        raise DataError(
            f"the network's outputs have shape {[*p.shape]}, and those of another size {[*q.shape]}, so they "
            "cannot be compared: where data decide on the shape, give a divergence= that can."
        )
    others = zip(floating(original)[1:], floating(output)[1:], strict=False)
    rest = [_of_numbers(real(a), real(b)) for a, b in others if a.shape == b.shape]
    return torch.stack([_between(real(p), real(q), has_classes(original)), *rest]).sum()


def _of_numbers(p: Tensor, q: Tensor) -> Tensor:
    """½ E‖q − p‖² / E‖p − mean‖²; what is not finite in p, as masks of −∞, has no part."""
    p, q = p.double(), q.double()
    p, q = p.where(p.isfinite(), 0.0), q.where(p.isfinite(), 0.0)
    return 0.5 * (q - p).square().mean() / _spread(p) if p.numel() else p.sum()


def _between(p: Tensor, q: Tensor, classes: bool) -> Tensor:
    """``kl_divergence`` of two tensors, which hold logits of classes or numbers; 0 where they hold none."""
    if not p.numel():
        return p.double().sum()
    if classes:
        p, q = (one.movedim(class_dim(p), -1).flatten(0, -2) for one in (p, q))
        # In blocks: logits of all words for all tokens take gigabytes in double precision.
        step = max(1, _BLOCK // p.shape[1])
        blocks = zip(torch.split(p, step), torch.split(q, step), strict=True)
        return (torch.stack([_of_rows(*block) for block in blocks]).sum() / len(p)).clamp_min(0.0)
    p, q = p.double(), q.double()
    return 0.5 * (q - p).square().mean() / _spread(p)


def _of_rows(p: Tensor, q: Tensor) -> Tensor:
    """Sum of KL(softmax(p) ‖ softmax(q)) over rows.

    With w = softmax(p) and x = q − p − Σ_i w_i (q_i − p_i) it is log Σ_i w_i e^(x_i), that is
    log(1 + Σ_i w_i (e^(x_i) − 1 − x_i)): nothing cancels in the sum, and single precision will do.
    """
    if p.dtype != torch.float64:
        w, x = p.float().softmax(-1), q.float() - p.float()
        x -= (w * x).sum(-1, keepdim=True)
        if not x.numel() or x.amax() < _LARGEST:
            return (w * (x.expm1() - x)).sum(-1).double().log1p().sum()
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    # A class of logit −∞ adds nothing, where 0 · (∞ − ∞) would be NaN.
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum()


def has_classes(output: Output) -> bool:
    """Whether ``kl_divergence`` compares distributions over classes, not numbers."""
    named = logits_of(output) is output and not isinstance(output, Tensor | tuple | list)
    found = main_output(output)
    return not named and found.ndim > 1 and found.shape[class_dim(found)] > 1 and found.numel() > 0


def class_dim(output: Tensor) -> int:
    """Dimension of the classes: 1 of outputs with 2 or 4 and more dimensions, the last otherwise."""
    return 1 if output.ndim == 2 or output.ndim >= 4 else -1


def rows_of(output: Output) -> int:
    """How many rows, samples or positions of these, ``kl_divergence`` takes the mean of."""
    if isinstance(output, Distribution):
        return max(1, output.batch_shape.numel())
    found = main_output(output)
    return found.numel() // max(1, found.shape[class_dim(found)]) if found.ndim > 1 else found.numel()


def run(
    model: nn.Module,
    batches: Sequence[Batch],
    values: Mapping[str, Tensor] | None = None,
    chosen: Mapping[str, Indices] = MappingProxyType({}),
) -> Iterator[Output]:
    """Outputs batch by batch, with the parameters and buffers in ``values`` replaced.

    Routers choose among ``chosen`` experts alone, by their weights' names.

    Networks that draw random numbers draw the same for the same batch.
    """
    for batch in batches:
        # Inside the loop: a generator that is abandoned must not leave gradients switched off.
        with evaluating(model), same_draws(model), choosing(model, chosen, values):
            if values is None:
                output = forward(model, batch)
            else:
                # As in ``forward``, in-place layers cannot change the batch.
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, arguments(batch))
                # Ties would leave the values in a layer that has several names.
                output = functional_call(model, dict(values), args, kwargs, tie_weights=False)
        yield output


def mean_divergence(
    originals: Iterable[Output], outputs: Iterator[Output], batches: Sequence[Batch], divergence: Divergence
) -> float:
    """Mean over all samples of several batches; DataError where the original's own outputs are NaN or ∞.

    ``kl_divergence`` is the mean over tokens that are no padding, where batches tell.
    """
    total = count = 0.0
    for given, output, batch in zip(originals, outputs, batches, strict=True):
        # Distributions keep what is computed of them, as probabilities of logits: a copy does.
        keeps = any(isinstance(one, Distribution) for one in pytree.tree_leaves(given))
        original = with_tensors(given, tensors_of(given)) if keeps else given
        mask = output_mask(batch) if divergence is kl_divergence else None
        if mask is not None and mask.any() and is_of_tokens(main_output(original), mask):
            size, value = int(mask.sum()), float(_apart(original, output, mask))
        else:
            size, value = samples_in(batch), _number(divergence(original, output))
        if math.isnan(value):
            _check_finite(given)
        total, count = total + value * size, count + size
    return total / count


def or_infinite(divergence: float) -> float:
    """Nothing is further away than outputs that are no numbers any more."""
    return math.inf if math.isnan(divergence) else divergence


def _number(value: object) -> float:
    """What a user's divergence has returned."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.item())
    if isinstance(value, float | int | np.number) and not isinstance(value, bool | np.complexfloating):
        return float(value)
    shape = f" of shape {[*value.shape]}" if isinstance(value, Tensor | np.ndarray) else ""
    raise TypeError(
        f"divergence must return one number, the mean over samples, got {type(value).__name__}{shape}: "
        "reduce it by .mean(), or to a float."
    )


def _check_finite(original: Output) -> None:
    output = main_output(original)
    bad = output.isnan() | output.isposinf()
    if bool(bad.any()):
        raise DataError(
            f"the network as it was given has NaN or infinity in {int(bad.sum())} of {bad.numel()} "
            "outputs for samples that are held out, so no other can be compared with it: check its "
            "weights, and for samples of large values."
        )


def _spread(p: Tensor) -> Tensor:
    """E‖p − mean‖² over samples; where that is 0, E‖p‖², or 1."""
    around = (p - p.mean(0)).square().mean() if p.ndim else torch.zeros_like(p)
    whole = p.square().mean()
    return torch.where(around > 0, around, torch.where(whole > 0, whole, 1.0))
