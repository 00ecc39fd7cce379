"""A network's state dict in one stream of bytes, each tensor written in the way that takes the fewest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray
from pysolve.errors import DataError
from pysolve.forms import Sparse
from pysolve.nn.files.format1 import (
    SparseLayer,
    Wanted,
    check_names,
    check_shape,
    entries,
    filled,
    own,
    stored,
    wanted,
)
from pysolve.nn.files.plan_json import typed
from pysolve.nn.files.row_coder import (
    Bytes,
    Description,
    Row,
    Stream,
    fitted,
    gapped,
    gapped_of,
    row_of,
    written,
)
from pysolve.nn.files.storage import bits, type_and_shape

# Raw bytes from which on a tensor is one of the file's own.
_LARGE = 1 << 16


@dataclass(frozen=True, eq=False)
class Compact:
    """A state dict as one stream of bytes, and tensors of a file.

    Parameters
    ----------
    stream : uint8 tensor
        The bytes of all rows, one tensor after the other.
    rows : {name: [str, description]}
        Of the tensors in the stream, in its order: data type and shape, as in "float32 20x1x5x5", and how
        the row of their bits is written, see ``files.row_coder``. Of a sparse layer's values, the shape of
        its matrix.
    tensors : {name: tensor}
        Large ones that no way makes smaller.
    aliases : {name: name}
        From further names of a tensor to its first.
    sizes : {name: int}
        Bytes of each tensor, without its description.
    """

    stream: Tensor
    rows: dict[str, list[Description]]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    sizes: dict[str, int] = field(default_factory=dict)


def compact(model: nn.Module, kind: str) -> Compact:
    """A network's state dict in the fewest bytes.

    Parameters
    ----------
    model : nn.Module
    kind : "ans" or "huffman"

    Raises
    ------
    PysolveError
        When it holds something that is no tensor with values.
    ImportError
        "ans" without constriction.
    """
    out: list[Bytes] = []
    rows: dict[str, list[Description]] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    sizes: dict[str, int] = {}
    storages: set[int] = set()
    for name, tensor, layer in stored(model, aliases):
        part = fitted(_row(tensor), kind) if layer is None else gapped(_entries(layer), kind)
        if part.head == "r" and tensor.nbytes >= _LARGE:
            tensors[name], sizes[name] = own(tensor, storages), tensor.nbytes
            continue
        before = len(out)
        shape = tuple(tensor.shape) if layer is None else layer.shape
        rows[name] = [type_and_shape(tensor.dtype, shape), written(part, out)]
        sizes[name] = sum(len(one) for one in out[before:])
    stream = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *out]))
    return Compact(stream, rows, tensors, aliases, sizes)


def expanded(made: Compact, network: nn.Module) -> dict[str, Tensor]:
    """The state dict for a network of the layers that were written.

    Raises
    ------
    DataError
        When the file is not such a network's; sizes are checked before they are used.
    ImportError
        When it needs constriction, which is not installed.
    """
    need, rows = wanted(network, made.aliases), typed(made.rows, dict, "rows")
    check_names(need.keys.values(), [*rows, *made.tensors])
    stream, values = Stream(made.stream.numpy()), dict[str, Tensor]()
    for key, entry in rows.items():
        names = [name for name, first in need.keys.items() if first == key]
        if len(typed(entry, list, key)) != 2:
            raise DataError(f"expected data type and row of {key}, got {str(entry)[:40]}.")
        dtype = _dtype(key, typed(entry[0], str, key), [need.shapes[name] for name in names])
        values |= _read(names, entry[1], stream, dtype, need)
    if stream.at < len(stream.data):
        raise DataError(f"{len(stream.data) - stream.at} bytes belong to no tensor.")
    for name, key in need.keys.items():
        if key in made.tensors and key not in rows:
            check_shape(name, [*made.tensors[key].shape], need.shapes[name])
            if name in need.layers:
                raise DataError(f"expected gaps between the entries of {name}, got none.")
            values[name] = made.tensors[key]
    return values


def _read(
    names: list[str], description: object, stream: Stream, dtype: torch.dtype, need: Wanted
) -> dict[str, Tensor]:
    """The tensors of these names, which are one in the file."""
    shape, kind, found = need.shapes[names[0]], f"u{dtype.itemsize}", dict[str, Tensor]()
    if need.layers.keys().isdisjoint(names):
        row = torch.from_numpy(row_of(description, stream, math.prod(shape), kind))
        tensor = row.view(dtype).reshape(shape)
        return dict.fromkeys(names, tensor)
    form = gapped_of(description, stream, shape, kind)
    for name in names:
        found |= filled(name, form, dtype, need.layers.get(name))
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


def _entries(layer: SparseLayer) -> Sparse:
    form = entries(layer)
    return replace(form, values=_unsigned(form.values))


def _row(tensor: Tensor) -> Row:
    return _unsigned(bits(tensor).numpy().ravel())


def _unsigned(values: AnyArray) -> Row:
    return values.view(f"u{values.itemsize}")
