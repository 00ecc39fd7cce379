"""Correlations are sums: merging, centring, restricting and judging are exact; files survive accidents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysolve import correlations
from pysolve.correlations import Correlations, all_but, gram, group_columns, product
from pysolve.errors import DataError

NAMES = ("xx", "yx", "yy", "x_sum", "y_sum")


@st.composite
def samples(draw):
    """Samples in rows, some inputs dead or repeated, on scales from 1e-3 to 1e3."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, d, h = (draw(st.integers(1, high)) for high in (30, 8, 5))
    x = (rng.standard_normal((n, d)) + rng.standard_normal(d)) * 10.0 ** rng.integers(-3, 4, d)
    x[:, rng.random(d) < 0.2] = 0.0
    x[:, -1] = x[:, 0]
    return x, rng.standard_normal((n, h)) + rng.standard_normal(h)


@given(st.integers(0, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, max(0, n - 1))))))
def test_some_and_all_but_these_are_all(case):
    count, gone = case[0], case[1] if case[0] else []
    left = all_but(count, gone)
    assert sorted({*left.tolist(), *gone}) == [*range(count)]
    assert left.tolist() == sorted({*range(count)} - {*gone})
    assert left.dtype == np.intp


def assert_same(a, b, rtol=1e-10):
    assert a.count == b.count
    assert a.group_size == b.group_size
    for name in NAMES:
        scale = np.abs(getattr(a, name)).max(initial=0.0)
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=rtol * scale)


@given(samples(), st.data())
def test_any_split_of_the_samples_gives_the_same_sums(sample, data):
    x, y = sample
    cuts = sorted(data.draw(st.sets(st.integers(1, len(x) - 1), max_size=4))) if len(x) > 1 else []
    parts = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    merged = Correlations.merge(Correlations.from_samples(*part) for part in parts)
    assert_same(merged, Correlations.from_samples(x, y))


@given(samples())
def test_adding_is_associative_and_commutative(sample):
    x, y = sample
    a, b, c = (Correlations.from_samples(s * x, t * y) for s, t in ((1, 1), (2, -1), (0.5, 3)))
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a, rtol=0)


@given(samples())
def test_centring_sums_is_centring_the_data(sample):
    x, y = sample
    centered = Correlations.from_samples(x, y).centered()
    direct = Correlations.from_samples(x - x.mean(0), y - y.mean(0))
    for name in ("xx", "yx", "yy"):
        scale = np.abs(getattr(Correlations.from_samples(x, y), name)).max()
        np.testing.assert_allclose(getattr(centered, name), getattr(direct, name), atol=1e-12 * scale)
    assert not centered.x_sum.any()
    assert not centered.y_sum.any()


@given(samples(), st.data())
def test_restricting_is_dropping_columns_of_the_data(sample, data):
    x, y = sample
    group_size = data.draw(st.sampled_from([size for size in (1, 2, 3) if x.shape[1] % size == 0]))
    groups = x.shape[1] // group_size
    keep = data.draw(st.lists(st.integers(0, groups - 1), min_size=1, max_size=groups, unique=True))
    restricted = Correlations.from_samples(x, y, group_size=group_size).restrict(keep)
    columns = [g * group_size + i for g in keep for i in range(group_size)]
    assert_same(restricted, Correlations.from_samples(x[:, columns], y, group_size=group_size))
    assert list(group_columns(keep, group_size)) == columns


@given(samples(), st.integers(0, 2**32 - 1))
def test_error_is_half_the_mean_squared_residual(sample, seed):
    x, y = sample
    rng = np.random.default_rng(seed)
    M, bias = rng.standard_normal((y.shape[1], x.shape[1])), rng.standard_normal(y.shape[1])
    correlations = Correlations.from_samples(x, y)
    # Expanding the square cancels: the error is judged on the scale of its largest term.
    atol = 1e-12 * (np.square(y).sum() + np.square(x @ M.T).sum() + np.square(bias).sum())
    for b in (None, bias):
        residual = y - x @ M.T - (0 if b is None else b)
        direct = 0.5 * np.square(residual).sum(1).mean()
        assert correlations.error(M, b) == pytest.approx(direct, rel=1e-9, abs=atol)


