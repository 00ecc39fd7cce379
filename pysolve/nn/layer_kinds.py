"""Kinds of layers: torch's own class that a layer is or extends, and how its weight is stored."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class _ByShape(type):
    """A class whose instances are told by what they hold."""

    def __instancecheck__(cls, layer: object) -> bool:
        if not isinstance(layer, nn.Module) or isinstance(layer, nn.Linear):
            return False
        weight, outputs = layer._parameters.get("weight"), getattr(layer, "nf", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not isinstance(outputs, int):
            return False
        return weight.shape == (getattr(layer, "nx", len(weight)), outputs)


class Turned(nn.Module, metaclass=_ByShape):
    """y = x W + b with an (inputs, outputs) weight: the ``Conv1D`` of transformers, which GPT-2 is made of.

    Never made; ``isinstance`` is true of modules with such a weight, ``nf`` outputs and, if they say so,
    ``nx`` inputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    nf: int


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LINEAR = (nn.Linear, Turned)
WEIGHTED = (*LINEAR, *CONVOLUTIONS)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
# Norms over all channels of a value, with a weight for each.
WHOLE_NORMS = (nn.LayerNorm, nn.RMSNorm)
_OWN = {nn.Linear, *CONVOLUTIONS, *EMBEDDINGS, *PADS, *NORMS, nn.GroupNorm, *WHOLE_NORMS, nn.PReLU}


def plain(layer: nn.Module) -> type[nn.Module]:
    """Torch's own class that a layer is or extends, whatever else its ``forward`` does; else its class."""
    if isinstance(layer, Turned):
        return Turned
    # Attention calls the function of its last layer, and needs the layer as wide as it is.
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return type(layer)
    return next((base for base in type(layer).__mro__ if base in _OWN), type(layer))


def inputs_first(layer: nn.Module) -> bool:
    """Whether the first dimension of a layer's weight are its inputs."""
    return plain(layer) in (Turned, *TRANSPOSED)


def sides(layer: nn.Module) -> tuple[str, str] | None:
    """Roles in a site of the two dimensions of a layer's weight, "" where it cannot shrink; else None."""
    if plain(layer) is nn.Embedding:
        return "", "writers"
    if plain(layer) not in LINEAR:
        return None
    return ("readers", "writers") if inputs_first(layer) else ("writers", "readers")


def twins(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """Layers that share their weight and nothing else with others, and these: heads and embeddings, say."""
    owners: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        for tensor in layer._parameters.values():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(layer)
    shared = [group for group in owners.values() if len(group) > 1]
    often = Counter(layer for group in shared for layer in group)
    return {
        layer: tuple(other for other in group if other is not layer)
        for group in shared
        for layer in group
        if all(sides(one) and one.weight is group[0].weight and often[one] == 1 for one in group)
    }


def tied_tables(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """Embeddings whose weight serves heads, or other embeddings, too: the first of each group, and these."""
    found: dict[nn.Module, tuple[nn.Module, ...]] = {}
    pairs, seen = twins(model), set[nn.Module]()
    for layer in model.modules():
        if layer in pairs and layer not in seen and plain(layer) is nn.Embedding:
            seen |= {layer, *pairs[layer]}
            if all(type(other) in (nn.Linear, nn.Embedding) for other in pairs[layer]):
                found[layer] = pairs[layer]
    return found


def is_extended(layer: nn.Module) -> bool:
    """Whether a layer's ``forward`` may do more than, or something else than, the plain layer's."""
    return type(layer) is not plain(layer)
