"""Compressed networks in files: a plan's shapes and the tensors, from which the original makes them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pysolve import __version__
from pysolve.compressed import Compressed, fingerprint
from pysolve.errors import DataError, PysolveError
from pysolve.nn.architecture import architecture, rebuilt
from pysolve.nn.masking import mask_weights, masks_of, unmasked
from pysolve.nn.network import find_layer
from pysolve.nn.packing import Packed, pack, unpack
from pysolve.nn.storage import bits, read, write
from pysolve.records import field, plain, strings, typed

VERSION = 1


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
        **architecture(compressed),
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
        network = rebuilt(record, model)
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


def _mask(network: nn.Module, record: Mapping[str, Any]) -> None:
    """Mask again what was masked; files of before there were masks have no such field."""
    layers = {name: find_layer(network, name) for name in strings(record.get("masked", []), "masked")}
    for name, layer in layers.items():
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            raise DataError(f"{name} is a {type(layer).__name__}, which has no weight to mask.")
    mask_weights(network, {name: layer.weight.detach() != 0 for name, layer in layers.items()})  # type: ignore[operator]


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
