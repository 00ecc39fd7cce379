"""Small image sets for the demo, the examples and the tests, as NumPy arrays; nothing is downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pysolve.cli.image_files import read_idx, read_jpegs
from pysolve.errors import DataError

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# Mean and standard deviation of each colour over ImageNet's training pixels, scaled to 0 … 1.
_COLORS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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

    Examples
    --------
    >>> import pysolve as ps
    >>> data = ps.digits()
    >>> data.x_train.shape, data.y_test.shape
    ((1438, 1, 8, 8), (359,))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits data come with scikit-learn, which is not installed: pip install "
            "'pysolve-compress[demo]'."
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

    Examples
    --------
    >>> import pysolve as ps
    >>> data = ps.mnist("mnist")
    >>> data.x_train.shape
    (60000, 1, 28, 28)
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
    """Existing spellings of one file's name."""
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


def cifar(folder: str | os.PathLike[str], *, train: int | None = None) -> Dataset:
    """CIFAR-10, or any set of colour images, as JPEG files packed into two .npz files.

    Colours are normalised by ImageNet's mean and standard deviation, as published networks expect them.

    Parameters
    ----------
    folder : path
        Holds one ``train*.npz`` and one ``test*.npz``, both with ``jpeg``, ``offsets`` and ``labels``.
    train : int, optional
        How many training images to read, from the first on; all by default.

    Examples
    --------
    >>> import pysolve as ps
    >>> data = ps.cifar("cifar10_jpeg", train=100)
    >>> data.x_train.shape
    (100, 3, 32, 32)
    """
    place = Path(folder).resolve()
    x_train, y_train = _colors(_archive(place, "train"), train)
    x_test, y_test = _colors(_archive(place, "test"), None)
    return Dataset(place.name, x_train, y_train, x_test, y_test)


def _archive(place: Path, part: str) -> Path:
    """The one .npz file of ``train`` or ``test``."""
    if not place.is_dir():
        raise DataError(f"{place} is not a folder; expected one with a train*.npz and a test*.npz file.")
    paths = sorted(place.glob(f"{part}*.npz"))
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise DataError(f"{place} must hold one {part}*.npz file, found {found}.")
    return paths[0]


def _colors(path: Path, limit: int | None) -> tuple[Images, Labels]:
    """Normalised images, colours first, and labels."""
    images, labels = read_jpegs(path, limit=limit)
    x = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    mean, std = (np.array(values, np.float32)[:, None, None] for values in _COLORS)
    # In place: 50,000 images are 614 MB in float32.
    x /= 255 * std
    x -= mean / std
    return x, labels
