"""A student learns what its teacher answers, by the formula, and nothing else is changed."""

import copy

import numpy as np
import pytest
import torch
from clouds import clouds, network, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from pysolve.errors import DataError, PysolveError
from pysolve.training.distill import distill
from pysolve.training.loss import DistillationLoss, soft_loss

# As compressed networks are brought back to the original's outputs.
MATCHING = {"loss": "mse", "batch_size": 32, "mix": 0.5, "frozen": True, "progress": False}


def match(student, teacher, batches, **options):
    return distill(student, teacher, batches, **{**MATCHING, **options})


def pair():
    """A student and a teacher that answer differently, and unlabelled samples."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3))
    return network(), teacher, torch.from_numpy(clouds()[0])


def distance(student, teacher, x):
    with torch.no_grad():
        return float(mse_loss(student.eval()(x), teacher.eval()(x)))


class Answering(nn.Module):
    """A network whose output is made from its one layer's."""

    def __init__(self, answer, sizes=(4, 3)):
        super().__init__()
        self.layer, self.answer = nn.Linear(*sizes), answer

    def forward(self, x):
        return self.answer(self.layer(x))


def test_a_student_learns_the_teachers_answers_without_labels():
    student, teacher, x = pair()
    before = distance(student, teacher, x)
    history = match(student, teacher, [x], epochs=20, batch_size=16, lr=0.02)
    assert len(history) == 20
    assert distance(student, teacher, x) < 0.1 * before
    assert history[-1] < 0.1 * history[0]


def test_a_linear_student_becomes_its_linear_teacher():
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(64, 4)
    match(student, teacher, [x], epochs=150, batch_size=16, lr=0.05)
    torch.testing.assert_close(student.weight, teacher.weight, atol=1e-2, rtol=0)
    torch.testing.assert_close(student.bias, teacher.bias, atol=1e-2, rtol=0)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.booleans())
def test_how_samples_are_cut_into_batches_and_labelled_changes_nothing(sizes, with_labels):
    results = []
    for cut in (True, False):
        student, teacher, x = pair()
        parts = x[: sum(sizes)].split(sizes) if cut and sum(sizes) <= len(x) else x[: sum(sizes)].split(7)
        batches = [(part, part[:, 0]) if cut and with_labels else part for part in parts]
        match(student, teacher, batches, epochs=2, batch_size=16, progress=False)
        results.append(weights(student))
    assert torch.equal(*results)