@given(samples(), st.integers(0, 2**32 - 1))
def test_no_other_bias_has_a_smaller_error(sample, seed):
    x, y = sample
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((y.shape[1], x.shape[1])) / (1 + np.abs(x).max(0))
    correlations = Correlations.from_samples(x, y)
    best = correlations.bias(M)
    other = best + rng.standard_normal(best.shape) * 10.0 ** rng.integers(-2, 2)
    assert correlations.error(M, best) <= correlations.error(M, other)


def test_means_are_sums_divided_by_the_count():
    correlations = Correlations.from_samples([[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0]])
    np.testing.assert_array_equal(correlations.r_xx, [[5, 7], [7, 10]])
    np.testing.assert_array_equal(correlations.r_yx, [[3.5, 5]])
    np.testing.assert_array_equal(correlations.r_yy, [[2.5]])
    assert correlations.groups == 2


@given(samples())
def test_a_file_gives_back_exactly_what_was_saved(tmp_path_factory, sample):
    path = tmp_path_factory.mktemp("saved") / "layer.npz"
    saved = Correlations.from_samples(*sample)
    saved.save(path)
    assert_same(Correlations.load(path), saved, rtol=0)
    assert [file.name for file in path.parent.iterdir()] == ["layer.npz"]


def example(scale=1.0):
    rng = np.random.default_rng(0)
    return Correlations.from_samples(scale * rng.standard_normal((20, 4)), rng.standard_normal((20, 2)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95, 0.999])
def test_a_truncated_file_is_a_data_error(tmp_path, share):
    path = tmp_path / "layer.npz"
    example().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"layer\.npz"):
        Correlations.load(path)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("content") / "layer.npz"
    example().save(path)
    return path.read_bytes()


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_a_changed_byte_is_a_data_error_unless_nothing_depends_on_it(
    tmp_path_factory, content, place, change
):
    path = tmp_path_factory.mktemp("changed") / "layer.npz"
    changed = bytearray(content)
    changed[int(place * len(content))] ^= change
    path.write_bytes(changed)
    try:
        loaded = Correlations.load(path)
    except DataError:
        return
    assert_same(loaded, example(), rtol=0)


