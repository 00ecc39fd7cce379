"""Padding of batches of tokens: positions that no sum, refit, divergence or loss counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pysolve.nn.running import Batch

# Masks of a batch's tokens, True where they are real, by their shape (samples, positions).
Masks = Mapping[tuple[int, ...], Tensor]

# Masks of tokens, 1 where a token is real, as transformers names them.
_ENCODER, _DECODER = "attention_mask", "decoder_attention_mask"


def token_masks(batch: Batch) -> Masks:
    """Masks of a batch's tokens, True where they are real, by their shape (samples, positions).

    Of a network that encodes some tokens and decodes others both are known, and differ in shape, or neither.
    """
    found = [mask for mask in (_mask(batch, _ENCODER), _mask(batch, _DECODER)) if mask is not None]
    by_shape = {tuple(mask.shape): mask for mask in found}
    return by_shape if len(by_shape) == 1 + _decodes(batch) else {}


def mask_of_rows(masks: Masks, rows: Sequence[int]) -> Tensor | None:
    """One of the masks in one dimension, for a tensor with a row for each token; None where it has others.

    ``rows`` are its sizes but for the channels: (samples, positions), or their product.
    """
    found = [mask for shape, mask in masks.items() if tuple(rows) in (shape, (mask.numel(),))]
    return found[0].flatten() if len(found) == 1 else None


def output_mask(batch: Batch) -> Tensor | None:
    """The mask of the tokens that a network's outputs belong to."""
    return _mask(batch, _DECODER if _decodes(batch) else _ENCODER)


def is_of_tokens(values: Tensor, mask: Tensor) -> bool:
    """Whether a tensor (samples, positions, numbers) belongs to the tokens of a mask."""
    return values.ndim == 3 and values.shape[:2] == mask.shape


def without_padding(values: Tensor, batch: Batch) -> Tensor:
    """A network's output (samples, positions, numbers) at real tokens; another one as it is."""
    mask = output_mask(batch)
    return values if mask is None or not is_of_tokens(values, mask) else values[mask.to(values.device)]


def zero_padding(values: Tensor, batch: Batch) -> Tensor:
    """The same with zeros at padding."""
    mask = output_mask(batch)
    if mask is None or not is_of_tokens(values, mask):
        return values
    return values * mask[..., None].to(values)


def _decodes(batch: Batch) -> bool:
    return isinstance(batch, Mapping) and any(str(name).startswith("decoder_") for name in batch)


def _mask(batch: Batch, name: str) -> Tensor | None:
    """A mask of zeros and ones for each token."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    return mask.bool()
