"""A network's state dict as tensors for a file: each once, and without zeros where that is smaller."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.errors import DataError, PysolveError
from pysolve.forms import Sparse
from pysolve.nn.files.plan_json import typed
from pysolve.nn.files.storage import bits, in_order
from pysolve.nn.layers.sparse import SparseConv2d, SparseLinear
from pysolve.plan import tensor_name
from pysolve.whole_files import Json

SparseLayer = SparseLinear | SparseConv2d
_GAPS = ":gaps"
# Tensors of a sparse layer that follow from where its entries are.
_DERIVED = ("indices", "indptr")
# Bytes that a second tensor adds to the header of a file.
_ENTRY = 200


@dataclass(frozen=True, eq=False)
class Packed:
    """A state dict as tensors of a file, and what its record says of them.

    Parameters
    ----------
    tensors : {name: tensor}
        In format 1, of a tensor that is stored without its zeros the entries, and as ``NAME:gaps`` the
        numbers of zeros before them, as ``Sparse`` counts them. In format 2 ``:coded``, the bytes of all
        rows one after the other, and large tensors that no way makes smaller.
    table : {name: list}
        In format 1 the shapes of tensors without zeros. In format 2, of the tensors in ``:coded``, in its
        order, data type and shape, as in "float32 20x1x5x5", and how the row of their bits is written, see
        ``files.row_coder``. Of a sparse layer's values, the shape is that of its matrix.
    aliases : {name: name}
        From further names of a tensor to its first.
    sizes : {name: int}
        Bytes of each tensor, without its description.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    table: Json = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def pack(model: nn.Module) -> Packed:
    """A network's state dict in little space; PysolveError when something in it is no tensor with values."""
    packed = Packed()
    storages: set[int] = set()
    for name, tensor, layer in stored(model, packed.aliases):
        form = coded(tensor) if layer is None else entries(layer)
        if form is None:
            packed.tensors[name] = own(tensor, storages)
        else:
            packed.tensors[name] = torch.from_numpy(form.values).view(tensor.dtype)
            packed.tensors[name + _GAPS] = torch.from_numpy(form.gaps)
            packed.table[name] = [*form.shape]
        packed.sizes[name] = tensor.nbytes if form is None else form.nbytes
    return packed