def test_foreign_files_are_data_errors(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip file")
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    np.savez(tmp_path / "pickle.npz", **{n: np.array([object()]) for n in (*NAMES, "count", "group_size")})
    np.savez(tmp_path / "shapes.npz", **{n: np.ones(3) for n in NAMES}, count=1, group_size=1)
    for name in ("text", "other", "pickle", "shapes"):
        with pytest.raises(DataError, match=name):
            Correlations.load(tmp_path / f"{name}.npz")


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Correlations.load(tmp_path / "nothing.npz")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "layer.npz"
    example().save(path)

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        example(2.0).save(path)
    assert_same(Correlations.load(path), example(), rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["layer.npz"]


def test_shapes_that_do_not_belong_together_are_refused_with_both_sizes():
    good = example()
    with pytest.raises(ValueError, match=r"xx has shape \(3, 3\), but yx is 2 x 4"):
        Correlations(np.eye(3), good.yx, good.yy, 20, good.x_sum, good.y_sum)
    with pytest.raises(ValueError, match="matrix"):
        Correlations(good.xx, good.yx[0], good.yy, 20, good.x_sum, good.y_sum)
    with pytest.raises(ValueError, match="count must be an integer of at least 1, got 0"):
        Correlations(good.xx, good.yx, good.yy, 0, good.x_sum, good.y_sum)
    with pytest.raises(ValueError, match="divide the 4 inputs, got 3"):
        Correlations(good.xx, good.yx, good.yy, 20, good.x_sum, good.y_sum, group_size=3)
    with pytest.raises(ValueError, match="one row a sample"):
        Correlations.from_samples(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(TypeError, match="count must be an integer of at least 1, got nan"):
        Correlations(good.xx, good.yx, good.yy, np.nan, good.x_sum, good.y_sum)
    with pytest.raises(ValueError, match="x has masked entries"):
        Correlations.from_samples(np.ma.masked_equal([[1.0, 2.0]], 2), np.ones((1, 2)))


def test_inputs_and_outputs_are_chosen_by_lists_of_indices():
    assert example().of_outputs([1]).yx.shape == (1, 4)
    assert example().of_outputs([]).yx.shape == (0, 4)
    for choose in (example().restrict, example().of_outputs, example().covariance):
        with pytest.raises(ValueError, match=r"must be a list of group indices, got shape \(\)"):
            choose(1)
        with pytest.raises(TypeError, match="must hold integers"):
            choose([0.5])
        for beyond in ([0, 99], [-1]):
            with pytest.raises(ValueError, match=r"must lie within 0 … \d"):
                choose(beyond)


@pytest.mark.parametrize("path", [0, None, 2.5, [], b"layer.npz"])
def test_what_is_no_path_is_refused(path):
    for use in (example().save, Correlations.load):
        with pytest.raises(TypeError, match=r"path must be a path, a str or os\.PathLike, got"):
            use(path)


def test_only_correlations_of_the_same_layer_can_be_added():
    other = Correlations.from_samples(np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="different layers"):
        example() + other
    with pytest.raises(TypeError):
        example() + 1
    with pytest.raises(ValueError, match="at least one"):
        Correlations.merge([])


def test_printing_names_the_sizes_not_the_numbers():
    assert repr(example()) == "Correlations(4 inputs in groups of 1, 2 outputs, 20 samples)"


@given(st.floats(1e-3, 1e3), st.integers(2, 20000))
def test_a_constant_is_still_however_many_samples_were_summed(value, n):
    x = np.full(n, np.float32(value), np.float64)
    z = np.column_stack([x, np.linspace(-1, 1, n)])
    found = Correlations(z.T @ z, z.T @ z, z.T @ z, n, z.sum(0), z.sum(0), 1).centered()
    assert found.xx[0, 0] == found.yx[0, 0] == found.yy[0, 0] == 0.0
    assert found.xx[1, 1] > 0


def test_inputs_vanish_where_they_are_tiny_but_not_zero():
    x = np.ones((4, 2))
    for scale, vanishes in ((1.0, False), (1e-30, False), (1e-46, True), (0.0, False)):
        assert Correlations.from_samples(scale * x, x).vanishes == vanishes
    assert not Correlations.from_samples(np.zeros((4, 0)), x).vanishes


class Noted(np.ndarray):
    """Notes the multiplications of its products."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        a, b = (np.asarray(one) for one in inputs)
        WORK.append(a.size * b.shape[1])
        return getattr(ufunc, method)(a, b, **kwargs)


WORK = []


@given(st.integers(0, 300), st.integers(0, 80), st.integers(0, 200), st.integers(1, 10**6))
def test_products_in_pieces_are_products(n, d, h, longest):
    rng = np.random.default_rng(n + d)
    A, B = rng.standard_normal((n, d)), rng.standard_normal((d, h))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlations, "LONGEST", longest)
        for run, each in ((lambda: product(A.view(Noted), B), d * h), (lambda: gram(A.view(Noted)), n * d)):
            WORK.clear()
            run()
            assert max(WORK) <= max(longest, 64 * each)
        np.testing.assert_allclose(product(A, B), A @ B, atol=1e-12)
        square = gram(A)
    np.testing.assert_allclose(square, A.T @ A, atol=1e-12)
    np.testing.assert_array_equal(square, square.T)
