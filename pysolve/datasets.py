"""Small image sets for the demo, the examples and the tests, as NumPy arrays; nothing is downloaded."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pysolve.errors import DataError

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# Element type by the third byte of an IDX file; the format is big-endian.
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PIECE = 1 << 24


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images with labels, split into a training and a test half.

    Parameters
    ----------
    name : str
    x_train, x_test : (n, channels, height, width) float32 arrays
        Images, normalised as the reference networks expect them.
    y_train, y_test : (n,) int64 arrays
        Class of each image.
    """

    name: str
    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels

    def __post_init__(self) -> None:
        for x, y, part in ((self.x_train, self.y_train, "train"), (self.x_test, self.y_test, "test")):
            if x.ndim != 4 or y.shape != x.shape[:1] or not len(x):
                raise DataError(
                    f"{self.name}: the {part} split must be (n, channels, height, width) images with one "
                    f"label each, got {x.shape} and {y.shape}."
                )


def digits(seed: int = 0) -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn contains, four fifths of each class for training.

    Parameters
    ----------
    seed : int
        Decides which images are tested on.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data come with scikit-learn, which is not installed: pip install 'pysolve[demo]'."
        ) from error
    images, labels = load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    train, test = _stratified(labels, np.random.default_rng(seed))
    x = images.reshape(-1, 1, 8, 8)
    x = ((x - x[train].mean()) / x[train].std()).astype(np.float32)
    return Dataset("digits", x[train], labels[train], x[test], labels[test])


def _stratified(
    labels: Labels, rng: np.random.Generator
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Shuffled indices of four fifths of every class, and of the rest."""
    train, test = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(0.8 * len(members))
        train.append(members[:cut])
        test.append(members[cut:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def mnist(folder: str | os.PathLike[str], *, mean: float = 0.1307, std: float = 0.3081) -> Dataset:
    """MNIST, or any set published as the same four IDX files.

    Parameters
    ----------
    folder : path
        Holds the files, plain or gzipped, named ``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``
        and so on; they may also lie in torchvision's ``MNIST/raw`` or ``FashionMNIST/raw`` below it.
    mean, std : float
        Of the training pixels, scaled to 0 … 1. The defaults are MNIST's; Fashion-MNIST has 0.2860, 0.3530.
    """
    place = _idx_folder(Path(folder))
    x_train, y_train = _split(place, "train", mean, std)
    x_test, y_test = _split(place, "t10k", mean, std)
    return Dataset(place.parent.name if place.name == "raw" else place.name, x_train, y_train, x_test, y_test)


def _idx_folder(folder: Path) -> Path:
    """The folder that holds IDX files: the one given, or torchvision's below it."""
    places = (folder, folder / "MNIST" / "raw", folder / "FashionMNIST" / "raw")
    for place in places:
        if any(_idx_names(place, part, kind) for part in ("train", "t10k") for kind in ("images", "labels")):
            return place.resolve()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with the four MNIST files.")
    raise DataError(
        f"{folder} holds none of train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        f"t10k-labels-idx1-ubyte, plain or .gz; also looked in {places[1]} and {places[2]}."
    )


def _idx_names(place: Path, part: str, kind: str) -> list[Path]:
    """Which spellings of one file's name exist."""
    dims = {"images": 3, "labels": 1}[kind]
    paths = [place / f"{part}-{kind}{dot}idx{dims}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return [path for path in paths if path.is_file()]


def _split(place: Path, part: str, mean: float, std: float) -> tuple[Images, Labels]:
    """Images and labels of ``train`` or ``t10k``."""
    paths = {}
    for kind, dims in (("images", 3), ("labels", 1)):
        found = _idx_names(place, part, kind)
        if not found:
            raise DataError(f"{part}-{kind}-idx{dims}-ubyte (plain or .gz) is missing in {place}.")
        paths[kind] = found[0]
    images, labels = read_idx(paths["images"]), read_idx(paths["labels"])
    if images.ndim != 3 or images.dtype != np.uint8:
        raise DataError(
            f"{paths['images']} must hold 8-bit grey images, got {images.dtype} of {images.shape}."
        )
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{paths['labels']} must hold one label for each of {len(images)} images, "
            f"got {labels.dtype} of {labels.shape}."
        )
    x = images[:, None].astype(np.float32)
    # In place: the 60,000 training images are 188 MB in float32.
    x /= 255 * std
    x -= mean / std
    return x, labels.astype(np.int64)


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.generic]:
    """Read one IDX file, plain or gzipped (told by its content, not its name).

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
