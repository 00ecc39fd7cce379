"""Correlations of many layers in ``.safetensors`` files: written array by array, read when asked for."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from pysolve.correlations import AnyArray, Correlations, check_finite
from pysolve.errors import DataError, whole
from pysolve.nn.files.storage import check_length
from pysolve.whole_files import Json, replacing

_TYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_CHECKSUMS = "checksums"
# CRC-32 of the header, itself taken as zeros there; before everything else of the metadata.
_SEAL = b'{"__metadata__":{"crc32":"%08x",'
_SUMS = tuple(one.name for one in fields(Correlations) if one.name not in ("count", "group_size"))


@dataclass(frozen=True)
class Stored:
    """An array in a file, from a byte on, with the CRC-32 of its bytes."""

    path: Path
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    start: int
    checksum: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> AnyArray:
        """The array; read, not mapped, since mapped pages count as memory of the process."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                found = np.fromfile(file, self.dtype, math.prod(self.shape))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read any more: {error}.") from error
        if _checksum(found) != self.checksum:
            raise self.damaged("a checksum is wrong")
        return found.reshape(self.shape)

    def damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged: {why}. Copy it anew, or gather again.")


@dataclass(frozen=True)
class StoredSums:
    """The arrays of one layer's correlations, and what they count."""

    arrays: Mapping[str, Stored]
    count: int
    group_size: int

    def read(self) -> Correlations:
        """The correlations."""
        arrays = {name: one.read() for name, one in self.arrays.items()}
        try:
            found = Correlations(**arrays, count=self.count, group_size=self.group_size)
            check_finite(found)
        except (ValueError, DataError) as error:
            raise self.arrays["xx"].damaged(str(error).rstrip(".")) from error
        return found


@dataclass(frozen=True, eq=False)
class StoredCorrelations(Mapping[str, Correlations]):
    """Correlations by layer, each read from its file when asked for.

    Parameters
    ----------
    stored : {layer: StoredSums}
    home : object
        What the files are there as long as.
    """

    stored: Mapping[str, StoredSums]
    home: object = None

    def __getitem__(self, name: str) -> Correlations:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, name: object) -> bool:
        return name in self.stored


def some_of(correlations: Mapping[str, Correlations], names: Iterable[str]) -> Mapping[str, Correlations]:
    """Those of some layers, none of them read."""
    if isinstance(correlations, StoredCorrelations):
        stored = correlations.stored
        return replace(correlations, stored={name: stored[name] for name in names if name in stored})
    return {name: correlations[name] for name in names if name in correlations}


def write_arrays(path: Path, arrays: Mapping[str, AnyArray | Stored], metadata: Mapping[str, str]) -> None:
    """Write arrays and a file's metadata, one array in memory at a time.

    An existing file is replaced only once the new one is complete and on the disk.
    """
    sums = {name: one.checksum if isinstance(one, Stored) else _checksum(one) for name, one in arrays.items()}
    metadata = {"crc32": f"{0:08x}", **metadata, _CHECKSUMS: json.dumps(sums)}
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        places = [end, end := end + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": [*array.shape], "data_offsets": places}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = _SEAL % zlib.crc32(text) + text[len(_SEAL % 0) :]
    check_length(len(text), 8 + len(text) + end)
    with replacing(path, 8 + len(text) + end) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            values = array.read() if isinstance(array, Stored) else array
            file.write(_bytes(values))


def open_arrays(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The arrays of a ``.safetensors`` file, none of them read, and its metadata.

    Raises
    ------
    DataError
        The file is another one, or damaged.
    """
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > size - 8:
                raise ValueError(f"its header should take {length} bytes, but it has {size}")
            check_length(length, size)
            text = file.read(length)
        rest = text[len(_SEAL % 0) :]
        if text != _SEAL % zlib.crc32(_SEAL % 0 + rest) + rest:
            raise ValueError("the checksum of its header is wrong")
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        del metadata["crc32"]
        sums = json.loads(metadata.pop(_CHECKSUMS))
        if not all(isinstance(one, str) for one in metadata.values()):
            raise ValueError("its metadata are no texts")
        arrays, end = dict[str, Stored](), 8 + length
        for name, one in header.items():
            shape = tuple(whole("a size", n, 0, size) for n in one["shape"])
            arrays[name] = Stored(
                path, np.dtype(_TYPES[one["dtype"]]), shape, end, whole("a checksum", sums[name], 0)
            )
            places = [end - 8 - length, (end := end + arrays[name].nbytes) - 8 - length]
            if one["data_offsets"] != places:
                raise ValueError(f"{name} does not lie at bytes {places[0]} … {places[1]}")
        if end != size:
            raise ValueError(f"it should have {end} bytes, and has {size}")
    except FileNotFoundError:
        raise
    # RuntimeError: JSON that is nested too deeply.
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{path} is no file of sums, or it is damaged: {error}. Copy it anew, or gather again."
        ) from error
    return arrays, metadata


def sums_to_write(
    correlations: Mapping[str, Correlations],
) -> tuple[dict[str, AnyArray | Stored], dict[str, object]]:
    """Arrays of correlations, those that layers share once, and a record of whose they are."""
    arrays: dict[str, AnyArray | Stored] = {}
    names: dict[object, str] = {}
    record: dict[str, object] = {}
    on_disk = correlations.stored if isinstance(correlations, StoredCorrelations) else {}
    for layer in correlations:
        one: Correlations | StoredSums = on_disk[layer] if layer in on_disk else correlations[layer]
        own = {}
        for part in _SUMS:
            array = one.arrays[part] if isinstance(one, StoredSums) else getattr(one, part)
            key = array if isinstance(array, Stored) else id(array)
            own[part] = names.setdefault(key, f"{layer}:{part}")
            arrays[own[part]] = array
        record[layer] = {**own, "count": one.count, "group_size": one.group_size}
    return arrays, record


def sums_from(arrays: Mapping[str, Stored], record: Json) -> StoredCorrelations:
    """Correlations of a file's arrays and the record that ``sums_to_write`` gave.

    Raises KeyError, TypeError or ValueError for another record.
    """
    return StoredCorrelations({layer: _sums_of(arrays, one) for layer, one in record.items()})


def _sums_of(arrays: Mapping[str, Stored], record: Json) -> StoredSums:
    parts = {part: arrays[record[part]] for part in _SUMS}
    h, d = parts["yx"].shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "xx": [(d, d)],
        "yx": [(h, d)],
        "yy": [(h, h), (h,)],
        "x_sum": [(d,)],
        "y_sum": [(h,)],
    }
    for part, known in shapes.items():
        if parts[part].shape not in known or parts[part].dtype != np.float64:
            raise ValueError(f"{part} is of {parts[part].dtype} and shape {parts[part].shape}")
    count, size = whole("count", record["count"], 1, 2**62), whole("group_size", record["group_size"])
    if d % size:
        raise ValueError(f"{d} inputs are no groups of {size}")
    return StoredSums(parts, count, size)


def _checksum(values: AnyArray) -> int:
    return zlib.crc32(_bytes(values))


def _bytes(values: AnyArray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