def stored(model: nn.Module, aliases: dict[str, str]) -> Iterator[tuple[str, Tensor, SparseLayer | None]]:
    """Names and tensors of a state dict to be stored, and the sparse layers whose values they are.

    Further names of a tensor go into ``aliases``; errors as of ``pack``.
    """
    first: dict[object, str] = {}
    sparse = sparse_layers(model)
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in sparse and leaf in _DERIVED:
            continue
        _check_storable(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Tensors without entries have no place of their own.
        if tensor.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
            continue
        yield name, tensor, sparse.get(owner) if leaf == "values" else None


class Wanted(NamedTuple):
    """A tensor that a network needs: its name and shape in a file, and the sparse layer of its values."""

    key: str
    shape: tuple[int, ...]
    layer: str | None

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A file's tensor, which is stored as it is, checked to be the one of this name."""
        self.check_shape(name, [*tensor.shape])
        if self.layer is not None:
            raise DataError(f"expected gaps between the entries of {name}, got none.")
        return tensor

    def check_shape(self, name: str, given: object) -> None:
        """Raise DataError unless a file's shape is the network's."""
        if given != [*self.shape]:
            raise DataError(f"expected {name} of shape {[*self.shape]}, got {str(given)[:80]}.")


def wanted(network: nn.Module, aliases: dict[str, str]) -> dict[str, Wanted]:
    """The tensors that a network needs, by their names; DataError when the aliases are none."""
    sparse = sparse_layers(network)
    derived = {tensor_name(name, leaf) for name in sparse for leaf in _DERIVED}
    owners = {tensor_name(name, "values"): name for name in sparse}
    need = {}
    for name, tensor in network.state_dict().items():
        if name not in derived:
            owner = owners.get(name)
            shape = tuple(tensor.shape) if owner is None else sparse[owner].shape
            need[name] = Wanted(typed(aliases.get(name, name), str, "aliases"), shape, owner)
    return need


def unpack(packed: Packed, network: nn.Module) -> dict[str, Tensor]:
    """The state dict for a network of the layers that were packed; DataError when it is of another one."""
    need = wanted(network, packed.aliases)
    check_names([*(one.key for one in need.values()), *(n + _GAPS for n in packed.table)], packed.tensors)
    values: dict[str, Tensor] = {}
    for name, one in need.items():
        tensor = packed.tensors[one.key]
        if one.key in packed.table:
            one.check_shape(name, packed.table[one.key])
            form = decoded(tensor, packed.tensors[one.key + _GAPS], one.shape)
            values |= filled(name, form, tensor.dtype, one.layer)
        else:
            values[name] = one.as_stored(name, tensor)
    return values


def coded(tensor: Tensor) -> Sparse | None:
    """A form of the tensor's bytes, as integers, that takes less space without zeros; None when none does.

    Only entries without a bit set are left out: −0.0 is kept.
    """
    whole = bits(tensor).numpy()
    if np.count_nonzero(whole) * (whole.itemsize + 1) + _ENTRY >= whole.nbytes:
        return None
    form = Sparse.from_dense(whole)
    return form if form.nbytes + _ENTRY < whole.nbytes else None


def decoded(values: Tensor, gaps: Tensor, shape: tuple[int, ...]) -> Sparse:
    """The form whose values, as integers, and gaps a file holds; sizes are checked before they are used."""
    places = math.prod(shape)
    if gaps.dtype not in (torch.uint8, torch.uint16) or gaps.ndim != 1 or values.ndim != 1:
        raise DataError("expected a row of values and a row of uint8 or uint16 gaps.")
    # Full gaps hold zeros alone.
    most = len(values) + places // torch.iinfo(gaps.dtype).max
    if len(values) > places or len(gaps) > most:
        raise DataError(f"expected at most {places} values with {most} gaps, got {len(values)}, {len(gaps)}.")
    return Sparse(shape, bits(values).numpy(), gaps.numpy())


def sparse_layers(model: nn.Module, *, remove_duplicate: bool = False) -> dict[str, SparseLayer]:
    """Sparse layers by all their names, or by their first."""
    layers = model.named_modules(remove_duplicate=remove_duplicate)
    return {name: layer for name, layer in layers if isinstance(layer, SparseLayer)}


def _check_storable(name: str, tensor: object) -> None:
    what = None
    if not isinstance(tensor, Tensor):
        what = "no tensor"
    elif tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.itemsize > 8:
        what = f"a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
    elif name.endswith(_GAPS):
        what = f"named like the gaps of {name.removesuffix(_GAPS)}"
    if what is not None:
        raise PysolveError(f"{name} of the network's state dict is {what}, which cannot be saved.")


def own(tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor where none of those before lies."""
    tensor = in_order(tensor)
    pointer = tensor.untyped_storage().data_ptr()
    if pointer in storages:
        return tensor.clone()
    storages.add(pointer)
    return tensor


def entries(layer: SparseLayer) -> Sparse:
    """All entries of a sparse layer, also those that are zero."""
    h, d = layer.shape
    rows = np.repeat(np.arange(h), np.diff(layer.indptr.cpu().numpy()))
    return Sparse.at(rows * d + layer.indices.cpu().numpy(), bits(layer.values).numpy(), (h, d))


def check_names(expected: Iterable[str], got: Iterable[str]) -> None:
    """Raise DataError unless both are the same names."""
    strangers = {*expected} ^ {*got}
    if strangers:
        raise DataError(f"only one of them has {min(strangers)}.")


def filled(name: str, form: Sparse, dtype: torch.dtype, owner: str | None) -> dict[str, Tensor]:
    """A tensor with its zeros, or the tensors of the sparse layer of this name."""
    if owner is None:
        return {name: torch.from_numpy(form.dense()).view(dtype)}
    h, d = form.shape
    rows, columns = np.divmod(form.places(), d)
    ends = np.cumsum(np.bincount(rows, minlength=h))
    return {
        tensor_name(owner, "values"): torch.from_numpy(form.values).view(dtype),
        tensor_name(owner, "indices"): torch.from_numpy(columns.astype(np.int32)),
        tensor_name(owner, "indptr"): torch.from_numpy(np.concatenate([[0], ends])),
    }
