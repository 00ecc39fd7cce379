"""A student learns what its teacher answers, by the formula, and nothing else is changed."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import l1_loss, mse_loss

from pysolve.errors import DataError, PysolveError
from pysolve.nn.distill import distill

# As compressed networks are brought back to the original's outputs.
MATCHING = {"loss": "mse", "batch_size": 32, "mix": 0.5, "frozen": True, "progress": False}


def match(student, teacher, batches, **options):
    return distill(student, teacher, batches, **{**MATCHING, **options})


def clouds(n=120):
    """Three clouds of points, one a class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    return (rng.standard_normal((n, 4)) + 3 * np.eye(3, 4)[y]).astype(np.float32), y


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def weights(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


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
    for network, inputs in zip(networks, seen, strict=True):
        network.register_forward_pre_hook(lambda module, args, to=inputs: to.append(args[0]))
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
    with pytest.raises(ValueError, match=r"must be (a )?positive"):
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
