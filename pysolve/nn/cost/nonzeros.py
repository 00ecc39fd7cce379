"""Sparsity of a network, tensor by tensor, and its bytes in three storage formats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from pysolve.nn.layer_kinds import EMBEDDINGS
from pysolve.nn.layers.masking import unmasked
from pysolve.nn.layers.quantized import QuantWeight
from pysolve.nn.layers.sharing import unshared
from pysolve.nn.layers.sparse import SparseWeight
from pysolve.nn.running import check_model
from pysolve.tables import Table

# Bytes of a column index or a row's end.
_INDEX = 4


@dataclass(frozen=True)
class TensorNonzeros:
    """Sparsity of one parameter.

    Parameters
    ----------
    name : str
    shape : tuple of int
    nonzeros : int
    itemsize : int
        Bytes of one entry.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    itemsize: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def dense(self) -> int:
        """Bytes of all entries."""
        return self.size * self.itemsize

    @property
    def bitmask(self) -> int:
        """Bytes of a bit for every entry and the non-zeros."""
        return self.nonzeros * self.itemsize + -(-self.size // 8)

    @property
    def csr(self) -> int:
        """Bytes as compressed rows with 32-bit indices: a row an output, one row if it is a vector."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return self.nonzeros * (self.itemsize + _INDEX) + (rows + 1) * _INDEX


@dataclass(frozen=True)
class Nonzeros:
    """Sparsity of all parameters of a network, shared ones once."""

    tensors: tuple[TensorNonzeros, ...]

    @property
    def nonzeros(self) -> int:
        """Non-zeros of all parameters."""
        return sum(one.nonzeros for one in self.tensors)

    @property
    def size(self) -> int:
        """Entries of all parameters."""
        return sum(one.size for one in self.tensors)

    @property
    def rate(self) -> float:
        """Entries per non-zero; infinite if there is none."""
        return self.size / self.nonzeros if self.nonzeros else math.inf

    def bytes(self, layout: str) -> int:
        """Bytes of all tensors as "dense", "bitmask" or "csr"."""
        return sum(int(getattr(one, layout)) for one in self.tensors)

    def table(self, title: str = "") -> Table:
        """A row for every parameter, and one for the total."""
        rows = [_row(one.name, "x".join(map(str, one.shape)), one.nonzeros, one.size) for one in self.tensors]
        sizes = [(one.dense, one.bitmask, one.csr) for one in self.tensors]
        rows.append(_row("all", f"{self.rate:.2f} x fewer", self.nonzeros, self.size))
        sizes.append((self.bytes("dense"), self.bytes("bitmask"), self.bytes("csr")))
        head = ("parameter", "shape", "non-zeros", "share", "pruned", "dense bytes", "as bitmask", "as CSR")
        cells = [(*row, *(f"{n:,}" for n in size)) for row, size in zip(rows, sizes, strict=True)]
        return Table(title, head, tuple(cells))


def nonzeros(model: nn.Module) -> Nonzeros:
    """Count the non-zeros of every parameter of a network, with masks applied.

    Weights of sparse layers count under the name and in the shape of the dense weight; so do those of
    quantised layers, by their codes and without their scales, and those with a codebook.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    Nonzeros
        ``table()`` shows non-zeros, their share, the pruned, and the bytes dense, as a bitmask and as CSR.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> ps.mask_weights(model, {"0": torch.eye(64, 16, dtype=torch.bool)})
    >>> found = ps.nonzeros(model)
    >>> found.nonzeros, found.size, found.bytes("csr")
    (340, 1348, 3016)
    """
    check_model("model", model)
    plain = unshared(unmasked(model))
    owners: dict[int, SparseWeight | QuantWeight] = {}
    for layer in plain.modules():
        if isinstance(layer, SparseWeight):
            owners[id(layer.values)] = layer
        elif isinstance(layer, QuantWeight):
            owners[id(layer.scales)] = layer
    return Nonzeros(tuple(_counted(name, one, owners.get(id(one))) for name, one in plain.named_parameters()))


def padding(model: nn.Module) -> dict[str, int]:
    """Entries in rows of zeros of embeddings' weights: they stand for padding, and nothing was removed."""
    found: dict[str, int] = {}
    for name, module in unshared(model).named_modules():
        if isinstance(module, EMBEDDINGS):
            found[f"{name}.weight".lstrip(".")] = int(zero_rows(module.weight).sum()) * module.weight.shape[1]
    return {name: count for name, count in found.items() if count}


def zero_rows(weight: torch.Tensor) -> torch.Tensor:
    """(n,) which rows of a weight are all zero."""
    return ~weight.detach().flatten(1).any(1)


def _counted(name: str, parameter: torch.Tensor, layer: SparseWeight | QuantWeight | None) -> TensorNonzeros:
    """Sparsity of a parameter, or of the weight whose stored values or scales it is."""
    count, size = int(torch.count_nonzero(parameter.detach())), parameter.itemsize
    if layer is None:
        return TensorNonzeros(name, tuple(parameter.shape), count, size)
    if isinstance(layer, QuantWeight):
        count, size = layer.nonzeros(), layer.codes.itemsize
    return TensorNonzeros(f"{name.rpartition('.')[0]}.weight".lstrip("."), tuple(layer.shape), count, size)


def _row(name: str, shape: str, count: int, size: int) -> tuple[str, ...]:
    share = f"{100 * count / size:.2f} %" if size else ""
    return name, shape, f"{count:,}", share, f"{size - count:,}"
