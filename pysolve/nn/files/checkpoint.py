"""Compressed networks in files: a plan's shapes and the tensors, from which the original makes them again."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from pysolve import __version__
from pysolve.compressed import Compressed
from pysolve.errors import DataError, PysolveError, path_of
from pysolve.nn.files.architecture import (
    architecture,
    check_places,
    fingerprint,
    modes_record,
    ordinary,
    rebuilt,
    restore_modes,
)
from pysolve.nn.files.format1 import Packed, pack, unpack
from pysolve.nn.files.format2 import compact, expanded
from pysolve.nn.files.plan_json import field, plain, typed
from pysolve.nn.files.storage import bits, read, size, write
from pysolve.nn.plain import unwrapped
from pysolve.nn.running import check_model
from pysolve.nn.state import with_values

Record = dict[str, object]
# Format versions: with each tensor for itself, and in one coded stream.
PLAIN, CODED = 1, 2
CODINGS = ("auto", "ans", "huffman", "none")
# Digits of a report's numbers in a coded file.
_DIGITS = 5


def save(
    compressed: Compressed, path: str | os.PathLike[str], *, coding: str = "auto", report: bool = False
) -> None:
    """Write a compressed network to one ``.safetensors`` file, from which ``load`` makes it again.

    The file holds the tensors of ``compressed.model.state_dict()``, as they are now: after fine-tuning, that
    is what is saved, to the bit. Each is written in the way that takes the fewest bytes: as it is; as a table
    of its different values and entropy-coded numbers of those; without its zeros; or with the bytes of its
    entries apart. Tensors under several names are stored once, of layers that are masked or share values only
    the weights in use; ``load`` masks them again where they are zero, and has them share the values in use.
    What else is needed to make the network again is a record beside them: see ``docs/format.md``, by which
    other programs can read these files.

    Parameters
    ----------
    compressed : Compressed
        From ``compress``, ``prune`` or another method. Without a fingerprint, ``load`` recognises a wrong
        original only by shapes that do not fit.
    path : str or path
        An existing file is replaced once the new one is complete.
    coding : "auto", "ans", "huffman" or "none"
        How numbers are entropy-coded: by asymmetric numeral systems, for which constriction is needed here
        and to load the file (``pip install 'pysolve-compress[coding]'``), or by Huffman's codes. "auto" is
        the first of them that is installed. "none" writes format 1: all tensors are the file's own, some
        without their zeros, and the record is plain.
    report : bool
        Whether the record holds the report, too: some hundred bytes more, and, as a report has timings, other
        bytes in each run. Without, the same network makes the same file.

    Raises
    ------
    PysolveError
        When the network holds what such files cannot, for example tensors without values.
    ImportError
        "ans" without constriction.
    TypeError, ValueError
        For anything but a ``Compressed``; for an unknown coding.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> smaller = ps.compress(model, batches, keep=0.5, latency=False)
    >>> ps.save(smaller, "smaller.safetensors")
    """
    write(path_of("path", path), *_content(compressed, coding, report))


def file_bytes(compressed: Compressed, *, coding: str = "auto", report: bool = False) -> int:
    """Bytes of the file that ``save`` would write, exactly; parameters and errors as there.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> from pathlib import Path
    >>> smaller = ps.compress(model, batches, keep=0.5, latency=False)
    >>> ps.save(smaller, "smaller.safetensors")
    >>> ps.file_bytes(smaller) == Path("smaller.safetensors").stat().st_size
    True
    """
    return size(*_content(compressed, coding, report))


def stored_bytes(model: nn.Module, coding: str = "auto") -> dict[str, int]:
    """Bytes of each tensor of a network in a file that ``save`` writes.

    Parameters
    ----------
    model : nn.Module
    coding : str
        As in ``save``.

    Returns
    -------
    {state-dict name: int}
        Bytes of tables and data, without the record: 0 for a tensor of one value, for further
        names of a tensor, and for the indices of a sparse layer.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> ps.stored_bytes(torch.nn.BatchNorm1d(64))["weight"]  # all of them are 1
    0
    """
    check_model("model", model)
    model, kind = ordinary(model), _kind(coding)
    packed = compact(model, kind) if kind else pack(model)
    return dict.fromkeys(model.state_dict(), 0) | packed.sizes


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
    ImportError
        When the file needs constriction, which is not installed.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> batches = [torch.randn(100, 16) for _ in range(5)]
    >>> smaller = ps.compress(model, batches, keep=0.5, latency=False)
    >>> ps.save(smaller, "smaller.safetensors")
    >>> restored = ps.load("smaller.safetensors", model)
    >>> torch.equal(restored(batches[0]), smaller.model(batches[0]))
    True
    """
    return restored(path, model)


