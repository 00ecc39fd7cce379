"""Compressed networks in files: a plan's shapes and the tensors, from which the original makes them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pysolve import __version__
from pysolve.compressed import Compressed, fingerprint
from pysolve.errors import DataError, PysolveError
from pysolve.forms import LowRank, Sparse
from pysolve.nn.evaluate import parameters
from pysolve.nn.factored import empty
from pysolve.nn.layers import in_form
from pysolve.nn.masking import mask_weights, masks_of, unmasked
from pysolve.nn.network import find_layer
from pysolve.nn.packing import Packed, pack, sparse_layers, unpack
from pysolve.nn.slicing import inputs, outputs
from pysolve.nn.storage import bits, read, write
from pysolve.nn.surgery import apply, substitute
from pysolve.plan import Plan
from pysolve.records import (
    Width,
    factors_of,
    field,
    form_record,
    plain,
    step_record,
    steps_of,
    strings,
    typed,
)

VERSION = 1
# Times the original's parameters that factored layers may have: full ranks double them.
_GROWTH = 4


def save(compressed: Compressed, path: str | os.PathLike[str]) -> None:
    """Write a compressed network to one ``.safetensors`` file, from which ``load`` makes it again.

    The file holds the tensors of ``compressed.model.state_dict()``, as they are now: after fine-tuning, that
    is what is saved. Tensors under several names are stored once. Of tensors that are mostly zeros, and of
    sparse layers, only the entries are stored, as ``NAME``, with the numbers of zeros between them, as
    ``NAME:gaps``. The metadata's entry ``pysolve`` is JSON of ``{"checksum": n, "record": record}``, whose
    record has

    - ``version`` of the format, and of ``pysolve``;
    - ``original``: data types and shapes of the original's tensors, by name, or null;
    - ``stages``: for each plan, the earliest first, its steps: which layers make, pass on and read the
      channels of a site, and which of them stay, as "0-3 7"; and ``factored``, for each plan too: the ranks
      of the layers that became two;
    - ``biases`` that the original does not have, the layers that run ``sparse``, and those that are
      ``masked``: only weights in use are stored, and ``load`` masks those that are zero;
    - ``training``: whether all layers are in training mode, or the names of those that are;
    - ``shapes`` of the tensors that are stored without their zeros, ``aliases`` from second names to the
      first, and ``checksums``, CRC-32, of what is stored;
    - ``report``: what ``compressed.report.brief().as_dict()`` gives, with null for numbers that are not
      finite.

    Parameters
    ----------
    compressed : Compressed
        What ``compress`` or ``prune`` gave. Without a fingerprint, ``load`` can tell a wrong original only by
        shapes that do not fit.
    path : str or path
        An existing file is replaced once the new one is complete.

    Raises
    ------
    PysolveError
        When the network holds what such files cannot, for example tensors without values.
    """
    _check_kind("compressed", compressed, Compressed, "what compress or prune returned")
    masked = [*masks_of(compressed.model)]
    compressed = replace(compressed, model=unmasked(compressed.model))
    model = compressed.model
    packed = pack(model)
    record = {
        "version": VERSION,
        "pysolve": __version__,
        "original": compressed.fingerprint,
        "stages": [
            [step_record(step) for step in plan.steps] for plan in (*compressed.earlier, compressed.plan)
        ],
        "factored": [_factored(plan) for plan in (*compressed.earlier, compressed.plan)],
        "biases": _new_biases(compressed),
        "sparse": [*sparse_layers(model, remove_duplicate=True)],
        "masked": masked,
        "training": _modes(model),
        "shapes": packed.shapes,
        "aliases": packed.aliases,
        "report": plain(compressed.report.brief().as_dict()),
    }
    write(Path(path), packed.tensors, record)


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Read a compressed network from a file that ``save`` wrote.

    Parameters
    ----------
    path : str or path
    model : nn.Module
        The original network, with any weights; not changed.

    Returns
    -------
    nn.Module
        A copy with the saved network's layers, values, data types and modes, on the devices of ``model``: it
        computes what the saved one did, bit for bit. Buffers that no state dict holds are ``model``'s.

    Raises
    ------
    DataError
        When the file is damaged, of another version or no such file at all, or made from another network:
        names the first difference. Files are safe to load whoever wrote them.
    """
    _check_kind("model", model, nn.Module, "the original network, a torch.nn.Module")
    record, tensors = read(Path(path))
    version = record.get("version")
    if version != VERSION:
        raise DataError(
            f"{path} has format version {str(version)[:20]}, but this pysolve reads version {VERSION}: "
            "update pysolve, or save the network anew."
        )
    try:
        model = unmasked(model)
        _check_original(record, model)
        network = _rebuilt(record, model)
        packed = Packed(tensors, field(record, "shapes"), field(record, "aliases"))
        _fill(network, unpack(packed, network))
        _set_modes(network, field(record, "training"))
        _mask(network, record)
    except (PysolveError, ValueError, TypeError, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise DataError(f"{path} does not fit this {type(model).__name__}: {why}.") from error
    return network


def _check_kind(name: str, value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}.")


def _new_biases(compressed: Compressed) -> list[str]:
    """Biases that the original does not have or, where it is not known, that plans may have brought."""
    plans, original = (*compressed.earlier, compressed.plan), compressed.fingerprint
    factored = {name for plan in plans for name in _factored(plan)}
    names = [name for name in compressed.model.state_dict() if name.rpartition(".")[2] == "bias"]
    biases = [*dict.fromkeys(_before_factoring(name, factored) for name in names)]
    if original is not None:
        return [name for name in biases if name not in original]
    given = {name for plan in plans for name in plan.values}
    given |= {f"{name}.bias" for plan in plans for step in plan.steps for name in step.biases}
    given = {_before_factoring(name, factored) for name in given}
    return [name for name in biases if name in given]


def _factored(plan: Plan) -> dict[str, Any]:
    return {name: form_record(form) for name, form in plan.forms.items() if isinstance(form, LowRank)}


def _before_factoring(bias: str, factored: set[str]) -> str:
    """The name that a bias had before its layer became the outer one of two."""
    while (owner := bias.removesuffix(".outer.bias")) != bias and owner in factored:
        bias = f"{owner}.bias"
    return bias


def _modes(model: nn.Module) -> bool | list[str]:
    modes = {name: module.training for name, module in model.named_modules()}
    return modes[""] if len({*modes.values()}) == 1 else [name for name in modes if modes[name]]


def _set_modes(network: nn.Module, training: Any) -> None:
    modules = dict(network.named_modules())
    names = training if isinstance(training, bool) else {*strings(training, "training")}
    if not isinstance(names, bool) and not names <= modules.keys():
        raise DataError(f"it has no layer {min(names - modules.keys())!r}.")
    for name, module in modules.items():
        module.training = names if isinstance(names, bool) else name in names


def _check_original(record: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a network that is not the original, naming the first difference."""
    if field(record, "original") is None:
        return
    original, own = typed(record["original"], dict, "original"), fingerprint(model)
    for name in (*original, *own):
        if original.get(name) != own.get(name):
            raise DataError(
                f"the original has {name} as {original.get(name, 'nothing')}, this one as "
                f"{own.get(name, 'nothing')}. Give load the network that was compressed, as it was before."
            )


def _rebuilt(record: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """A copy of the original with the compressed network's layers, and any values."""
    biases = {*strings(field(record, "biases"), "biases")} - model.state_dict().keys()
    network = _with_biases(model, biases)
    stages = typed(field(record, "stages"), list, "stages")
    # Files of before layers were factored have no such field.
    factored = typed(record.get("factored", []), list, "factored")
    pairs: Any = zip_longest(stages, factored[: len(stages)], fillvalue={})
    for stage, ranks in pairs:
        steps, forms = steps_of(stage, _widths(network)), _factors(network, ranks)
        if steps or forms:
            # To layers that factoring made.
            network = _with_biases(apply(network, Plan(steps, forms=forms)), biases)
        if parameters(network) > _GROWTH * parameters(model):
            raise DataError(f"its factored layers have over {_GROWTH} times the original's parameters.")
    if biases:
        raise DataError(f"it has no layer {min(biases).rpartition('.')[0]!r}.")
    for name in strings(field(record, "sparse"), "sparse"):
        layer = find_layer(network, name)
        substitute(network, layer, in_form(layer, _empty(name, layer)))
    return network


def _with_biases(network: nn.Module, biases: set[str]) -> nn.Module:
    """The network with those of the new biases whose layers it has; they are taken off the list."""
    width, layers = _widths(network), dict(network.named_modules(remove_duplicate=False))
    ready = {name for name in biases if name.rpartition(".")[0] in layers}
    biases -= ready
    return apply(
        network, Plan(values={name: np.zeros(width("rows", name.rpartition(".")[0])) for name in ready})
    )


def _factors(network: nn.Module, ranks: Any) -> dict[str, LowRank]:
    """Forms of zeros for the layers that became two."""
    forms = {}
    for name, (rank, spatial) in factors_of(ranks).items():
        layer = find_layer(network, name)
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise DataError(f"{name} is a {type(layer).__name__}, which cannot be factored.")
        if rank > layer.weight.numel():
            raise DataError(f"{name} cannot have rank {rank}.")
        forms[name] = empty(layer, rank, spatial=spatial)
    return forms


def _mask(network: nn.Module, record: Mapping[str, Any]) -> None:
    """Mask again what was masked; files of before there were masks have no such field."""
    layers = {name: find_layer(network, name) for name in strings(record.get("masked", []), "masked")}
    for name, layer in layers.items():
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            raise DataError(f"{name} is a {type(layer).__name__}, which has no weight to mask.")
    mask_weights(network, {name: layer.weight.detach() != 0 for name, layer in layers.items()})  # type: ignore[operator]


def _widths(network: nn.Module) -> Width:
    layers = dict(network.named_modules(remove_duplicate=False))

    def width(what: str, name: str) -> int:
        if name not in layers:
            raise DataError(f"it has no layer {name!r}.")
        try:
            return outputs(layers[name]) if what == "rows" else inputs(layers[name])
        except KeyError:
            kind = type(layers[name]).__name__
            raise DataError(f"{name} is a {kind}, which has no channels that could go.") from None

    return width


def _empty(name: str, layer: nn.Module) -> Sparse:
    """A form without entries for a layer."""
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise DataError(f"{name} is a {type(layer).__name__}, which has no sparse form.")
    return Sparse(tuple(layer.weight.shape), np.zeros(0, np.float32), np.zeros(0, np.uint8))


def _fill(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put the values in place; data types follow them."""
    own = network.state_dict(keep_vars=True)
    for name, tensor in values.items():
        target = own[name]
        if target.is_meta:
            raise DataError(f"{name} is on the meta device. Make the original where it can hold values.")
        if target.dtype != tensor.dtype:
            if not (target.is_floating_point() and tensor.is_floating_point()):
                raise DataError(f"expected {name} in {target.dtype}, got {tensor.dtype}.")
            target.data = target.data.to(tensor.dtype)
    network.load_state_dict(dict(values))
    for name, tensor in network.state_dict().items():
        if not torch.equal(bits(tensor), bits(values[name])):
            raise DataError(f"{name} shares its memory with a tensor of other values in the file.")
