"""Images are read as they were written, and damaged files are told from good ones."""

import contextlib
import gzip
import io
import struct
import sys

import numpy as np
import pytest
from files import CODES, idx, jpegs, write_jpegs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pysolve.cli.image_files import read_idx, read_jpegs
from pysolve.errors import DataError


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


def test_jpeg_images_come_as_pillow_decodes_them(tmp_path):
    files = jpegs()
    images, labels = read_jpegs(write_jpegs(tmp_path / "set.npz", files))
    assert images.dtype == np.uint8
    assert images.shape == (5, 6, 8, 3)
    assert labels.dtype == np.int64
    for image, file in zip(images, files, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(file))))
    np.testing.assert_array_equal(labels, np.arange(5))


@pytest.mark.parametrize("limit", [1, 3, 5, 9])
def test_a_limit_keeps_the_first_images(tmp_path, limit):
    path = write_jpegs(tmp_path / "set.npz")
    images, labels = read_jpegs(path, limit=limit)
    everything, all_labels = read_jpegs(path)
    np.testing.assert_array_equal(images, everything[:limit])
    np.testing.assert_array_equal(labels, all_labels[:limit])


def test_grey_images_come_in_three_equal_colours(tmp_path):
    images, _ = read_jpegs(write_jpegs(tmp_path / "set.npz", jpegs(mode="L")))
    assert images.shape == (5, 6, 8, 3)
    assert (images == images[..., :1]).all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": None}, "labels is not"),
        ({"jpeg": np.zeros(9)}, "row of bytes, got float64"),
        ({"labels": np.zeros(5)}, "rows of integers"),
        ({"labels": np.zeros(0, np.uint8), "offsets": np.zeros(1, np.int64)}, "at least one label"),
        ({"labels": np.zeros(4, np.uint8)}, "5 ascending numbers"),
        ({"offsets": np.array([0, 9, 3, 4, 5, 6])}, "6 ascending numbers"),
        ({"offsets": np.array([0, 1, 2, 3, 4, 10**9])}, "to 1000000000"),
        ({"offsets": np.array([-1, 1, 2, 3, 4, 5])}, "from -1"),
        ({"offsets": np.array([0, 1, 2, 3, 4, 5], object)}, "damaged"),
    ],
)
def test_arrays_that_do_not_belong_together_are_a_data_error(tmp_path, changes, problem):
    with pytest.raises(DataError, match=rf"set\.npz.*{problem}"):
        read_jpegs(write_jpegs(tmp_path / "set.npz", **changes))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    good, png = jpegs(), io.BytesIO()
    Image.new("RGB", (8, 6)).save(png, "PNG")
    for bad in (png.getvalue(), b"", good[2][:-40], jpegs(size=(6, 8))[0]):
        path = write_jpegs(tmp_path / "set.npz", [*good[:2], bad, *good[2:]])
        with pytest.raises(DataError, match=r"image 2 of .*set\.npz"):
            read_jpegs(path)


def test_another_size_is_told_with_both_sizes(tmp_path):
    with pytest.raises(DataError, match="it is 8 x 6, the first one 6 x 8"):
        read_jpegs(write_jpegs(tmp_path / "set.npz", [*jpegs(), *jpegs(size=(6, 8))]))


@given(st.data())
def test_damage_anywhere_is_read_or_refused_but_never_crashes(tmp_path_factory, data):
    path = write_jpegs(tmp_path_factory.mktemp("jpegs") / "set.npz")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    with contextlib.suppress(DataError):
        read_jpegs(path)


def test_an_archive_that_points_before_its_beginning_is_a_data_error(tmp_path):
    path = write_jpegs(tmp_path / "set.npz")
    content = bytearray(path.read_bytes())
    # The directory of a zip file ends with its own place in it: 16 bytes into a record of 22.
    content[-6:-2] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged one"):
        read_jpegs(path)


def test_a_missing_archive_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_jpegs(tmp_path / "set.npz")


def test_something_else_than_an_archive_is_a_data_error(tmp_path):
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.npz").write_text("")
    for name in ("array.npy", "text.npz", "empty.npz"):
        with pytest.raises(DataError, match=rf"{name} is no \.npz file"):
            read_jpegs(tmp_path / name)


def test_without_pillow_the_error_names_the_extra(tmp_path, monkeypatch):
    path = write_jpegs(tmp_path / "set.npz")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pysolve-compress\[bench\]"):
        read_jpegs(path)