def restored(path: str | os.PathLike[str], model: nn.Module, *, empty: bool = False) -> nn.Module:
    """As ``load``; with ``empty``, parameters of ``model`` may be on the meta device."""
    _check_kind("model", model, nn.Module, "the original network, a torch.nn.Module")
    record, tensors = read(path_of("path", path))
    version = record.get("version")
    if type(version) is not int or version not in (PLAIN, CODED):
        raise DataError(
            f"{path} has format version {str(version)[:20]}, but this pysolve reads versions {PLAIN} and "
            f"{CODED}: update pysolve, or save the network anew."
        )
    try:
        model = ordinary(unwrapped(model))
        _check_original(record, model)
        network = rebuilt(record, model)
        network = with_values(network) if empty else network
        _fill(network, _values(record, tensors, network))
        check_places(network)
        restore_modes(network, record)
    except ImportError as error:
        raise ImportError(f"{path} cannot be read: {error}") from error
    except (PysolveError, ValueError, TypeError, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise DataError(f"{path} does not fit this {type(model).__name__}: {why}.") from error
    return network


def _content(compressed: Compressed, coding: str, report: bool) -> tuple[dict[str, Tensor], Record]:
    """Tensors and record of a file."""
    _check_kind("compressed", compressed, Compressed, "what compress or prune returned")
    model, kind = ordinary(compressed.model), _kind(coding)
    modes = modes_record(compressed.model, model)
    compressed = replace(compressed, model=model)
    record: Record = {
        "version": CODED if kind else PLAIN,
        "pysolve": __version__,
        "original": compressed.fingerprint,
        **architecture(compressed),
        **modes,
    }
    packed = compact(model, kind) if kind else pack(model)
    record |= {"rows" if kind else "shapes": packed.table, "aliases": packed.aliases}
    if report:
        rows = plain(compressed.report.brief().as_dict())
        record["report"] = _rounded(rows) if kind else rows
    return packed.tensors, record


def _values(record: Record, tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state dict that a file holds for a network."""
    what, made = ("shapes", unpack) if record["version"] == PLAIN else ("rows", expanded)
    table, aliases = (typed(field(record, name), dict, name) for name in (what, "aliases"))
    return made(Packed(tensors, table, aliases), network)


def _kind(coding: str) -> str:
    """The entropy coder; nothing for files without."""
    if coding not in CODINGS:
        raise ValueError(f"unknown coding {coding!r}; choose one of {', '.join(CODINGS)}.")
    if coding == "auto":
        return "ans" if find_spec("constriction") else "huffman"
    return "" if coding == "none" else coding


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _check_kind(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}.")


def _check_original(record: Record, model: nn.Module) -> None:
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


def _fill(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put the values in place; data types follow them."""
    own = network.state_dict(keep_vars=True)
    types: dict[tuple[str, torch.dtype], torch.dtype] = {}
    for name, tensor in values.items():
        target = own[name]
        if target.is_meta:
            raise DataError(f"{name} is on the meta device. Make the original where it can hold values.")
        floats = target.is_floating_point() and tensor.is_floating_point()
        if target.dtype != tensor.dtype and not floats:
            raise DataError(f"expected {name} in {target.dtype}, got {tensor.dtype}.")
        # A network may have been converted since, but no layer in part.
        if tensor.is_floating_point():
            layer = name.rpartition(".")[0], target.dtype
            if types.setdefault(layer, tensor.dtype) != tensor.dtype:
                raise DataError(f"expected {name} in {types[layer]}, as its layer is, got {tensor.dtype}.")
        if target.dtype != tensor.dtype:
            target.data = target.data.to(tensor.dtype)
    state = OrderedDict(values)
    # Without versions, layers take their values for older ones, and some rebuild themselves.
    state._metadata = own._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state)
    for name, tensor in network.state_dict().items():
        if not torch.equal(bits(tensor), bits(values[name])):
            raise DataError(f"{name} shares its memory with a tensor of other values in the file.")
