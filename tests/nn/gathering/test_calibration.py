"""Every sample is held out or given on, once and in order, whatever form the batches have."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Net, network
from torch import nn

from pysolve.errors import DataError
from pysolve.nn.batches.samples import first_samples, joined, laid_out, regrouped, samples_in, take
from pysolve.nn.gathering.calibration import APART_SAMPLES, HELD_SAMPLES, LEAST_APART, Calibration, calibrate
from pysolve.nn.gathering.memory import free_memory, room_for
from pysolve.nn.graph.export import trace
from pysolve.nn.graph.sizes import fits, traced_samples

FORMS = {
    "tensor": lambda x: x,
    "with labels": lambda x: (x, torch.zeros(len(x))),
    "list": lambda x: [x, torch.zeros(len(x))],
    "mapping": lambda x: {"ids": x, "mask": x[:, 0] > 0, "scale": 2.0, "nothing": None},
    "mapping with labels": lambda x: ({"ids": x}, torch.zeros(len(x))),
}


def numbered(sizes, form="tensor"):
    """Batches of the given sizes whose samples are numbered through."""
    numbers = torch.arange(float(sum(sizes)))[:, None].expand(-1, 3)
    return [FORMS[form](part) for part in numbers.split(list(sizes))]


def numbers(batch):
    """The numbers of a batch's samples."""
    while not isinstance(batch, torch.Tensor):
        batch = batch["ids"] if isinstance(batch, dict) else batch[0]
    return [int(row[0]) for row in batch]


def all_numbers(batches):
    return [number for batch in batches for number in numbers(batch)]


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(SIZES, st.sampled_from(sorted(FORMS)))
def test_held_out_and_given_on_are_all_samples_once_and_in_order(sizes, form):
    calibration = Calibration(limit=10**6)
    given_on = all_numbers(calibration.stream(iter(numbered(sizes, form))))
    held, apart, kept = map(all_numbers, (calibration.held, calibration.apart, calibration.kept))
    assert kept == given_on == sorted(given_on)
    assert calibration.seen == sum(map(samples_in, calibration.kept)) == len(given_on)
    if calibration.fitted_on:
        assert sum(sizes) < 8
        assert held == apart == given_on
        return
    if calibration.apart is calibration.held:
        assert len(held) // 3 < LEAST_APART
        apart = []
    assert held + apart == sorted(held + apart)
    assert sorted(held + apart + given_on) == list(range(sum(sizes)))
    assert held


@given(SIZES, st.integers(1, 100))
def test_no_more_is_kept_than_may_be(sizes, limit):
    calibration = Calibration(limit)
    given_on = all_numbers(calibration.stream(numbered(sizes)))
    assert all_numbers(calibration.kept) == given_on[:limit]
    assert sum(map(samples_in, calibration.kept)) == min(limit, len(given_on))
    assert calibration.seen == len(given_on)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=6))
