"""Datasets come in the shape the networks expect, and damaged files are told from good ones."""

import contextlib
import gzip
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pysolve.datasets import Dataset, digits, mnist, read_idx
from pysolve.errors import DataError

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array):
    """The bytes of an IDX file."""
    array = np.asarray(array)
    head = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim]) + struct.pack(
        f">{array.ndim}I", *array.shape
    )
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, *, dot="-", packed=True, images=6):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for kind, values in (
            ("images", rng.integers(0, 256, (images, 4, 3), dtype=np.uint8)),
            ("labels", rng.integers(0, 10, images, dtype=np.uint8)),
        ):
            name = f"{part}-{kind}{dot}idx{values.ndim}-ubyte"
            path, content = folder / (name + ".gz" * packed), idx(values)
            path.write_bytes(gzip.compress(content) if packed else content)


@given(
    st.sampled_from(list(CODES)).flatmap(
        lambda code: arrays.arrays(np.dtype(code), arrays.array_shapes(max_dims=4, max_side=5))
    ),
    st.booleans(),
)
def test_reading_gives_back_what_was_written(tmp_path_factory, array, packed):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = read_idx(path)
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_read_or_refused_but_never_crash(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        read_idx(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left", [0, 3, 6, 15, 27, 39])
def test_a_truncated_file_is_a_data_error(tmp_path, left, packed):
    content = idx(np.ones((2, 3, 4), np.uint8))
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content[:left]) if packed else content[:left])
    with pytest.raises(DataError, match="file"):
        read_idx(path)


def test_a_truncated_or_damaged_gzip_file_is_a_data_error(tmp_path):
    content = gzip.compress(idx(np.arange(200, dtype=np.uint8)))
    flipped = bytearray(content)
    flipped[-6] ^= 0xFF
    for bad in (content[:-12], content[:15], bytes(flipped)):
        (tmp_path / "file.gz").write_bytes(bad)
        with pytest.raises(DataError, match="gzip"):
            read_idx(tmp_path / "file.gz")


def test_bytes_after_the_data_are_a_data_error(tmp_path):
    (tmp_path / "file").write_bytes(idx(np.ones(5, np.uint8)) + b"x")
    with pytest.raises(DataError, match="holds more"):
        read_idx(tmp_path / "file")


def test_a_header_that_lies_about_the_size_costs_no_memory(tmp_path):
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1)
    for content in (head + b"12345", gzip.compress(head + b"12345")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(DataError, match="only 5"):
            read_idx(tmp_path / "file")


@pytest.mark.parametrize("magic", [b"\0\0\x07\1", b"\1\0\x08\1", b"\0\0\x08\0", b"PNG!", b""])
def test_a_wrong_magic_number_is_a_data_error(tmp_path, magic):
    (tmp_path / "file").write_bytes(magic + b"\0\0\0\1x" * bool(magic))
    with pytest.raises(DataError, match="not an IDX file"):
        read_idx(tmp_path / "file")


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("below", ["", "MNIST/raw", "FashionMNIST/raw"])
def test_mnist_is_found_under_every_usual_name(tmp_path, below, dot, packed):
    write_mnist(tmp_path / "set" / below, dot=dot, packed=packed)
    data = mnist(tmp_path / "set")
    assert data.x_train.shape == data.x_test.shape == (6, 1, 4, 3)
    assert data.x_train.dtype == np.float32
    assert data.y_train.dtype == np.int64
    assert data.name == (below.partition("/")[0] or "set")


def test_mnist_is_normalised(tmp_path):
    write_mnist(tmp_path)
    raw = read_idx(tmp_path / "train-images-idx3-ubyte.gz")
    expected = (raw[:, None] / 255 - 0.5) / 0.25
    np.testing.assert_allclose(mnist(tmp_path, mean=0.5, std=0.25).x_train, expected, atol=1e-6)


def test_the_missing_file_is_named_with_the_place(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=f"t10k-labels-idx1-ubyte.*{tmp_path}"):
        mnist(tmp_path)


def test_a_folder_without_the_files_lists_where_it_looked(tmp_path):
    with pytest.raises(DataError, match=r"MNIST/raw"):
        mnist(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        mnist(tmp_path / "nothing")


def test_images_and_labels_must_belong_together(tmp_path):
    write_mnist(tmp_path, packed=False)
    labels, images = tmp_path / "train-labels-idx1-ubyte", tmp_path / "train-images-idx3-ubyte"
    good = labels.read_bytes()
    for bad in (np.ones(5, np.uint8), np.ones((6, 1), np.uint8), np.ones(6, np.float32)):
        labels.write_bytes(idx(bad))
        with pytest.raises(DataError, match="one label for each of 6"):
            mnist(tmp_path)
    labels.write_bytes(good)
    images.write_bytes(idx(np.ones((6, 12), np.uint8)))
    with pytest.raises(DataError, match="8-bit grey images"):
        mnist(tmp_path)


def test_digits_are_split_by_class_and_normalised():
    data = digits()
    assert len(data.x_train) + len(data.x_test) == 1797
    assert data.x_train.shape[1:] == (1, 8, 8)
    assert data.x_train.dtype == np.float32
    assert data.x_train.mean() == pytest.approx(0, abs=1e-5)
    assert data.x_train.std() == pytest.approx(1, abs=1e-5)
    for label in range(10):
        train, test = (data.y_train == label).sum(), (data.y_test == label).sum()
        assert train / (train + test) == pytest.approx(0.8, abs=0.01)


def test_the_seed_decides_the_split():
    first, again, other = digits(0), digits(0), digits(1)
    np.testing.assert_array_equal(first.x_test, again.x_test)
    assert not np.array_equal(first.y_test, other.y_test)


def test_no_digit_is_in_both_halves():
    data = digits()
    both = np.concatenate([data.x_train, data.x_test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    images = load_digits().data
    mean, std = -both.min(), (both.max() - both.min()) / 16
    restored = np.rint((both + mean) / std)
    assert sorted(map(tuple, restored)) == sorted(map(tuple, images))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pysolve\[demo\]"):
        digits()


def test_a_dataset_checks_its_shapes():
    x, y = np.zeros((2, 1, 3, 3), np.float32), np.zeros(2, np.int64)
    with pytest.raises(DataError, match="test split"):
        Dataset("tiny", x, y, x, y[:1])
    with pytest.raises(DataError, match="train split"):
        Dataset("tiny", x[:0], y[:0], x, y)


@pytest.mark.mnist
def test_real_mnist_has_its_known_size_and_mean(mnist_folder):
    data = mnist(mnist_folder)
    assert data.x_train.shape == (60000, 1, 28, 28)
    assert data.x_test.shape == (10000, 1, 28, 28)
    assert data.x_train.mean() == pytest.approx(0, abs=1e-3)
    assert data.x_train.std() == pytest.approx(1, abs=1e-3)
    assert list(data.y_test[:5]) == [7, 2, 1, 0, 4]
