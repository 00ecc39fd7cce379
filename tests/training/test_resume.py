"""Training that was stopped and goes on is training without a stop, bit for bit."""

import copy
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import sealed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pysolve as ps
from pysolve.nn.layers.masking import unmasked
from pysolve.training import resume
from pysolve.training.fit import fit

X = torch.randn(21, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
TEACHER = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).requires_grad_(False)


class Stopped(Exception):
    pass


def stop_at(step):
    """Stops the training after so many steps, or never."""
    taken = 0

    def after_step(share):
        nonlocal taken
        taken += 1
        if taken == step:
            raise Stopped

    return after_step


def network():
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)
    model = nn.Sequential(*layers)
    model.register_buffer("own", torch.zeros(2), persistent=False)
    return model


def state(model):
    model = unmasked(model)
    return dict([*model.named_parameters(), *model.named_buffers()])


def same(a, b):
    a, b = state(a), state(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loader(seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True, generator=generator)


def score(model):
    assert not model.training
    # Whoever looks may draw random numbers.
    torch.rand(3)
    return float((model(X).argmax(1) == Y).float().mean())


TRAININGS = {
    "fit": lambda model, **how: fit(model, X, Y, batch_size=7, **how),
    "finetune": lambda model, **how: ps.finetune(model, loader(), **how),
    "own generator": lambda model, **how: ps.finetune(model, loader(3), **how),
    "distill": lambda model, **how: ps.distill(model, TEACHER, loader(3), **how),
    "mixed": lambda model, **how: ps.distill(model, TEACHER, [X], batch_size=7, mix=0.5, **how),
    "labelled": lambda model, **how: ps.distill(model, TEACHER, [(X, Y)], batch_size=7, alpha=0.3, **how),
    "features": lambda model, **how: ps.distill(
        model, TEACHER, X.split(7), features={"0": "0"}, cache=True, **how
    ),
    "loader, kept": lambda model, **how: ps.distill(model, TEACHER, loader(), cache=True, **how),
}


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(TRAININGS)),
    st.integers(1, 12),
    st.sampled_from(["adam", "adamw", "sgd", lambda given: torch.optim.RMSprop(given, lr=1e-3)]),
    st.sampled_from(["one-cycle", "cosine", "constant", lambda share: 1 - share / 2]),
    st.booleans(),
    st.integers(0, 3),
)
def test_a_training_that_stopped_after_any_step_goes_on_bit_for_bit(
    tmp_path_factory, name, step, optimizer, schedule, judged, seed
):
    path = tmp_path_factory.mktemp("checkpoints") / "a.pt"
    train, how = TRAININGS[name], {"epochs": 4, "lr": 0.05, "seed": seed, "progress": False, "clip": 2.0}
    how |= {"optimizer": optimizer, "schedule": schedule, "evaluate": score if judged else None}
    whole = network()
    losses = train(whole, **how)
    with pytest.raises(Stopped):
        train(network(), **how, checkpoint=path, after_step=stop_at(step))
    assert path.exists() == (step > 3)
    torch.rand(step)
    resumed = network()
    assert train(resumed, **how, checkpoint=path) == losses
    assert same(resumed, whole)
    again = network()
    assert train(again, **how, checkpoint=path, after_step=stop_at(1)) == losses
    assert same(again, whole)
    assert [one.name for one in path.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("prune", [ps.prune_gradually, ps.network_surgery])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_pruning_goes_on_with_the_same_masks(prune, epoch, tmp_path, monkeypatch):
    how = {"amount": 0.6, "epochs": 4, "lr": 0.05, "layout": "masked", "progress": False}
    whole = prune(network(), loader(3), **how).model

    write, written = resume.write, []

    def stop(path, *args):
        if len(written) == epoch:
            raise Stopped
        written.append(path)
        write(path, *args)

    monkeypatch.setattr("pysolve.training.loop.write", stop)
    with pytest.raises(Stopped):
        prune(network(), loader(3), **how, checkpoint=tmp_path / "a.pt")
    monkeypatch.undo()
    resumed = prune(network(), loader(3), **how, checkpoint=tmp_path / "a.pt").model
    assert same(resumed, whole)
    with pytest.raises(ps.DataError, match=r"of other pruning: it was .*amount=0.6"):
        prune(network(), loader(3), **{**how, "amount": 0.7}, checkpoint=tmp_path / "a.pt")


def test_patience_ends_a_resumed_training_where_it_ends_a_whole_one(tmp_path):
    scores = iter([1, 3, 2, 2, 2, 9])
    how = {"epochs": 6, "progress": False, "checkpoint": tmp_path / "a.pt", "patience": 3}
    with pytest.raises(Stopped):
        fit(network(), X, Y, **how, evaluate=lambda _: next(scores), after_step=stop_at(4))
    losses = fit(network(), X, Y, **how, evaluate=lambda _: next(scores))
    assert len(losses) == 5
    assert next(scores) == 9


def test_by_the_clock_a_training_goes_on_from_the_time_it_had(tmp_path):
    how = {"seconds": 0.4, "batch_size": 7, "progress": False, "checkpoint": tmp_path / "a.pt"}
    with pytest.raises(Stopped):
        fit(network(), X, Y, **how, after_step=stop_at(9))
    shares = []
    fit(network(), X, Y, **how, after_step=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    fit(network(), X, Y, **how, after_step=stop_at(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs was 2, now it is 3"),
        ({"seed": 1}, "seed was 0, now it is 1"),
        (
            {"lr": 0.1, "schedule": "cosine"},
            "lr was 0.001, now it is 0.1; schedule was one-cycle, now it is cosine",
        ),
        ({"evaluate": score}, "evaluate was False, now it is True"),
        ({"batch_size": 5}, "steps was 3, now it is 5"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_with_what_differs(change, message, tmp_path):
    path = tmp_path / "a.pt"
    fit(network(), X, Y, **{"epochs": 2, "batch_size": 7, "checkpoint": path})
    model = network()
    with pytest.raises(ps.DataError, match=message):
        fit(model, X, Y, **{"epochs": 2, "batch_size": 7, "checkpoint": path, **change})
    assert same(model, network())


def test_numbers_of_numpy_can_be_kept(tmp_path):
    how = {"epochs": np.int64(2), "lr": np.float32(0.01), "clip": np.float64(1.0)}
    how |= {
        "seed": np.int64(3),
        "schedule": np.cos,
        "evaluate": lambda _: np.float32(1.0),
        "checkpoint": tmp_path / "a.pt",
    }
    assert fit(network(), X, Y, **how) == fit(network(), X, Y, **how)


def test_a_checkpoint_of_another_network_is_refused_with_its_first_differences(tmp_path):
    how = {"epochs": 1, "checkpoint": tmp_path / "a.pt"}
    fit(network(), X, Y, **how)
    wide, frozen = network(), network()
    wide[0] = nn.Linear(4, 9)
    frozen[0].bias.requires_grad_(False)
    with pytest.raises(
        ps.DataError, match=r"0.weight was float32 \[8, 4\], trained, now it is float32 \[9, 4\]"
    ):
        fit(wide, X, Y, **how)
    with pytest.raises(ps.DataError, match=r"0.bias was float32 \[8\], trained, now it is float32 \[8\]\. "):
        fit(frozen, X, Y, **how)
    with pytest.raises(ps.DataError, match=r"4.weight was float32 \[3, 8\], trained, now it is None"):
        fit(network()[:4], X, X.repeat(1, 2), loss=nn.functional.mse_loss, **how)


def test_distillation_of_another_kind_is_another_training(tmp_path):
    how = {"epochs": 1, "checkpoint": tmp_path / "a.pt"}
    ps.distill(network(), TEACHER, [X], **how)
    with pytest.raises(ps.DataError, match=r"temperature was 1.0, now it is 2.0"):
        ps.distill(network(), TEACHER, [X], temperature=2.0, **how)


def test_files_that_are_no_checkpoints_are_refused_and_code_in_them_is_not_run(tmp_path):
    path, made = tmp_path / "a.pt", tmp_path / "made"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    for content in (Code(), {"weights": X}, [1]):
        sealed(content, path)
        with pytest.raises(ps.DataError, match=r"is no checkpoint|damaged, or no checkpoint"):
            fit(network(), X, Y, epochs=1, checkpoint=path)
    assert not made.exists()
    for content in (b"", b"\x80nonsense", np.random.default_rng(0).bytes(500)):
        path.write_bytes(content)
        with pytest.raises(ps.DataError, match="damaged, or no checkpoint"):
            fit(network(), X, Y, epochs=1, checkpoint=path)
    with pytest.raises(ps.DataError, match="there is no folder"):
        fit(network(), X, Y, epochs=1, checkpoint=tmp_path / "none" / "a.pt")


def test_a_torn_file_is_told_and_an_interrupted_write_leaves_the_one_before(tmp_path, monkeypatch):
    path, how = tmp_path / "a.pt", {"epochs": 3, "batch_size": 7}
    with pytest.raises(Stopped):
        fit(network(), X, Y, **how, checkpoint=path, after_step=stop_at(5))
    before, save = path.read_bytes(), torch.save

    def torn(state, to):
        save(state, to)
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk is full"):
        fit(network(), X, Y, **how, checkpoint=path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    whole, resumed = network(), network()
    assert fit(whole, X, Y, **how) == fit(resumed, X, Y, **how, checkpoint=path)
    assert same(whole, resumed)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(ps.DataError, match="damaged"):
        fit(copy.deepcopy(whole), X, Y, **how, checkpoint=path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Bytes of a checkpoint, and where they lie."""
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    fit(network(), X, Y, epochs=1, checkpoint=path)
    return path.read_bytes(), path


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_bit_is_refused(checkpoint, place, bit):
    content, path = checkpoint
    changed = bytearray(content)
    changed[place % len(content)] ^= 1 << bit
    path.write_bytes(changed)
    with pytest.raises(ps.DataError, match="damaged, or no checkpoint"):
        resume._loaded(path)


@pytest.mark.parametrize("optimizer", ["Adafactor", "ASGD", "NAdam", "Rprop"])
def test_states_of_any_shape_go_on_bit_for_bit(optimizer, tmp_path):
    path, whole, resumed = tmp_path / "a.pt", network(), network()
    how = {"epochs": 3, "batch_size": 7, "optimizer": lambda given: getattr(torch.optim, optimizer)(given)}
    losses = fit(whole, X, Y, **how)
    with pytest.raises(Stopped):
        fit(network(), X, Y, **how, checkpoint=path, after_step=stop_at(5))
    assert fit(resumed, X, Y, **how, checkpoint=path) == losses
    assert same(resumed, whole)
