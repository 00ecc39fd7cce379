"""Whoever gives a batch that the network refuses reads why, and what to give instead."""

import numpy as np
import pytest
import torch
from small import Net
from torch import nn

import pysolve as ps
from pysolve.errors import DataError
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.refusal import by_name, check_many, output_of
from pysolve.plan import Plan, Site


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(3, 8)
        self.c = nn.Linear(8, 2)

    def forward(self, first, second, scale=1.0):
        return self.c((self.a(first) * scale + self.b(second)).relu())


class Whole(nn.Module):
    """Takes one mapping."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, batch):
        return self.fc(batch["x"])


def images():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))


x, first, second = torch.zeros(5, 3, 8, 8), torch.zeros(5, 6), torch.zeros(5, 3)
CASES = {
    "two inputs as a tuple": (
        Two,
        (first, second),
        r"rest is taken for labels.*2 inputs by name: \{'first': …, 'second': …\}",
    ),
    "a name too many": (
        Two,
        {"first": first, "second": second, "label": second},
        "'label': forward does not take it",
    ),
    "a wrong name": (Two, {"first": first, "secnd": second}, "'secnd': did you mean 'second'"),
    "a mapping as the only argument": (Whole, {"x": first}, r"wrap it: \{'batch': …\}"),
    "images of bytes": (images, x.byte(), r"input is uint8: .*input\.to\(torch\.float32\) / 255"),
    "doubles": (images, x.double(), r"give input\.to\(torch\.float32\)"),
    "numbers for words": (words, second, r"whole numbers: give them with \.long\(\)"),
    "one sample": (images, x[0], r"single sample.*torch\.stack\(samples\)"),
    "too few channels": (images, x[:, :1], r"input: float32\[5, 1, 8, 8\]\).*to have 3 channels"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_network_itself_is_said_to_refuse_the_batch_with_a_remedy(name):
    make, batch, remedy = CASES[name]
    for call in (output_of, ps.find_sites, lambda *of: ps.compress(of[0], [of[1]], keep=0.5, progress=False)):
        with pytest.raises(
            DataError, match=rf"{make().__class__.__name__} itself refuses the batch.*{remedy}"
        ) as e:
            call(make(), batch)
        assert "cannot be traced" not in str(e.value)
        assert "\n" not in str(e.value)


def test_a_later_batch_that_is_refused_is_told_in_the_same_way():
    with pytest.raises(
        DataError, match=r"Sequential itself refuses the batch \(input: float32\[5, 1, 8, 8\]\)"
    ):
        ps.prune(images(), [x, x[:, :1]], method="obs", amount=0.5, progress=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batch: ps.inspect(model, batch, sites=[Site(4, ("0",), ("4",))]),
        lambda model, batch: cost_model(model, [], batch),
        lambda model, batch: ps.gather(model, [batch], progress=False),
        lambda model, batch: ps.apply(model, Plan(), probe=batch),
        lambda model, batch: ps.accuracy(model, batch, torch.zeros(5, dtype=torch.long)),
        lambda model, batch: ps.fit(model, batch, torch.zeros(5, dtype=torch.long), epochs=1, progress=False),
        lambda model, batch: ps.finetune(model, [(batch, torch.zeros(5).long())], epochs=1, progress=False),
        lambda model, batch: ps.distill(model, images(), [batch], epochs=1, progress=False),
        lambda model, batch: ps.quantize(model, [batch], scheme="int8", progress=False),
        lambda model, batch: ps.low_rank(model, [batch], rank=1, progress=False),
        lambda model, batch: ps.prune(model, [batch], amount=0.5, progress=False),
        lambda model, batch: ps.deep_compress(model, [batch], bits=2, progress=False),
    ],
)
def test_everything_that_takes_a_batch_says_so(call):
    with pytest.raises(DataError, match=r"Sequential itself refuses the batch.*to have 3 channels"):
        call(images(), x[:, :1])


def test_the_line_of_the_networks_code_is_named():
    model = Net(lambda net, x: net.fc(x.reshape(-1, 7)), fc=nn.Linear(7, 2))
    with pytest.raises(DataError, match=r"test_refusal\.py:\d+: model = Net.*: shape '\[-1, 7\]' is invalid"):
        output_of(model, torch.zeros(5, 3))


def test_forms_that_are_no_batch_have_their_remedies():
    with pytest.raises(TypeError, match=r"got ndarray: torch\.from_numpy"):
        output_of(words(), np.zeros((5, 3), np.int64))
    with pytest.raises(TypeError, match=r"got tuple: give several inputs by name"):
        output_of(Two(), ((torch.zeros(5, 6), torch.zeros(5, 3)), torch.zeros(5)))


def test_values_of_a_batch_have_the_names_of_their_places():
    assert [*by_name(torch.zeros(2))] == ["input"]
    assert [*by_name({"mask": None, "states": (1, {"h": 2})})] == ["mask", "states[0]", "states[1]['h']"]


def test_samples_without_their_dimension_are_refused_though_the_network_takes_them():
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)
    model, samples = nn.Sequential(*layers), list(torch.randn(20, 8))
    for call in (
        lambda: ps.compress(model, samples, keep=0.5, progress=False),
        lambda: ps.prune(model, samples, method="obs", amount=0.5, progress=False),
        lambda: ps.quantize(model, samples, scheme="codebook", progress=False),
    ):
        with pytest.raises(DataError, match=r"got input: float32\[8\]. It is a single sample"):
            call()


def test_a_network_for_batches_of_one_size_alone_is_not_taken_for_one_of_single_samples():
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(6, 8))

    check_many(Fixed(8, 4), torch.randn(6, 8))


class Flattened(nn.Sequential):
    def forward(self, x):
        return super().forward(x.view(64, -1))


@pytest.mark.parametrize("sizes", [(64, 64), (64, 30)])
def test_of_sizes_that_are_written_into_the_code_those_that_it_takes_are_named(sizes):
    model = Flattened(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(size, 8) for size in sizes]
    with pytest.raises(
        DataError, match=r"The first batch \(input: float32\[64, 8\]\) it takes: .* x\.shape\[0\]"
    ):
        ps.compress(model, batches, keep=0.5, progress=False)
