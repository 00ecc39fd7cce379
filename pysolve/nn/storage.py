"""Tensors and a record of them in one file: written whole or not at all, and read with distrust."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pysolve.errors import DataError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEY = "pysolve"
_SEALED = re.compile(r'\{"checksum":(\d{1,10}),"record":(.*)\}', re.DOTALL)
# Lists and objects take up to fifty times the memory of their JSON, and no network needs so many.
_PARTS = 1_000_000
# Reading a header takes some four times its size: of a file it may be a quarter, and so much more.
_HEADER, _HEADER_SHARE = 2_000_000, 4
# What comes of data types that torch does not have.
_LACKING = (AttributeError, KeyError, TypeError)


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a ``.safetensors`` file with a record in its metadata.

    The metadata has one entry, ``pysolve``: JSON of ``{"checksum": n, "record": {…}}`` with the CRC-32 of the
    record's text. To the record belong the ``checksums`` of all tensors, which are added here.

    An existing file is replaced only once the new one is complete and on the disk.

    Raises
    ------
    DataError
        When there would be more record than ``read`` takes.
    """
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps(
        {**record, "checksums": checksums}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    sealed = f'{{"checksum":{zlib.crc32(text.encode())},"record":{text}}}'
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        # The library makes files that their owner alone may read; ours are as open as any other.
        with open(part, "xb") as empty:
            mode = os.fstat(empty.fileno()).st_mode
        save_file(dict(tensors), part, metadata={_KEY: sealed})
        _check_header(part)
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors, whose checksums are right, of a file that ``write`` wrote.

    Raises
    ------
    DataError
        When the file is another one, or damaged. Nothing larger than the file is allocated before.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            record = _opened((file.metadata() or {}).get(_KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_sums(tensors, record.get("checksums"))
    # RuntimeError: JSON that is nested too deeply.
    except (DataError, SafetensorError, ValueError, RuntimeError, *_LACKING) as error:
        why = str(error).rstrip(".")
        raise DataError(
            f"{path} is no file written by pysolve.save, or it is damaged: {why}. Save the network again, or "
            "copy the file anew."
        ) from error
    return record, tensors


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as integers of the same size."""
    return in_order(tensor).view(_BITS[tensor.itemsize])


def in_order(tensor: Tensor) -> Tensor:
    """On the CPU, as a file has it; conjugates and negatives, which torch only marks as such, carried out."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise DataError(f"its header should take {length} bytes, but the file has {size}.")
    if length > _HEADER + size // _HEADER_SHARE:
        raise DataError(f"its header takes {length} of its {size} bytes, more than a quarter and 2 MB.")


def _opened(text: str | None) -> dict[str, Any]:
    """The record, from the metadata."""
    sealed = _SEALED.fullmatch(text or "")
    if sealed is None:
        raise DataError("it has no record of a compressed network.")
    if zlib.crc32(sealed[2].encode()) != int(sealed[1]):
        raise DataError("the checksum of its record is wrong.")
    if sum(map(sealed[2].count, ",[{")) > _PARTS:
        raise DataError(f"its record has more than {_PARTS} parts.")
    record = json.loads(sealed[2])
    if not isinstance(record, dict):
        raise DataError("its record is no JSON object.")
    return record


def _check_sums(tensors: Mapping[str, Tensor], checksums: Any) -> None:
    if not isinstance(checksums, dict) or set(checksums) != set(tensors):
        raise DataError("its tensors are not those that its record names.")
    for name, tensor in tensors.items():
        if checksums[name] != _checksum(tensor):
            raise DataError(f"the checksum of {name} is wrong.")


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of data type, shape and bytes."""
    start = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content: Any = bits(tensor).numpy()
    return zlib.crc32(content, start)
