"""Networks of shared weights come back to what they were, and their weights go on being few."""

import copy

import numpy as np
import pytest
import torch

import pysolve as ps
from pysolve.nn.sharing import codebooks_of, remove_sharing, share_weights, ternary_weights
from pysolve.nn.zoo import Mlp
from pysolve.quantization.forms import Codebook
from pysolve.training.shared import train_shared

HOW = {"epochs": 20, "lr": 5e-3, "progress": False}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Mlp((6, 32, 16, 3))


def batches(seed=1):
    return [*torch.randn(4, 64, 6, generator=torch.Generator().manual_seed(seed))]


def rounded(teacher, trained):
    """The teacher with ternary weights, rounded to the nearest."""
    student, books = copy.deepcopy(teacher), {}
    for name in ("fc1", "fc2", "fc3"):
        weight = student.get_submodule(name).weight.detach().numpy()
        form = ps.quantize_layer(weight, scheme="ternary", method="nearest").form
        assert isinstance(form, Codebook)
        books[name] = form
    share_weights(student, books, trained=trained)
    return student


def error(student, teacher):
    x = torch.cat(batches(seed=2))
    with torch.no_grad():
        return float((student(x) - teacher(x)).square().mean() / teacher(x).var())


@pytest.mark.parametrize("trained", ["values", "both", "ternary"])
def test_outputs_come_closer_to_the_teachers_and_weights_stay_ternary(teacher, trained):
    if trained == "ternary":
        student = copy.deepcopy(teacher)
        ternary_weights(student, ["fc1", "fc2", "fc3"])
    else:
        student = rounded(teacher, trained)
    before, kept = error(student, teacher), copy.deepcopy(teacher.state_dict())
    losses = train_shared(student, teacher, batches(), HOW)
    after = error(student, teacher)
    assert losses[-1] < losses[0]
    assert after < (0.9 if trained == "values" else 0.5) * before
    assert all(len(book.centroids) == 3 for book in codebooks_of(student).values())
    assert all(torch.equal(value, kept[name]) for name, value in teacher.state_dict().items())
    remove_sharing(student)
    assert error(student, teacher) == after
    assert all(len(student.get_submodule(name).weight.unique()) <= 3 for name in ("fc1", "fc2", "fc3"))


def test_the_same_seed_gives_the_same_codes_and_values(teacher):
    books = []
    for _ in range(2):
        student = rounded(teacher, "both")
        train_shared(student, teacher, batches(), {**HOW, "epochs": 2})
        books.append(codebooks_of(student))
    for name, book in books[0].items():
        assert np.array_equal(book.dense(), books[1][name].dense())


def test_options_of_distilling_come_through(teacher):
    student = rounded(teacher, "both")
    with pytest.raises(ValueError, match="loss must be kl, mse or a callable, got 'none'"):
        train_shared(student, teacher, batches(), {**HOW, "loss": "none"})
    with pytest.raises(ValueError, match="expected either epochs or seconds"):
        train_shared(student, teacher, batches(), {})


def test_a_network_without_shared_weights_is_refused(teacher):
    with pytest.raises(ps.PysolveError, match="no weights of the network share values: call share_weights"):
        train_shared(copy.deepcopy(teacher), teacher, batches(), HOW)
