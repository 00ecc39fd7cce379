"""Datasets come in the shape the networks expect, and missing files are named."""

import io
import sys

import numpy as np
import pytest
from files import idx, jpegs, write_jpegs, write_mnist
from PIL import Image

from pysolve.cli.datasets import Dataset, cifar, digits, mnist
from pysolve.cli.image_files import read_idx
from pysolve.errors import DataError


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


def write_cifar(folder, files=None):
    folder.mkdir(parents=True, exist_ok=True)
    write_jpegs(folder / "train_5.npz", files)
    write_jpegs(folder / "test_3.npz", jpegs(3))
    return folder


def test_colour_images_come_colours_first_with_labels(tmp_path):
    data = cifar(write_cifar(tmp_path / "colours"))
    assert data.name == "colours"
    assert data.x_train.shape == (5, 3, 6, 8)
    assert data.x_test.shape == (3, 3, 6, 8)
    assert data.x_train.dtype == np.float32
    assert data.x_train.flags.c_contiguous
    assert data.y_train.dtype == np.int64
    np.testing.assert_array_equal(data.y_test, [0, 1, 2])


def test_colours_are_normalised_by_the_mean_and_deviation_of_imagenet(tmp_path):
    files = jpegs()
    x = cifar(write_cifar(tmp_path, files)).x_train
    pixels = np.asarray(Image.open(io.BytesIO(files[4])))
    for c, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        np.testing.assert_allclose(x[4, c], (pixels[..., c] / 255 - mean) / std, atol=1e-5)


def test_only_some_training_images_are_read_on_demand(tmp_path):
    everything, some = cifar(write_cifar(tmp_path)), cifar(tmp_path, train=2)
    np.testing.assert_array_equal(some.x_train, everything.x_train[:2])
    np.testing.assert_array_equal(some.x_test, everything.x_test)


def test_a_cifar_folder_holds_one_file_of_each_part(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        cifar(tmp_path / "nothing")
    write_cifar(tmp_path)
    write_jpegs(tmp_path / "train_more.npz")
    with pytest.raises(DataError, match=r"one train\*.npz file, found train_5.npz, train_more.npz"):
        cifar(tmp_path)
    (tmp_path / "train_more.npz").unlink()
    (tmp_path / "test_3.npz").unlink()
    with pytest.raises(DataError, match=r"one test\*.npz file, found none"):
        cifar(tmp_path)


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
    with pytest.raises(ImportError, match=r"pysolve-compress\[demo\]"):
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


@pytest.mark.data
def test_real_recompressed_cifar_has_its_known_size_and_classes(data_folder):
    data = cifar(data_folder / "cifar10_jpeg", train=1000)
    assert data.x_train.shape == (1000, 3, 32, 32)
    assert data.x_test.shape == (5000, 3, 32, 32)
    np.testing.assert_array_equal(np.bincount(data.y_test), [500] * 10)
    assert data.x_test.mean((0, 2, 3)) == pytest.approx([0.055, 0.145, 0.213], abs=2e-3)
