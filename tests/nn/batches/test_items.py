"""Whatever users hold their data in: items become the network's batches in every verb in the same way."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pysolve as ps
from pysolve.errors import DataError
from pysolve.nn.batches.items import DATASET_BATCH, batched, example_of
from pysolve.nn.batches.samples import peek, samples_in

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(96) % 3


class Records(Dataset):
    """Samples as data sets of the field give them: what the network reads among other things."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"pixel_values": X[i].numpy(), "labels": int(Y[i]), "path": f"{i}.png", "box": None}


class Uneven(Records):
    def __getitem__(self, i):
        return torch.zeros(i + 1)


def pixels(item):
    return torch.as_tensor(item["pixel_values"])


def with_labels(item):
    return pixels(item), torch.as_tensor(item["labels"])


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def plain():
    return list(X.split(DATASET_BATCH))


def same(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


# --- batches of items


def test_samples_of_a_dataset_become_batches():
    first, batches = peek(TensorDataset(X, Y))
    assert samples_in(first) == DATASET_BATCH
    assert torch.equal(torch.cat([batch[0] for batch in batches]), X)


def test_transform_makes_inputs_of_each_sample_of_a_dataset_and_of_each_item_of_a_loader():
    assert torch.equal(torch.cat([*batched(Records(), pixels)]), X)
    loader = DataLoader(TensorDataset(X, Y), batch_size=10)
    made = batched(loader, lambda item: {"x": item[0]})
    assert len(made) == 10
    for _ in range(2):
        assert torch.equal(torch.cat([batch["x"] for batch in made]), X)


def test_an_iterator_stays_one_whose_first_batch_is_not_lost():
    first, batches = peek(({"a": x} for x in plain()), lambda item: item["a"])
    assert torch.equal(first, X[:DATASET_BATCH])
    assert torch.equal(torch.cat([*batches]), X)


@pytest.mark.parametrize(
    ("batches", "transform", "error", "said"),
    [
        (None, None, DataError, "there are no batches, but None"),
        ([], None, DataError, "there are no batches: expected at least one"),
        (TensorDataset(X[:0]), None, DataError, "there are no batches"),
        (X, None, TypeError, "got one Tensor: wrap it in a list"),
        (5, None, TypeError, "must be an iterable of batches, got int"),
        (DataLoader, None, TypeError, "got the class DataLoader: make one"),
        (Uneven(), None, DataError, "samples of the Dataset make no batch.*transform=.*collate_fn"),
        ([X], "pixels", TypeError, "transform must be a function of an item of batches, got 'pixels'"),
        (
            [{"image": X}],
            pixels,
            DataError,
            "transform fails on .* a dict of image: KeyError: 'pixel_values'",
        ),
        ([(X, Y)], pixels, DataError, "transform fails on .* a tuple of Tensor, Tensor: TypeError"),
    ],
)
def test_what_makes_no_batches_is_said(batches, transform, error, said):
    with pytest.raises(error, match=said):
        peek(batches, transform)


# --- verbs

RUN = {"progress": False}
VERBS = {
    "compress": lambda net, data, **how: ps.compress(net, data, target={"params": 0.6}, **RUN, **how).model,
    "prune": lambda net, data, **how: (
        ps.prune(net, data, method="wanda", amount=0.5, layout="dense", **RUN, **how).model
    ),
    "low_rank": lambda net, data, **how: (
        ps.low_rank(net, data, rank=2, layout="factored", **RUN, **how).model
    ),
    "quantize": lambda net, data, **how: ps.quantize(net, data, scheme="codebook", **RUN, **how).model,
    "deep_compress": lambda net, data, **how: ps.deep_compress(net, data, bits=3, **RUN, **how).model,
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_a_dataset_and_a_transform(verb):
    expected = VERBS[verb](net(), plain())
    for data in (Records(), iter([{"pixel_values": x} for x in plain()])):
        assert same(VERBS[verb](net(), data, transform=pixels), expected)


def test_sweep_gather_inspect_and_find_sites_take_them_too():
    (one,) = ps.sweep(net(), Records(), targets=[{"params": 0.6}], transform=pixels, progress=False)
    (other,) = ps.sweep(net(), plain(), targets=[{"params": 0.6}], progress=False)
    assert one.report.after == other.report.after
    found, expected = ps.gather(net(), Records(), transform=pixels, **RUN), ps.gather(net(), plain(), **RUN)
    assert np.array_equal(found["2"].xx, expected["2"].xx)
    table = str(ps.inspect(net(), X))
    assert str(ps.inspect(net(), Records(), transform=pixels)) == table
    assert str(ps.inspect(net(), {"pixel_values": X}, transform=pixels)) == table
    loader = DataLoader(TensorDataset(X, Y), 32)
    assert str(ps.inspect(net(), loader)) == table
    assert [site.name for site in ps.find_sites(net(), loader)] == ["0 → 2", "2 → nothing"]
    assert len(example_of(loader)[0]) == 32


def test_training_takes_a_dataset_in_another_order_every_time():
    seen = []

    def noted(item):
        seen.append(item["path"])
        return with_labels(item)

    history = ps.finetune(net(), Records(), transform=noted, epochs=2, **RUN)
    assert len(history) == 2
    first, second = seen[:96], seen[96:]
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("options", [{}, {"batch_size": 16}, {"alpha": 0.5}, {"cache": True}])
def test_matching_takes_a_dataset_and_repeats_itself(options):
    transform = with_labels if "alpha" in options else pixels
    students = [net(), net()]
    for student in students:
        teacher = nn.Sequential(nn.Linear(6, 3))
        nn.init.eye_(teacher[0].weight)
        nn.init.zeros_(teacher[0].bias)
        ps.distill(student, teacher, Records(), transform=transform, epochs=2, **RUN, **options)
    assert same(*students)
    assert not same(students[0], net())


def test_a_loader_behind_a_transform_shuffles_by_its_own_generator_also_from_a_checkpoint(
    tmp_path,
):
    def trained(epochs, **options):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator)
        student = net()
        ps.finetune(student, loader, transform=tuple, epochs=epochs, seed=1, **RUN, **options)
        return student

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(4, checkpoint=tmp_path / "run.pt", after_step=stop)
    assert same(trained(4, checkpoint=tmp_path / "run.pt"), trained(4))


@pytest.mark.parametrize("verb", [ps.prune_gradually, ps.network_surgery])
def test_pruning_that_trains_takes_them_too(verb):
    result = verb(net(), Records(), amount=0.5, transform=with_labels, epochs=1, layout="dense", **RUN)
    assert (result.model[0].weight == 0).any()


@pytest.mark.parametrize("none", [None, []])
@pytest.mark.parametrize(
    "verb",
    [
        lambda none: ps.compress(net(), none, progress=False),
        lambda none: ps.sweep(net(), none, targets=[{"params": 0.5}], progress=False),
        lambda none: ps.deep_compress(net(), none, bits=3, progress=False),
        lambda none: ps.gather(net(), none, progress=False),
        lambda none: ps.finetune(net(), none, epochs=1, progress=False),
        lambda none: ps.distill(net(), net(), none, epochs=1, progress=False),
        lambda none: ps.prune_gradually(net(), none, amount=0.5, epochs=1, progress=False),
        lambda none: ps.network_surgery(net(), none, amount=0.5, epochs=1, progress=False),
    ],
)
def test_verbs_that_need_batches_say_that_there_are_none(verb, none):
    with pytest.raises(DataError, match=r"^there are no batches"):
        verb(none)


def test_batches_of_a_dataset_draw_nothing_unless_they_are_shuffled():
    before = torch.get_rng_state()
    assert len([*batched(TensorDataset(X, Y))]) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert len([*batched(TensorDataset(X, Y), shuffle=True)]) == 2
    assert not torch.equal(torch.get_rng_state(), before)
