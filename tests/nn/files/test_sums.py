"""Arrays in files come back as they were, one at a time; what is damaged is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load_file

from pysolve.correlations import Correlations
from pysolve.errors import DataError
from pysolve.nn.files.sums import open_arrays, some_of, sums_from, sums_to_write, write_arrays

DTYPES = st.sampled_from(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"])
ARRAYS = DTYPES.flatmap(lambda kind: arrays_of.arrays(kind, arrays_of.array_shapes(min_dims=0, min_side=0)))


def correlations(seed, d=3, h=2):
    rng = np.random.default_rng(seed)
    return Correlations.from_samples(rng.standard_normal((9, d)), rng.standard_normal((9, h)))


def everything(path):
    return {name: one.read() for name, one in open_arrays(path)[0].items()}


@given(st.dictionaries(st.text(min_size=1, max_size=5), ARRAYS, max_size=4))
def test_arrays_come_back_as_they_were_and_other_programs_read_them(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("arrays") / "file.safetensors"
    write_arrays(path, values, {"of": "a test"})
    stored, metadata = open_arrays(path)
    assert metadata == {"of": "a test"}
    theirs = load_file(path)
    for name, array in values.items():
        for found in (stored[name].read(), theirs[name]):
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            assert found.tobytes() == array.tobytes()


def test_what_is_read_can_be_written_again_without_being_held(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write_arrays(first, {"x": np.arange(6.0).reshape(2, 3)}, {})
    write_arrays(second, open_arrays(first)[0], {})
    np.testing.assert_array_equal(open_arrays(second)[0]["x"].read(), np.arange(6.0).reshape(2, 3))


def test_correlations_come_back_and_what_layers_share_is_there_once(tmp_path):
    one, other = correlations(0), correlations(1)
    shared = Correlations(one.xx, other.yx, other.yy, one.count, one.x_sum, other.y_sum)
    arrays, record = sums_to_write({"a": one, "b": shared})
    assert record["a"]["xx"] == record["b"]["xx"] != record["a"]["yx"]
    write_arrays(tmp_path / "file", arrays, {"sums": json.dumps(record)})
    stored, metadata = open_arrays(tmp_path / "file")
    found = sums_from(stored, json.loads(metadata["sums"]))
    assert [*found] == ["a", "b"]
    assert [*some_of(found, ["b", "c"])] == ["b"]
    for name, wanted in (("a", one), ("b", shared)):
        assert all(
            np.array_equal(getattr(found[name], part), getattr(wanted, part))
            for part in ("xx", "yx", "yy", "x_sum", "y_sum", "count", "group_size")
        )
    assert found.get("c") is None


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_is_refused(tmp_path_factory, place, bit, cut):
    path = tmp_path_factory.mktemp("damaged") / "file.safetensors"
    write_arrays(path, {"x": np.arange(40.0), "y": np.ones((3, 3))}, {})
    content = bytearray(path.read_bytes())
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(DataError):
        everything(path)


def test_an_existing_file_stays_where_a_new_one_fails(tmp_path):
    path = tmp_path / "file"
    write_arrays(path, {"x": np.ones(3)}, {})
    with pytest.raises(KeyError):
        write_arrays(path, {"x": np.ones(3, dtype=complex)}, {})
    np.testing.assert_array_equal(open_arrays(path)[0]["x"].read(), np.ones(3))
