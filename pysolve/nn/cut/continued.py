"""Decoders that go on from the keys and values of what they have read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pysolve.nn.running import Batch, arguments, evaluating, prepared

# Differences by rounding, as shares of the largest output.
_ROUNDING, _HALF_ROUNDING = 1e-3, 5e-2


def continued(model: nn.Module, batch: Batch) -> Tensor | None:
    """What a decoder of transformers makes of the second half of texts, with what it kept of the first.

    None of other networks, and of those that do not run in this way.
    """
    _, given = arguments(batch)
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    ids = given.get(name)
    keeps = getattr(getattr(model, "config", None), "use_cache", None) is not None
    if not keeps or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    # Masks of a decoder's own texts are as long as these, those of an encoder's stay.
    others = {} if name == "input_ids" else {key: one for key, one in given.items() if key != name}
    half = ids.shape[1] // 2
    with evaluating(model):
        _, first = prepared(model, {**others, name: ids[:, :half]})
        _, second = prepared(model, {**others, name: ids[:, half:]})
        try:
            past = model(**first, use_cache=True).past_key_values
            if past is None:
                return None
            logits: Tensor = model(**second, past_key_values=past, use_cache=True).logits
            return logits
        # Whatever the network's own code raises.
        except Exception:
            return None


def part_ways(wide: nn.Module, smaller: nn.Module, batch: Batch) -> bool:
    """Whether two networks that compute the same do no longer when they go on from what they kept."""
    wanted = continued(wide, batch)
    if wanted is None:
        return False
    found = continued(smaller, batch)
    if found is None or found.shape != wanted.shape:
        return True
    share = _ROUNDING if wanted.dtype in (torch.float32, torch.float64) else _HALF_ROUNDING
    return not float((found - wanted).abs().max()) <= share * float(wanted.abs().max())
