"""Masks, shared values and modes of a network, which neither its tensors nor its layers record."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.errors import DataError
from pysolve.forms import Codebook
from pysolve.nn.files.plan_json import field, strings
from pysolve.nn.files.storage import bits
from pysolve.nn.layers.masking import mask_weights, masks_of, unmasked
from pysolve.nn.layers.sharing import share_weights, shared_of, unshared
from pysolve.nn.running import as_array, find_layer


def ordinary(model: nn.Module) -> nn.Module:
    """The network if no weights are masked or share values, else a copy with those in use."""
    return unshared(unmasked(model))


def modes_record(model: nn.Module, plain: nn.Module) -> dict[str, object]:
    """Names of layers that are masked, share values, or are in training mode; ``plain`` is it as ordinary."""
    shared = [*shared_of(model)]
    training = {name: module.training for name, module in plain.named_modules()}
    one = len({*training.values()}) == 1
    return {
        "masked": [*masks_of(model)],
        **({"shared": shared} if shared else {}),
        "training": training[""] if one else [name for name in training if training[name]],
    }


def restore_modes(network: nn.Module, record: Mapping[str, object]) -> None:
    """Bring a network of ordinary weights into the modes of a record, in place.

    Masks are where weights are not zero. Values that a layer shares are those that it has, zero first; they
    can be trained, codes cannot. Raises DataError when the record does not fit.
    """
    _set_training(network, field(record, "training"))
    masked = _weights(network, record, "masked", "mask")
    mask_weights(network, {name: weight != 0 for name, weight in masked.items()})
    shared = _weights(network, record, "shared", "share")
    share_weights(network, {name: _book(name, weight) for name, weight in shared.items()})


def _weights(network: nn.Module, record: Mapping[str, object], what: str, verb: str) -> dict[str, Tensor]:
    """Weights of the layers that a field of the record names; older files have no such fields."""
    weights = {}
    for name in dict.fromkeys(strings(record.get(what, []), what)):
        layer = find_layer(network, name)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise DataError(f"{name} is a {type(layer).__name__}, which has no weight to {verb}.")
        weights[name] = weight.detach()
    return weights


def _book(name: str, weight: Tensor) -> Codebook:
    """The values of a weight, different to the bit, and where they are."""
    found, codes = np.unique(bits(weight).numpy(), return_inverse=True)
    if len(found) > 256:
        raise DataError(f"{name} has {len(found)} values to share, more than 256.")
    # All bits of zero are 0; a first value of −0 would become one.
    found = found if len(found) else np.zeros(1, found.dtype)
    order = np.argsort(found)[::-1]
    order = np.concatenate([order[found[order] == 0], order[found[order] != 0]])
    values = torch.from_numpy(found[order]).view(weight.dtype)
    return Codebook(np.argsort(order)[codes].reshape(weight.shape).astype(np.uint8), as_array(values))


def _set_training(network: nn.Module, training: object) -> None:
    modules = dict(network.named_modules())
    names = training if isinstance(training, bool) else {*strings(training, "training")}
    if not isinstance(names, bool) and not names <= modules.keys():
        raise DataError(f"it has no layer {min(names - modules.keys())!r}.")
    for name, module in modules.items():
        module.training = names if isinstance(names, bool) else name in names
