"""The front, against a slow definition of it."""

from hypothesis import given
from hypothesis import strategies as st

from pysolve.report.curves import front

scores = st.integers(-3, 3).map(float)


@given(st.lists(st.tuples(scores, st.none() | scores), max_size=10), st.booleans())
def test_the_front_is_what_no_other_point_equals_or_beats(points, lower_is_better):
    sign = -1 if lower_is_better else 1
    best, rest = front([x for x, _ in points], [y for _, y in points], lower_is_better)
    scored = {point for point in points if point[1] is not None}

    def beaten(x, y):
        return any(a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in scored)

    assert set(zip(*best.tolist(), strict=True)) == {point for point in scored if not beaten(*point)}
    assert best.shape[1] + rest.shape[1] == sum(y is not None for _, y in points)
    assert best[0].tolist() == sorted(set(best[0].tolist()))