def test_an_eighth_of_the_stream_is_held_out_up_to_a_limit_whatever_the_batches(sizes):
    calibration = Calibration(limit=1)
    for _ in calibration.stream(numbered(sizes)):
        pass
    out = min(sum(sizes) // 8, HELD_SAMPLES + APART_SAMPLES)
    assert (calibration.out, calibration.seen) == (out, sum(sizes) - out)
    apart = 0 if calibration.apart is calibration.held else len(all_numbers(calibration.apart))
    assert apart == (out // 3 if out // 3 >= LEAST_APART else 0)
    assert len(all_numbers(calibration.held)) == (out - apart if out else 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 100])
def test_batches_of_any_size_hold_back_the_same_share(size):
    calibration = Calibration(limit=10**6)
    given_on = all_numbers(calibration.stream(numbered([size] * (1200 // size))))
    total = size * (1200 // size)
    # In one batch: statistics over its samples would be none over one.
    assert len(calibration.held) == len(calibration.apart) == 1
    held, apart = (all_numbers(batches) for batches in (calibration.held, calibration.apart))
    assert len(held) + len(apart) == total // 8
    assert sorted(held + apart + given_on) == list(range(total))


@given(SIZES, st.integers(1, 12), st.sampled_from(sorted(FORMS)))
def test_batches_of_what_is_held_out_are_as_large_as_they_may_be_and_alike(sizes, together, form):
    one, several = Calibration(limit=10**6), Calibration(limit=10**6)
    for _ in one.stream(numbered(sizes, form)):
        pass
    for _ in several.stream(numbered(sizes, form), together=together):
        pass
    for whole, parts in ((one.held, several.held), (one.apart, several.apart)):
        assert all_numbers(parts) == all_numbers(whole)
        counts = [samples_in(batch) for batch in parts]
        assert len(counts) == -(-sum(counts) // together)
        assert max(counts) - min(counts) <= 1


def test_large_results_are_held_out_in_several_batches(monkeypatch):
    model, batches = nn.Linear(3, 50, bias=False), numbered([16] * 64)
    graph = trace(model, batches[0])
    # Of each sample 3 inputs and 50 outputs, four bytes each.
    for results, most in ((2**29, 128), (30 * 212, 30), (1, 16)):
        monkeypatch.setattr(f"{calibrate.__module__}.RESULTS", results)
        found = calibrate(model, batches, batches[0], graph, {}, [], progress=False)[0]
        held = [samples_in(batch) for batch in found.held]
        assert max(held) <= most
        assert len(held) == -(-sum(held) // most)


def test_a_batch_that_is_held_out_keeps_its_form():
    calibration = Calibration(limit=10**6)
    (batch,) = calibration.stream(numbered([16], "mapping"))
    assert batch["scale"] == 2.0
    assert batch["nothing"] is None
    assert batch["mask"].shape == (14,)
    assert calibration.held[0].keys() == batch.keys()


@pytest.mark.parametrize("form", FORMS)
def test_take_gives_some_samples_in_the_same_form_and_never_labels(form):
    (batch,) = numbered([10], form)
    some = take(batch, 2, 5)
    assert numbers(some) == [2, 3, 4]
    assert samples_in(some) == 3
    assert isinstance(some, dict if "mapping" in form else torch.Tensor)


@given(SIZES, st.integers(1, 100), st.sampled_from(sorted(FORMS)))
def test_first_samples_are_the_first_ones(sizes, count, form):
    found = first_samples(numbered(sizes, form), count)
    assert all_numbers(found) == list(range(min(count, sum(sizes))))


@given(SIZES, st.sampled_from(sorted(FORMS)))
def test_batches_of_one_form_become_one(sizes, form):
    (whole,) = joined(numbered(sizes, form))
    assert numbers(whole) == list(range(sum(sizes)))
    assert samples_in(whole) == sum(sizes)


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [torch.zeros(2, 3), torch.zeros(2, 4)],
        [torch.zeros(2, 3), torch.zeros(2, 3).double()],
        [{"x": torch.zeros(2, 3)}, {"y": torch.zeros(2, 3)}],
        [{"x": torch.zeros(2, 3), "scale": 1.0}, {"x": torch.zeros(2, 3), "scale": 2.0}],
        [{"x": torch.zeros(2, 3), "mask": None}, {"x": torch.zeros(2, 3), "mask": torch.ones(2)}],
        [torch.zeros(2, 3), {"x": torch.zeros(2, 3)}],
    ],
)
def test_batches_that_differ_stay_as_they_are(batches):
    assert joined(batches) is batches


@given(SIZES, st.integers(1, 30), st.sampled_from(sorted(FORMS)))
def test_regrouped_samples_are_the_same_in_whole_batches(sizes, size, form):
    found = regrouped(numbered(sizes, form), size)
    assert {samples_in(batch) for batch in found} <= {size}
    assert all_numbers(found) == list(range(sum(sizes) // size * size))


def test_a_graph_fits_batches_of_any_size_unless_the_code_has_fixed_one():
    model = nn.Linear(4, 2)
    free = trace(model, torch.zeros(5, 4))
    fixed = trace(Net(lambda net, x: net.fc(torch.stack([*x])), fc=model), torch.zeros(5, 4))
    assert traced_samples(free) == traced_samples(fixed) == 5
    assert fits(free, torch.zeros(7, 4))
    assert not fits(free, torch.zeros(7, 3))
    assert not fits(free, torch.zeros(7, 2, 4))
    assert fits(fixed, torch.zeros(5, 4))
    assert not fits(fixed, torch.zeros(7, 4))


@pytest.mark.parametrize(
    "batch", [{"a": torch.zeros(3, 2), "b": torch.zeros(4)}, {"a": 1.0}, torch.tensor(1.0)]
)
def test_tensors_that_do_not_share_their_first_dimension_are_refused(batch):
    with pytest.raises(DataError, match="must share their first dimension"):
        samples_in(batch)
    with pytest.raises(DataError, match="must share their first dimension"):
        list(Calibration(1).stream([batch]))


class Conditioned(nn.Module):
    """What it computes depends on plain values."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x, scale=1.0, other=None, flag=False):
        h = self.a(x) * scale + (0.0 if other is None else self.b(other))
        return self.c(-h.relu() if flag else h.relu())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, mask):
        return self.fc(x) + mask


def calibrated(model, batches, traced=True):
    graph = trace(model, batches[0]) if traced else None
    return calibrate(model, batches, batches[0], graph, {}, (), progress=False)[0]


X, LATER = torch.ones(4, 3), torch.full((4, 3), 2.0)


class Graphs(nn.Module):
    """Mixes nodes along edges, or all of them by one matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, edges=None, mixing=None):
        h = self.a(x).relu()
        return self.b(h + h[edges[0]].sum(0) if mixing is None else (mixing @ h).mean(1))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, images):
        return torch.stack([self.a(image).mean(0) for image in images])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, batch):
        return self.a(batch["x"]) * batch["w"]


def laid(model, *batches):
    first, rest = laid_out(model, batches[0], iter(batches))
    rest = [*rest]
    assert samples_in(first) == samples_in(rest[0])
    return rest


def test_inputs_that_all_samples_share_are_told_by_the_outputs():
    mixing = torch.rand(6, 6)
    one, other = laid(Graphs(), *({"x": torch.rand(n, 6, 3), "mixing": mixing} for n in (8, 4)))
    assert (samples_in(one), samples_in(other)) == (8, 4)
    assert take(one, 2, 5)["x"].shape == (3, 6, 3)
    assert take(one, 2, 5)["mixing"] is mixing
    (whole,) = joined([one, other])
    assert samples_in(whole) == 12
    assert whole["mixing"] is mixing
    changed = laid(Graphs(), one, {"x": torch.rand(4, 6, 3), "mixing": torch.rand(6, 6)})
    assert joined(changed) is changed


class Convolved(nn.Module):
    """Nodes and the matrix of their edges, both with as many rows as there are nodes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x, edges):
        return edges @ self.a(x)


def test_a_matrix_as_square_as_there_are_samples_is_asked_about():
    (one,) = laid(Convolved(), {"x": torch.rand(9, 3), "edges": torch.rand(9, 9)})
    assert samples_in(one) == 1
    (many,) = laid(Graphs(), {"x": torch.rand(6, 6, 3), "mixing": torch.rand(6, 6, 6)})
    assert samples_in(many) == 6


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.eye(4).to_sparse(), r"sparse_coo tensor.*to_dense"),
        (torch.eye(4).to_mkldnn(), r"_mkldnn tensor.*to_dense"),
    ],
)
def test_tensors_without_rows_in_memory_are_refused(x, said):
    for batch in (x, {"x": x}):
        with pytest.raises(TypeError, match=said):
            samples_in(batch)


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (Graphs, {"x": torch.rand(9, 3), "edges": torch.randint(0, 9, (2, 7))}),
        (Listed, {"images": [torch.rand(6, 4) for _ in range(3)]}),
        (Listed, {"images": [torch.rand(n, 4) for n in (6, 3, 8)]}),
    ],
)
def test_what_cannot_be_divided_is_one_sample(make, batch):
    batches = laid(make(), *[batch] * 16)
    assert samples_in(batches[0]) == 1
    assert take(batches[0], 0, 1) == batches[0]
    assert joined(batches) is batches
    calibration = Calibration(limit=100)
    assert len([*calibration.stream(batches)]) == 14
    assert (calibration.seen, calibration.out) == (14, 2)


def test_a_mapping_as_the_only_argument_is_divided():
    (batch,) = laid(Nested(), {"batch": {"x": torch.rand(8, 3), "w": torch.rand(8, 1)}})
    assert samples_in(batch) == 8
    assert take(batch, 1, 4)["batch"]["w"].shape == (3, 1)


def test_batches_whose_tensors_agree_are_not_run():
    batches = [{"x": torch.rand(4, 3)}]
    assert laid_out(nn.Identity(), batches[0], batches) == (batches[0], batches)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"scale": 0.0}, {"scale": 1.0}, r"scale is 1\.0, not 0\.0\."),
        ({"scale": 0.0}, {"scale": torch.tensor(1.0)}, r"scale is a tensor of float32, not 0\.0\."),
        ({"flag": True}, {"flag": False}, r"flag is False, not True\."),
        ({"other": None}, {"other": X}, r"other is a tensor of float32, not None\."),
        ({}, {"other": X}, r"other is a tensor of float32, not left out\."),
        ({"other": X, "flag": True}, {}, r"other is left out, .*; flag is left out, not True\."),
        ({"flag": 0}, {"flag": False}, "flag is False, not 0"),
    ],
)
def test_plain_values_that_change_are_refused_by_name_where_a_graph_holds_them(first, second, said):
    batches = [{"x": X, **first}, {"x": LATER, **second}]
    with pytest.raises(DataError, match=f"batch 1 has other values than the first.*{said}"):
        calibrated(Conditioned(), batches)
    assert calibrated(Conditioned(), batches, traced=False).seen + 1 == 8


def test_plain_values_that_stay_and_numbers_as_tensors_are_taken():
    batches = [{"x": X, "scale": torch.tensor(s), "other": None, "flag": True} for s in (0.0, 1.0)]
    assert calibrated(Conditioned(), batches).seen == 7


@pytest.mark.parametrize("at", [0, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_any_sample_is_named_whether_it_is_held_out_or_not(at, value):
    x = torch.ones(32, 3)
    x[[at, at + 1], 1] = value
    for traced in (True, False):
        with pytest.raises(
            DataError, match=rf"samples of batch 1 hold NaN or infinity.*input in samples {at}, {at + 1}\."
        ):
            calibrated(nn.Linear(3, 2), [torch.ones(32, 3), x], traced=traced)


def test_nan_and_infinity_that_the_network_takes_away_are_taken():
    filled = Net(lambda net, x: net.fc(x.nan_to_num(0.0, neginf=-1.0)), fc=nn.Linear(3, 2))
    x, masked = torch.ones(8, 3), torch.zeros(8, 2)
    x[2], x[3], masked[:, 0] = torch.nan, -torch.inf, -torch.inf
    assert calibrated(filled, [x]).seen == 7
    assert calibrated(Masked(), [{"x": torch.ones(8, 3), "mask": masked}]).seen == 7


def test_a_later_batch_that_the_network_refuses_is_refused_although_nothing_is_gathered():
    with pytest.raises(DataError, match=r"itself refuses the batch \(input: float32\[4, 2\]\)"):
        calibrated(nn.Linear(3, 2), [X, X[:, :2]])


def test_samples_without_dimensions_are_shared_by_all():
    batch = {"x": torch.zeros(6, 2), "temperature": torch.tensor(0.5)}
    assert samples_in(batch) == 6
    assert take(batch, 1, 3)["temperature"] == 0.5


def test_room_grows_with_memory_and_holds_one_sample_at_least():
    model, batch = network("residual")
    graph = trace(model, batch, free_sizes=False)
    rooms = [room_for(graph, memory) for memory in (0, 10**5, 10**6, 10**7)]
    assert rooms[0] == 1
    assert rooms == sorted(rooms)
    assert rooms[3] == pytest.approx(10 * rooms[2], rel=0.1)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_room_is_that_of_the_largest_results_in_two_networks(n):
    wide = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    graph = trace(wide, torch.zeros(n, 4))
    # Two results of 100 numbers, 4 bytes each, and what lies before them, in both networks.
    assert 10**6 / (2 * 4 * 210) <= room_for(graph, 10**6) <= 10**6 / (2 * 4 * 200)


def test_outputs_count_once_more():
    graph = trace(nn.Linear(200, 100), torch.zeros(3, 200))
    # 200 inputs and 100 outputs in both networks, and 100 outputs to which a bias comes.
    assert room_for(graph, 10**6) == 10**6 // (4 * (2 * 300 + 100))


def test_logits_that_no_walk_makes_do_not_count():
    graph = trace(nn.Linear(4, 100), torch.zeros(3, 4))
    assert room_for(graph, 10**6) == 10**6 // (4 * 2 * 4)


def test_free_memory_is_a_share_of_something():
    assert 0 < free_memory(0.25) < free_memory(0.5)
