"""What a record says of a network beside its tensors, and the network made from it again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pysolve.compressed import Compressed
from pysolve.errors import DataError, PysolveError
from pysolve.forms import Codebook, Integers, LowRank, Sparse
from pysolve.nn.cut.apply import apply
from pysolve.nn.cut.attention import attention_of
from pysolve.nn.cut.bare import member
from pysolve.nn.cut.slicing import inputs, outputs
from pysolve.nn.evaluate import parameters
from pysolve.nn.files.format1 import sparse_layers
from pysolve.nn.files.plan_json import (
    Width,
    factors_of,
    field,
    form_record,
    step_record,
    steps_of,
    strings,
    typed,
)
from pysolve.nn.files.storage import bits, type_and_shape
from pysolve.nn.layers.attention import has_opened, opened
from pysolve.nn.layers.base import Dense
from pysolve.nn.layers.factored import empty, empty_matrix
from pysolve.nn.layers.factored_embedding import FactoredEmbedding, FactoredHead
from pysolve.nn.layers.masking import mask_weights, masks_of, unmasked
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.nn.layers.runtime import in_form, substitute
from pysolve.nn.layers.sharing import share_weights, shared_of, unshared
from pysolve.nn.running import as_array, find_layer, layer_at
from pysolve.plan import Plan, tensor_name, weight_name

# Plans that change shapes, each of which takes a copy of the network.
_STAGES = 100
# Times the original's parameters that factored layers may have: full ranks double them.
_GROWTH = 4


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Data type and shape of every tensor in a network's state dict, by name: ``float32 20x1x5x5``."""
    return {
        name: type_and_shape(value.dtype, value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def architecture(compressed: Compressed) -> dict[str, object]:
    """Stages, new biases, sparse and quantised layers of a compressed network, as ``save`` writes them.

    Raises PysolveError for more stages than ``rebuilt`` takes.
    """
    every, asked = (*compressed.earlier, compressed.plan), has_opened(compressed.model)
    plans = [one for one in every if one.steps or one.untied or one.forms or (asked and attention_of(one))]
    if len(plans) > _STAGES:
        raise PysolveError(
            f"the network was compressed {len(plans)} times, and files hold up to {_STAGES}: save its state "
            "dict."
        )
    return {
        "stages": [[step_record(step) for step in plan.steps] for plan in plans],
        "factored": [_factored(plan) for plan in plans],
        **({"untied": [[*plan.untied] for plan in plans]} if any(plan.untied for plan in plans) else {}),
        **({"opened": [sorted(attention_of(plan)) for plan in plans]} if asked else {}),
        "biases": _new_biases(compressed),
        "sparse": [*sparse_layers(compressed.model, remove_duplicate=True)],
        "quantized": {
            name: _bits(layer)
            for name, layer in compressed.model.named_modules()
            if isinstance(layer, QuantWeight)
        },
    }


def rebuilt(record: Mapping[str, object], model: nn.Module) -> nn.Module:
    """A copy of the original with the compressed network's layers, and any values."""
    stages = typed(field(record, "stages"), list, "stages")
    if len(stages) > _STAGES:
        raise DataError(f"it has {len(stages)} stages, more than {_STAGES}.")
    biases = {*strings(field(record, "biases"), "biases")} - model.state_dict().keys()
    network = _with_biases(model, biases)
    # Older files have no such field.
    factored = typed(record.get("factored", []), list, "factored")
    factored = [*factored[: len(stages)], *[{}] * (len(stages) - len(factored))]
    untied, named = (
        [*typed(record.get(what, []), list, what), *[[]] * len(stages)] for what in ("untied", "opened")
    )
    for stage, ranks, own, attention in zip(stages, factored, untied, named, strict=False):
        network = _with_biases(opened(network, {*strings(attention, "opened")}), biases)
        # Older files have steps that keep every channel.
        steps = [one for one in steps_of(stage, _widths(network)) if len(one.keep) < one.site.channels]
        plan = Plan(tuple(steps), untied=tuple(strings(own, "untied")))
        network = apply(network, plan) if plan.steps or plan.untied else network
        if forms := _factors(network, ranks):
            # New biases of layers that factoring made.
            network = _with_biases(apply(network, Plan(forms=forms)), biases)
        if parameters(network) > _GROWTH * parameters(model):
            raise DataError(f"its factored layers have over {_GROWTH} times the original's parameters.")
    if biases:
        raise DataError(f"it has no layer {min(biases).rpartition('.')[0]!r}, or none that takes a bias.")
    for name in strings(field(record, "sparse"), "sparse"):
        layer = _dense(network, name, "has no sparse form")
        nothing = Sparse(tuple(layer.weight.shape), np.zeros(0, np.float32), np.zeros(0, np.uint8))
        network = substitute(network, layer, in_form(layer, nothing))
    # Older files have no such field.
    for name, numbers in typed(record.get("quantized", {}), dict, "quantized").items():
        layer = _dense(network, name, "has no form of integers")
        network = substitute(network, layer, in_form(layer, _codes(name, layer, numbers)))
    return network


def _new_biases(compressed: Compressed) -> list[str]:
    """Biases that the original does not have or, where it is not known, that plans may have brought."""
    plans, original = (*compressed.earlier, compressed.plan), compressed.fingerprint
    layers = dict(compressed.model.named_modules())
    # Embeddings had no bias before they became two.
    factored = {
        name
        for plan in plans
        for name in _factored(plan)
        if not isinstance(layers.get(name), FactoredEmbedding)
    }
    names = [name for name in compressed.model.state_dict() if name.rpartition(".")[2] == "bias"]
    biases = [*dict.fromkeys(_before_factoring(name, factored) for name in names)]
    if original is not None:
        return [name for name in biases if name not in original]
    given = {name for plan in plans for name in plan.values}
    given |= {tensor_name(name, "bias") for plan in plans for step in plan.steps for name in step.biases}
    given = {_before_factoring(name, factored) for name in given}
    return [name for name in biases if name in given]


def _factored(plan: Plan) -> dict[str, object]:
    """Records of a plan's factors, by layer."""
    factors = {name: form for name, form in plan.forms.items() if isinstance(form, LowRank)}
    parts = {name: name.rpartition(".") for name in factors}
    owners = {name: owner if leaf == "weight" else name for name, (owner, _, leaf) in parts.items()}
    return {owners[name]: form_record(form) for name, form in factors.items()}


def _before_factoring(bias: str, factored: set[str]) -> str:
    """The name that a bias had before its layer became the outer one of two."""
    earlier = {tensor_name(name, "outer.bias"): tensor_name(name, "bias") for name in factored}
    while bias in earlier:
        bias = earlier[bias]
    return bias


def _with_biases(network: nn.Module, biases: set[str]) -> nn.Module:
    """The network with those of the new biases whose layers it has; they are taken off the list."""
    width, layers = _widths(network), dict(network.named_modules(remove_duplicate=False))
    # Attention that is in one piece has its biases in one, or none at all.
    closed = (NonDynamicallyQuantizableLinear, type(None))
    ready = {name for name in biases if not isinstance(layers.get(name.rpartition(".")[0]), closed)}
    biases -= ready
    return apply(
        network, Plan(values={name: np.zeros(width("rows", name.rpartition(".")[0])) for name in ready})
    )


def _factors(network: nn.Module, ranks: object) -> dict[str, LowRank]:
    """Factors of zeros, by weight."""
    forms = {}
    for name, (rank, spatial, exact) in factors_of(ranks).items():
        if (gates := _gates(network, name)) is not None:
            if exact or spatial or rank > min(gates.shape):
                raise DataError(f"{name} cannot have rank {rank}.")
            forms[name] = empty_matrix(gates, rank)
            continue
        found = find_layer(network, name)
        layer = found if isinstance(found, nn.Embedding) else _dense(network, name, "cannot be factored")
        most = layer.weight.numel()
        if isinstance(layer, nn.Embedding):
            # More would only be larger, whatever a file says.
            most = 0 if exact >= len(layer.weight) else min(layer.weight.shape)
        elif exact:
            raise DataError(f"{name} has no rows that are looked up.")
        if rank > most:
            raise DataError(f"{name} cannot have rank {rank}.")
        forms[weight_name(name)] = empty(layer, rank, spatial=spatial, rows=np.arange(exact))
    return forms


def _gates(network: nn.Module, name: str) -> nn.Parameter | None:
    """A weight of a recurrent layer."""
    owner, _, leaf = name.rpartition(".")
    layer = layer_at(network, owner)
    found = layer._parameters.get(leaf) if isinstance(layer, nn.RNNBase) else None
    return found if found is not None and found.ndim == 2 else None


def check_places(network: nn.Module) -> None:
    """Refuse factored embeddings that give two rows one place, or have none for one, with a DataError."""
    for name, layer in network.named_modules():
        places = layer.places if isinstance(layer, FactoredEmbedding | FactoredHead) else None
        if places is not None and not torch.equal(
            places.sort().values.cpu(), torch.arange(len(places), dtype=places.dtype)
        ):
            raise DataError(f"the rows of {name} need a place each.")


def _widths(network: nn.Module) -> Width:
    layers = dict(network.named_modules(remove_duplicate=False))

    def width(what: str, name: str) -> int:
        layer = member(layers, name)
        if layer is None:
            raise DataError(f"it has no layer {name!r}.")
        try:
            return outputs(layer) if what == "rows" else inputs(layer)
        except KeyError:
            kind = type(layer).__name__
            raise DataError(f"{name} is a {kind}, which has no channels that can be removed.") from None

    return width


def _dense(network: nn.Module, name: str, why: str) -> Dense:
    """A layer of a network that can take another form."""
    layer = find_layer(network, name)
    if not isinstance(layer, Dense):
        raise DataError(f"{name} is a {type(layer).__name__}, which {why}.")
    return layer


def _bits(layer: QuantWeight) -> list[int]:
    """Bits, inputs of a group or 0 for all, and whether a quantised layer has zeros and rounds inputs."""
    group = layer.group if layer.group and layer.scales.shape[1] > 1 else 0
    return [layer.bits, group, int(layer.zeros is not None), int(layer.dynamic)]


def _codes(name: str, layer: Dense, given: object) -> Integers:
    """A form of zeros for a layer; one scale for each weight at most."""
    what = f"{name}'s bits, group, zeros and rounding"
    numbers = [typed(number, int, what) for number in typed(given, list, name)]
    if len(numbers) != 4:
        raise DataError(f"expected bits, group, zeros and rounding of {name}, got {len(numbers)} numbers.")
    shape, (width, group, zeros, dynamic) = tuple(layer.weight.shape), numbers
    codes = np.zeros(shape, np.int8)
    columns = codes[0].size if len(codes) else 0
    if not 0 <= group <= columns:
        raise DataError(f"expected {name} in groups of up to {columns} inputs, got {group}.")
    parts = (len(codes), -(-columns // (group or max(1, columns))))
    own = np.zeros(parts, np.int8) if zeros else None
    return Integers(codes, np.zeros(parts, np.float32), own, width, group or None, bool(dynamic))


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
