"""A network's state dict in one stream of bytes, each tensor written in the way that takes the fewest."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray
from pysolve.errors import DataError
from pysolve.nn.files import format1, row_coder
from pysolve.nn.files.format1 import Packed, Wanted
from pysolve.nn.files.plan_json import typed
from pysolve.nn.files.storage import STREAM, bits, type_and_shape

# Raw bytes from which on a tensor is one of the file's own.
_LARGE = 1 << 16


def compact(model: nn.Module, kind: str) -> Packed:
    """A network's state dict in the fewest bytes, coded by "ans" or "huffman".

    Raises PysolveError when something in it is no tensor with values; ImportError for "ans" without
    constriction.
    """
    out: list[row_coder.Bytes] = []
    packed = Packed()
    storages: set[int] = set()
    for name, tensor, layer in format1.stored(model, packed.aliases):
        if layer is None:
            shape, part = tuple(tensor.shape), row_coder.fitted(_unsigned(bits(tensor).numpy().ravel()), kind)
        else:
            form = format1.entries(layer)
            part = row_coder.gapped(replace(form, values=_unsigned(form.values)), kind)
            shape = form.shape
        if part.head == "r" and tensor.nbytes >= _LARGE:
            packed.tensors[name], packed.sizes[name] = format1.own(tensor, storages), tensor.nbytes
            continue
        before = len(out)
        packed.table[name] = [type_and_shape(tensor.dtype, shape), row_coder.written(part, out)]
        packed.sizes[name] = sum(len(one) for one in out[before:])
    packed.tensors[STREAM] = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *out]))
    return packed


def expanded(packed: Packed, network: nn.Module) -> dict[str, Tensor]:
    """The state dict for a network of the layers that were written.

    Raises DataError when the file is not such a network's; ImportError when it needs constriction, which is
    not installed. Sizes are checked before they are used.
    """
    need, rows = format1.wanted(network, packed.aliases), packed.table
    whole = {name: tensor for name, tensor in packed.tensors.items() if name != STREAM}
    format1.check_names([one.key for one in need.values()], [*rows, *whole])
    stream, values = row_coder.Stream(packed.tensors[STREAM].numpy()), dict[str, Tensor]()
    for key, entry in rows.items():
        same = {name: one for name, one in need.items() if one.key == key}
        if len(typed(entry, list, key)) != 2:
            raise DataError(f"expected data type and row of {key}, got {str(entry)[:40]}.")
        dtype = _dtype(key, typed(entry[0], str, key), [one.shape for one in same.values()])
        values |= _read(same, entry[1], stream, dtype)
    if stream.at < len(stream.data):
        raise DataError(f"{len(stream.data) - stream.at} bytes belong to no tensor.")
    for name, one in need.items():
        if one.key not in rows:
            values[name] = one.as_stored(name, whole[one.key])
    return values


def _read(
    same: dict[str, Wanted], description: object, stream: row_coder.Stream, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of these names, which are one in the file."""
    (shape, *_), kind = [one.shape for one in same.values()], f"u{dtype.itemsize}"
    if all(one.layer is None for one in same.values()):
        row = torch.from_numpy(row_coder.row_of(description, stream, math.prod(shape), kind))
        return dict.fromkeys(same, row.view(dtype).reshape(shape))
    form, found = row_coder.gapped_of(description, stream, shape, kind), dict[str, Tensor]()
    for name, one in same.items():
        found |= format1.filled(name, form, dtype, one.layer)
    return found


def _dtype(key: str, given: str, shapes: list[tuple[int, ...]]) -> torch.dtype:
    """The data type of a tensor from a record's "float32 20x1x5x5", whose shape is checked."""
    kind, _, sizes = given.partition(" ")
    dtype = getattr(torch, kind, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize > 8:
        raise DataError(f"{key} is of an unknown data type {kind[:20]!r}.")
    for shape in shapes:
        if given != type_and_shape(dtype, shape):
            raise DataError(f"expected {key} of shape {[*shape]}, got [{sizes[:80].replace('x', ', ')}].")
    return dtype


def _unsigned(values: AnyArray) -> row_coder.Row:
    return values.view(f"u{values.itemsize}")
