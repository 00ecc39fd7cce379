"""Files of images to NumPy arrays: IDX files, and JPEG images packed into .npz files."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pysolve.errors import DataError

# Element type by the third byte of an IDX file; the format is big-endian.
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PIECE = 1 << 24

# NumPy and zipfile raise these for files that are no archive of arrays, or damaged ones; OSError where a
# damaged one points before its own beginning.
_DAMAGED = (OSError, ValueError, EOFError, TypeError, MemoryError, RuntimeError, BadZipFile, zlib.error)

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.generic]:
    """Read one IDX file, plain or gzipped (recognised by its content, not its name).

    Raises DataError when the file is not one, or holds more or less than its header says.

    References
    ----------
    Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits: file format.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":
                with gzip.open(file) as unpacked:
                    return _parse_idx(unpacked, path)
            return _parse_idx(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}. Fetch it again.") from error


def _parse_idx(file: BinaryIO | gzip.GzipFile, path: Path) -> npt.NDArray[np.generic]:
    """Header, then exactly as many elements as it announces."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not magic[3]:
        raise DataError(f"{path} is not an IDX file: it starts with {magic.hex(' ') or 'nothing'}.")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path} ends inside its header. Fetch it again.")
    shape = struct.unpack(f">{magic[3]}I", header)
    dtype = np.dtype(_IDX_TYPES[magic[2]])
    size = math.prod(shape) * dtype.itemsize
    content = _read_at_most(file, size + 1)
    if len(content) != size:
        got = "more" if len(content) > size else f"only {len(content)}"
        raise DataError(f"{path} should hold {size} bytes of data for shape {shape}, but holds {got}.")
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_at_most(file: BinaryIO | gzip.GzipFile, size: int) -> bytearray:
    """Up to ``size`` bytes, in pieces, so that a header that lies about the size allocates nothing."""
    content = bytearray()
    while len(content) < size and (piece := file.read(min(_PIECE, size - len(content)))):
        content += piece
    return content


def read_jpegs(path: str | os.PathLike[str], *, limit: int | None = None) -> tuple[Bytes, Integers]:
    """The first ``limit`` RGB images (n, height, width, 3), of one size, and labels (n,) of an .npz file.

    It holds ``jpeg``, the bytes of all images one after another; ``offsets``, the n + 1 places among them
    where an image begins or ends; and ``labels``, one integer an image. Raises DataError when it does not.
    """
    path = Path(path)
    content, offsets, labels = _packed(path)
    labels = labels[:limit]
    images: list[Bytes] = []
    for i, (start, end) in enumerate(pairwise(offsets[: len(labels) + 1].tolist())):
        try:
            images.append(_decoded(content[start:end].tobytes(), images[0].shape if images else None))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {i} of {path} cannot be read: {error}.") from error
    return np.stack(images), labels.astype(np.int64)


def _packed(path: Path) -> tuple[Bytes, Integers, Integers]:
    """The bytes, offsets and labels of a file of packed images, checked to belong together."""
    with open(path, "rb") as file:
        try:
            with np.load(file) as arrays:
                content, offsets, labels = (arrays[name] for name in ("jpeg", "offsets", "labels"))
        except KeyError as error:
            raise DataError(f"{path} must hold jpeg, offsets and labels: {error.args[0]}.") from error
        except _DAMAGED as error:
            raise DataError(f"{path} is no .npz file, or a damaged one: {error}. Fetch it again.") from error
    if content.dtype != np.uint8 or content.ndim != 1:
        raise DataError(f"jpeg in {path} must be a row of bytes, got {content.dtype} of {content.shape}.")
    if any(a.dtype.kind not in "iu" or a.ndim != 1 for a in (offsets, labels)) or not len(labels):
        raise DataError(f"offsets and labels in {path} must be rows of integers, at least one label.")
    steps = np.diff(offsets.astype(np.int64), prepend=0, append=len(content))
    if len(offsets) != len(labels) + 1 or steps.min() < 0:
        raise DataError(
            f"offsets in {path} must be {len(labels) + 1} ascending numbers from 0 to {len(content)}, "
            f"got {len(offsets)} from {offsets.min()} to {offsets.max()}."
        )
    return content, offsets, labels


def _decoded(content: bytes, shape: tuple[int, ...] | None) -> Bytes:
    """One image, of the given (height, width, 3) unless that is None."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "JPEG images are read with Pillow, which is not installed: pip install 'pysolve-compress[bench]'."
        ) from error
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        # The size is in the header: a wrong one costs no memory.
        if shape is not None and (image.height, image.width) != shape[:2]:
            raise ValueError(f"it is {image.height} x {image.width}, the first one {shape[0]} x {shape[1]}")
        return np.asarray(image.convert("RGB"))