def test_matching_is_repeatable_and_another_seed_gives_another_network():
    results = []
    for seed in (0, 0, 1):
        student, teacher, x = pair()
        torch.rand(seed)
        match(student, teacher, [x], epochs=2, batch_size=32, seed=seed)
        results.append(weights(student))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_matching_leaves_the_global_random_state_alone():
    student, teacher, x = pair()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    match(student, teacher, [x], epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_nothing_changes_but_what_the_student_may_train():
    student, teacher, x = pair()
    student[2], student[0].weight.requires_grad = nn.BatchNorm1d(16), False
    student.train()
    teacher.train()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), x))
    match(student, nn.Sequential(nn.ReLU(inplace=True), teacher), [x], epochs=2)
    assert all(module.training for module in (*student.modules(), *teacher.modules()))
    assert torch.equal(x, before[2])
    assert all(torch.equal(value, before[1][name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    changed = {
        name for name, value in student.state_dict().items() if not torch.equal(value, before[0][name])
    }
    assert changed == {"0.bias", "2.weight", "2.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("shapes", [[(1, 4)], [(1, 4), (1, 4)], [(1, 4), (2, 4)], [(3, 4), (1, 5, 4)]])
def test_batches_of_one_sample_do_not_stop_a_batch_norm(shapes):
    student, teacher = (nn.Sequential(nn.Flatten(0, -2), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in "ab")
    batches = [torch.randn(shape) for shape in shapes]
    assert len(match(student, teacher, batches, epochs=2, batch_size=1)) == 2


def test_dropout_is_off_in_student_and_teacher():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    teacher = copy.deepcopy(student)
    assert match(student, teacher, [torch.randn(20, 4)], epochs=1) == [0.0]


def inputs_seen(batches, **options):
    """What student and teacher are asked about in one epoch of three batches."""
    seen = [], []
    networks = [nn.Embedding(9, 3) if batches[0].dtype == torch.long else nn.Linear(4, 3) for _ in seen]
    for one, inputs in zip(networks, seen, strict=True):
        one.register_forward_pre_hook(lambda module, args, to=inputs: to.append(args[0]))
    match(*networks, batches, epochs=1, batch_size=16, progress=False, **options)
    return seen


@settings(max_examples=10)
@given(st.floats(0.1, 1.0), st.integers(0, 5))
def test_samples_are_mixed_two_by_two_up_to_the_share(mix, seed):
    # Of unit vectors, any mixture of two shows its shares.
    x = torch.eye(4)[torch.arange(48) % 4]
    for batch, same in zip(*inputs_seen([x], mix=mix, seed=seed), strict=True):
        assert torch.equal(batch, same)
        torch.testing.assert_close(batch.sum(1), torch.ones(16))
        assert ((batch > 0).sum(1) <= 2).all()
        assert batch.amin() >= 0
        assert batch.amax(1).min() >= min(1 - mix, 0.5) - 1e-6
        assert (batch.amax(1) < 1).any()


@pytest.mark.parametrize("x", [torch.arange(48) % 9, torch.eye(4)[torch.arange(48) % 4]], ids=["words", "0"])
def test_words_are_never_mixed_and_without_mixing_samples_stay_as_they_are(x):
    options = {} if x.dtype == torch.long else {"mix": 0.0}
    seen = torch.cat(inputs_seen([x], **options)[0])
    assert torch.equal(seen.sort(0).values, x.sort(0).values)


def test_batches_of_different_shapes_stay_as_they_are():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv1d(2, 3, 3), nn.AdaptiveAvgPool1d(1)) for _ in range(2))
    seen = []
    student.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    batches = [torch.randn(n, 2, length) for n, length in ((1, 5), (4, 6), (2, 9))]
    history = match(student, teacher, batches, epochs=30, lr=0.02)
    assert history[-1] < 0.5 * history[0]
    for epoch in range(30):
        assert sorted(seen[3 * epoch : 3 * epoch + 3]) == sorted(tuple(batch.shape) for batch in batches)
    assert seen[:3] != seen[3:6] or seen[3:6] != seen[6:9]


def test_batches_may_be_mappings_and_outputs_mappings_with_logits():
    torch.manual_seed(0)
    student, teacher = (
        Answering(lambda y, odd=odd: {"logits": y, "hidden": odd, "loss": y.sum()}) for odd in (0, "1")
    )
    history = match(student, teacher, [{"x": torch.randn(16, 4)}] * 2, epochs=60, lr=0.05)
    assert history[-1] < 0.05 * history[0]


def test_every_floating_point_tensor_of_a_nested_output_is_matched():
    torch.manual_seed(0)
    student, teacher = (
        Answering(lambda y, c=c: (y[:, :1], [{"rest": y[:, 1:]}, y.argmax(1), None, y.sum(), c]))
        for c in "ab"
    )
    x = torch.randn(64, 4)
    match(student, teacher, [x], epochs=150, batch_size=16, lr=0.05)
    torch.testing.assert_close(student.layer.weight, teacher.layer.weight, atol=1e-2, rtol=0)


def test_the_loss_of_several_outputs_is_their_sum():
    torch.manual_seed(0)
    student, teacher, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(8, 4)
    single = match(copy.deepcopy(student), teacher, [x], epochs=1, loss=l1_loss)
    twice = [nn.Sequential(net, Answering(lambda y: (y, y), (3, 3))) for net in (student, teacher)]
    for net in twice:
        nn.init.eye_(net[1].layer.weight)
        nn.init.zeros_(net[1].layer.bias)
    assert match(*twice, [x], epochs=1, loss=l1_loss) == pytest.approx([2 * single[0]])


def test_a_teacher_in_another_precision_teaches_too():
    student, teacher, x = pair()
    inner = copy.deepcopy(teacher).double()
    precise = nn.Sequential(Answering(torch.Tensor.double, (4, 4)), inner)
    nn.init.eye_(precise[0].layer.weight)
    nn.init.zeros_(precise[0].layer.bias)
    results = [match(copy.deepcopy(student), one, [x], epochs=2) for one in (teacher, precise)]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("given", [{}, {"epochs": 1, "seconds": 1.0}])
def test_either_epochs_or_seconds_must_be_given(given):
    student, teacher, x = pair()
    with pytest.raises(ValueError, match="either epochs or seconds"):
        match(student, teacher, [x], **given)


@pytest.mark.parametrize("given", [{"epochs": 0}, {"seconds": 0.0}, {"epochs": 1, "batch_size": 0}])
def test_what_measures_a_matching_must_be_positive(given):
    student, teacher, x = pair()
    with pytest.raises(ValueError, match=r"must be (a )?positive|must be an integer of at least 1"):
        match(student, teacher, [x], **given)


@pytest.mark.parametrize("mix", [-0.1, 1.1, np.nan])
def test_samples_cannot_be_mixed_by_more_than_the_whole(mix):
    student, teacher, x = pair()
    with pytest.raises(ValueError, match="mix must be within 0 and 1"):
        match(student, teacher, [x], epochs=1, mix=mix)


def test_batches_must_be_a_list_of_some():
    student, teacher, x = pair()
    with pytest.raises(TypeError, match="wrap it in a list"):
        match(student, teacher, x, epochs=1)
    with pytest.raises(DataError, match="no batches"):
        match(student, teacher, iter(()), epochs=1)


def test_answers_that_cannot_be_compared_are_refused_with_their_shapes():
    x = torch.randn(8, 4)
    with pytest.raises(PysolveError, match=r"got \[\[8, 2\]\], expected \[\[8, 3\]\]"):
        match(nn.Linear(4, 2), nn.Linear(4, 3), [x], epochs=1)
    with pytest.raises(PysolveError, match=r"got \[\], expected \[\]"):
        match(Answering(lambda y: y.argmax(1)), Answering(lambda y: None), [x], epochs=1)


def test_a_teacher_that_answers_nan_is_told_apart_from_too_high_a_learning_rate():
    student, teacher, x = pair()
    x[3, 0] = np.nan
    with pytest.raises(DataError, match="the teacher's outputs hold NaN"):
        match(student, teacher, [x], epochs=1)
    with pytest.raises(PysolveError, match=r"the loss became \w+ in epoch \d+: lower lr"):
        match(*pair()[:2], [torch.randn(64, 4)], epochs=20, batch_size=8, lr=1e30)


def test_matching_by_the_clock_learns():
    student, teacher, x = pair()
    before = distance(student, teacher, x)
    history = match(student, teacher, [x], seconds=0.3, batch_size=32, lr=0.02)
    assert history
    assert distance(student, teacher, x) < before


# --- the loss


def softened(z, T):
    """Slow and obvious: log probabilities of one vector."""
    z = np.asarray(z, dtype=np.float64) / T
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def slow_loss(student, teacher, labels, T, alpha):
    """The formula, sample by sample; classes along the last axis."""
    soft, hard = [], []
    for s, t, label in zip(student, teacher, labels, strict=True):
        q, p = softened(s, T), softened(t, T)
        soft.append(sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        hard.append(-softened(s, 1.0)[label])
    return alpha * T**2 * np.mean(soft) + (1 - alpha) * np.mean(hard)


def logits_of(seed, shape, scale=1.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(scale * rng.standard_normal(shape).astype(np.float32))


def goal(**options):
    given = {"temperature": 1.0, "alpha": 1.0, "loss": "kl", "pairs": {}, "feature_weight": 1.0, "mix": 0.0}
    return DistillationLoss(**{**given, **options})


class Table(nn.Module):
    """Gives the rows of a table that it is asked for."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, i):
        return self.rows[i]


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.2, 20),
    st.floats(0, 1),
    st.sampled_from([(5, 3), (2, 4, 3), (3, 4, 2, 2)]),
)
def test_the_loss_is_the_formula(seed, T, alpha, shape):
    s, t = logits_of(seed, shape, 2.0), logits_of(seed + 1, shape, 2.0)
    dim = 2 if len(shape) == 3 else 1
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, shape[dim], shape)).select(dim, 0)
    flat = [z.movedim(dim, -1).reshape(-1, shape[dim]).numpy() for z in (s, t)]
    batches = [(torch.arange(len(s)), labels)]
    how = {"temperature": T, "alpha": alpha, "epochs": 1, "progress": False}
    losses = distill(Table(s), Table(t), batches, **how)
    assert losses == [pytest.approx(slow_loss(*flat, labels.flatten(), T, alpha), rel=1e-3, abs=1e-5)]


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_at_a_high_temperature_it_is_half_the_squared_error_of_centred_logits(seed, classes):
    s, t = logits_of(seed, (4, classes)).double(), logits_of(seed + 1, (4, classes)).double()
    centred = [z - z.mean(1, keepdim=True) for z in (s, t)]
    limit = 0.5 * mse_loss(*centred)
    assert float(soft_loss(goal(temperature=1e4), s, t)) == pytest.approx(float(limit), rel=1e-2, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 10))
def test_it_is_zero_at_the_teachers_outputs_and_positive_elsewhere(seed, T):
    s, t = logits_of(seed, (4, 3)).double(), logits_of(seed + 1, (4, 3)).double()
    assert float(soft_loss(goal(temperature=T), t + 5, t)) == pytest.approx(0, abs=1e-9)
    assert float(soft_loss(goal(temperature=T), s, t)) > 0


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_outputs_without_classes_are_told_to_use_squared_error(shape):
    tables = Table(logits_of(0, shape)), Table(logits_of(1, shape))
    with pytest.raises(ValueError, match="have no classes to compare by kl: give loss='mse'"):
        distill(*tables, [torch.arange(6)], epochs=1)
    assert len(distill(*tables, [torch.arange(6)], epochs=2, loss="mse")) == 2


# --- batches


def loader(labels=True, shuffle=False):
    x, y = clouds(30)
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) if labels else torch.from_numpy(x)
    return DataLoader(data, batch_size=8, shuffle=shuffle)


class Tagged(nn.Module):
    """Takes labels along and has a loss of its own, as networks for text do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        logits = self.fc(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def test_labels_of_a_loader_and_of_joined_batches_weigh_in():
    x, y = clouds(30)
    far = Table(torch.zeros(1, 3))
    far.forward = lambda x: far.rows.expand(len(x), 3)
    for batches, size in ((loader(), None), ([*loader()], 8)):
        student = network()
        distill(student, far, batches, batch_size=size, alpha=0.05, epochs=30, lr=0.02, progress=False)
        hits = student(torch.from_numpy(x)).argmax(1).numpy() == y
        assert hits.mean() > 0.85


def test_labels_travel_with_their_samples():
    x = torch.arange(20)
    student = Table(torch.zeros(20, 20))
    batches = [(part, part) for part in x.split(6)]
    how = {"alpha": 0.0, "epochs": 60, "lr": 0.2, "batch_size": 4, "progress": False}
    distill(student, Table(torch.zeros(20, 20)), batches, **how)
    assert torch.equal(student.rows.argmax(1), x)


def test_mappings_bring_a_loss_of_their_own():
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, clouds(24))
    batches = [{"x": part, "labels": label} for part, label in zip(x.split(8), y.split(8), strict=True)]
    student, teacher = Tagged(), Tagged()
    soft = distill(copy.deepcopy(student), teacher, batches, epochs=1, lr=1e-9)
    hard = distill(copy.deepcopy(student), teacher, batches, epochs=1, lr=1e-9, alpha=0.0)
    both = distill(copy.deepcopy(student), teacher, batches, epochs=1, lr=1e-9, alpha=0.25)
    with torch.no_grad():
        wanted = np.mean([float(student(**batch)["loss"]) for batch in batches])
    assert hard == [pytest.approx(wanted, rel=1e-4)]
    assert both == [pytest.approx(0.25 * soft[0] + 0.75 * hard[0], rel=1e-4)]


@pytest.mark.parametrize("size", [None, 8])
def test_labels_that_are_missing_are_asked_for(size):
    student, teacher, x = pair()
    with pytest.raises(DataError, match=r"alpha=0.5 needs labels: .* got Tensor"):
        distill(student, teacher, [x], alpha=0.5, epochs=1, batch_size=size)
    with pytest.raises(DataError, match="whose output has a loss"):
        distill(*(Answering(lambda y: y) for _ in "ab"), [{"x": x}], alpha=0.5, epochs=1, batch_size=size)


def test_batches_come_in_the_order_they_have_unless_a_size_is_given():
    x = torch.arange(20)
    seen = []
    student = Table(torch.zeros(20, 3))
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher = Table(torch.randn(20, 3))
    distill(student, teacher, x.split(6), epochs=2, progress=False)
    assert [batch.tolist() for batch in seen] == [part.tolist() for part in x.split(6)] * 2
    seen.clear()
    distill(student, teacher, x.split(6), epochs=2, batch_size=6, progress=False)
    epochs = [torch.cat(seen[i : i + 4]).tolist() for i in (0, 4)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == x.tolist()


# --- asking the teacher once


def counting(teacher):
    calls = []
    teacher.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


@settings(max_examples=10)
@given(st.sampled_from([None, 8]), st.booleans(), st.sampled_from([1.0, 0.4]))
def test_answers_that_are_kept_teach_the_same(size, features, alpha):
    results, counts = [], []
    for cache in (False, None, True):
        student, teacher, _ = pair()
        batches = [*loader()]
        calls = counting(teacher)
        how = {"features": {"0": "1"}, "feature_weight": 0.1} if features else {}
        options = {"epochs": 3, "batch_size": size, "alpha": alpha, "progress": False, **how}
        losses = distill(student, teacher, batches, cache=cache, **options)
        results.append((losses, weights(student)))
        counts.append(len(calls))
    assert counts == [12 + features, 4 + features, 4 + features]
    for losses, values in results[1:]:
        if size is None:
            assert losses == results[0][0]
            assert torch.equal(values, results[0][1])
        else:
            # Rows of other batches differ in the last bit.
            torch.testing.assert_close(values, results[0][1], rtol=1e-4, atol=1e-5)


def test_a_loader_is_read_each_epoch_unless_it_is_to_be_kept():
    for cache, wanted in ((None, 12), (False, 12), (True, 4)):
        student, teacher, _ = pair()
        calls = counting(teacher)
        distill(student, teacher, loader(shuffle=True), cache=cache, epochs=3, progress=False)
        assert len(calls) == wanted


def test_answers_that_do_not_fit_are_asked_for_again(monkeypatch):
    monkeypatch.setattr("pysolve.training.distill.free_memory", lambda: 100)
    student, teacher, x = pair()
    calls = counting(teacher)
    distill(student, teacher, x.split(30), epochs=3, progress=False)
    # One more to see how large they are.
    assert len(calls) == 13


def test_mixtures_are_never_kept():
    student, teacher, x = pair()
    calls = counting(teacher)
    distill(student, teacher, x.split(30), epochs=3, mix=0.5, progress=False)
    assert len(calls) == 12
    with pytest.raises(ValueError, match="cache=True keeps nothing"):
        distill(student, teacher, [x], epochs=1, mix=0.5, cache=True)


def test_outputs_that_are_not_one_a_sample_are_taken_as_they_come():
    torch.manual_seed(0)
    student, teacher = (Answering(lambda y, c=c: (y, y.mean(0, keepdim=True).repeat(2, 1))) for c in "ab")
    x = torch.randn(20, 4)
    history = distill(student, teacher, [x], epochs=5, batch_size=7, loss="mse", lr=0.05, progress=False)
    assert history[-1] < history[0]


# --- features


def convs(width):
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width * 9, 3))


def unexplained_share(student, teacher, x, layer="0"):
    """Least squares of the teacher's channels on the student's: what no linear map can explain."""
    columns = []
    for net in (student, teacher):
        with torch.no_grad():
            feature = net[0](x).double()
        columns.append(feature.movedim(1, -1).reshape(-1, feature.shape[1]).numpy())
    own = np.c_[columns[0], np.ones(len(columns[0]))]
    rest = columns[1] - own @ np.linalg.lstsq(own, columns[1], rcond=None)[0]
    return (rest**2).sum() / ((columns[1] - columns[1].mean(0)) ** 2).sum()


@pytest.mark.parametrize(("own", "theirs"), [(4, 4), (6, 5), (4, 7)])
def test_features_come_closer_also_with_other_numbers_of_channels(own, theirs):
    torch.manual_seed(0)
    x, teacher = torch.randn(32, 2, 5, 5), convs(theirs)
    students = [convs(own) for _ in "ab"]
    students[1].load_state_dict(students[0].state_dict())
    names = [*dict(students[0].named_parameters())]
    how = {"epochs": 40, "batch_size": 16, "lr": 0.02, "progress": False}
    distill(students[0], teacher, [x], **how)
    distill(students[1], teacher, [x], features=["0"], feature_weight=3.0, **how)
    before, after = (unexplained_share(one, teacher, x) for one in students)
    assert after < 0.7 * before
    assert [*dict(students[1].named_parameters())] == names
    assert not any(module._forward_hooks for net in (students[1], teacher) for module in net.modules())


def test_the_feature_loss_is_the_share_of_variance_that_is_missed():
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    student, teacher = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    how = {"features": ["0"], "epochs": 1, "lr": 1e-9, "progress": False}
    with torch.no_grad():
        s, t = student(x).double().numpy(), teacher(x).double().numpy()
    wanted = ((s - t) ** 2).mean() / ((t - t.mean(0)) ** 2).mean()
    alone = distill(copy.deepcopy(student), teacher, [x], **{**how, "features": None})
    both = distill(copy.deepcopy(student), teacher, [x], feature_weight=2.5, **how)
    assert both[0] - alone[0] == pytest.approx(2.5 * wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ("0", TypeError, r"got the string '0': pass \['0'\]"),
        (["9"], PysolveError, "no layer '9'"),
        ({"0": "9"}, PysolveError, "no layer '9'"),
        (
            {"0": "1"},
            PysolveError,
            r"of 0 have shape \[8, 4, 3, 3\], those of the teacher's 1 \[8, 5, 1, 1\]",
        ),
    ],
)
def test_layers_that_do_not_match_are_named(features, error, message):
    student = convs(4)
    teacher = nn.Sequential(nn.Conv2d(2, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    with pytest.raises(error, match=message):
        distill(student, teacher, [torch.randn(8, 2, 5, 5)], features=features, epochs=1)


def test_features_of_sequences_have_their_channels_where_the_layer_has_them():
    for make in (nn.Linear, lambda a, b: nn.Conv1d(a, b, 1)):
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(make(4, width), nn.ReLU(), make(width, 4)) for width in (3, 5))
        how = {"epochs": 2, "features": ["0"], "loss": "mse", "progress": False}
        assert len(distill(student, teacher, [torch.randn(8, 4, 4)], **how)) == 2


# --- networks


def test_a_student_in_training_mode_keeps_statistics_and_a_frozen_one_does_not():
    for frozen in (False, True):
        student, teacher, x = pair()
        student[2] = nn.BatchNorm1d(16)
        student.eval()
        seen = []
        student[2].register_forward_pre_hook(lambda module, args, to=seen: to.append(module.training))
        distill(student, teacher, [x], epochs=2, frozen=frozen, progress=False)
        assert seen == [not frozen] * 2
        assert int(student[2].num_batches_tracked) == (0 if frozen else 2)
        assert not student.training


def test_the_teacher_is_left_as_it_was_when_training_fails():
    student, teacher, x = pair()
    teacher[2].eval()
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(PysolveError, match="the loss became"):
        distill(student, teacher, [x], epochs=30, batch_size=8, lr=1e30, loss="mse")
    assert [module.training for module in teacher] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_student_and_teacher_must_be_two():
    student, teacher, x = pair()
    with pytest.raises(ValueError, match="are one network"):
        distill(student, student, [x], epochs=1)
    teacher[3] = nn.Linear(32, 3)
    mixed = nn.Sequential(student[0], nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"share 0.weight, 0.bias: .* copy.deepcopy"):
        distill(student, mixed, [x], epochs=1)
    with pytest.raises(TypeError, match=r"teacher must be a torch.nn.Module, .* got str"):
        distill(student, "teacher", [x], epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"alpha": 1.5}, "alpha must be within 0 and 1"),
        ({"loss": "l1"}, "loss must be kl, mse or a callable, got 'l1'"),
        ({"feature_weight": -1}, "feature_weight must be a number of 0 and above"),
        ({"alpha": 0.5, "mix": 0.5}, "mixtures have no labels: with alpha=0.5, mix must be 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    student, teacher, x = pair()
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, [x], epochs=1, **options)


@pytest.mark.parametrize("name", ["temperature", "alpha", "mix", "feature_weight"])
def test_options_that_are_no_numbers_are_named(name):
    student, teacher, x = pair()
    with pytest.raises(TypeError, match=f"{name} must be a number, got 'much'"):
        distill(student, teacher, [x], epochs=1, **{name: "much"})
    with pytest.raises(TypeError, match="loss must return a tensor, computed from the outputs, got None"):
        distill(student, teacher, [x], epochs=1, loss=lambda *_: None)


def test_labels_that_the_cross_entropy_refuses_are_named():
    student, teacher, x = pair()
    labels = torch.full((len(x),), 10**6)
    for wrong in (labels, labels[:1] * 0):
        with pytest.raises(DataError, match=r"refuses labels int64\[\d+\]: .*counted from 0"):
            distill(student, teacher, [(x, wrong)], epochs=1, alpha=0.5)


def test_where_the_teacher_breaks_is_told():
    student, teacher, x = pair()
    x[70, 0] = np.nan
    for size, where in ((None, "batch 3"), (16, "sample 70")):
        for cache in (False, True):
            with pytest.raises(DataError, match=f"NaN or infinity in {where}: check the batches"):
                distill(student, teacher, x.split(30), batch_size=size, cache=cache, epochs=1)


def test_bfloat16_ends_near_full_precision():
    results = []
    for precision in ("float32", "bfloat16", "auto"):
        student, teacher, x = pair()
        how = {"epochs": 20, "batch_size": 16, "lr": 0.02, "progress": False, "precision": precision}
        distill(student, teacher, [x], loss="mse", **how)
        assert student[0].weight.dtype == torch.float32
        results.append(distance(student, teacher, x))
    assert results[2] == results[0]
    assert results[1] != results[0]
    assert results[1] < 2 * results[0] + 1e-3


def test_the_best_student_comes_back():
    student, teacher, x = pair()
    scores, kept = [], []

    def evaluate(network):
        scores.append(-distance(network, teacher, x) if len(scores) < 5 else -1e9)
        kept.append(weights(network))
        return scores[-1]

    distill(student, teacher, [x], epochs=20, evaluate=evaluate, patience=3, loss="mse", progress=False)
    assert len(scores) == 8
    assert torch.equal(weights(student), kept[int(np.argmax(scores))])
