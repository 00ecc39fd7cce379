"""Changed files of every format hold the same as before, or are refused with file, place and remedy."""

import json
import sys
from dataclasses import replace

import mutations
import numpy as np
import pytest
import torch
from mutations import FORMATS, batches, compressed, judged, network, sealed, tried

import pysolve as ps
from pysolve.nn.files import storage
from pysolve.nn.files.sums import open_arrays, write_arrays
from pysolve.plan import Plan

OWN = [name for name in FORMATS if name not in ("stock", "plan")]


def assert_survives(name, count, seed, place):
    for number in range(count):
        home = place / str(number)
        home.mkdir()
        how, became = tried(name, np.random.default_rng([seed, number]), home)
        assert became in ("same", "refused", "not written"), f"{name} {seed}/{number}: {how}: {became}"


@pytest.mark.parametrize("name", OWN)
def test_changed_files_are_refused_or_hold_the_same(name, tmp_path):
    assert_survives(name, 25, 1, tmp_path)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("checkpoint", (2855, 23204, 43595, 60906, 143422, 144780, 190147, 280706, 294839, 348991, 381233)),
        ("study", (25659, 70109, 95092)),
    ],
)
def test_what_once_went_unnoticed_is_refused(name, numbers, tmp_path):
    for number in numbers:
        home = tmp_path / str(number)
        home.mkdir()
        assert tried(name, np.random.default_rng([20261129, number]), home)[1] in ("same", "refused")


# Folders of the first kind are opened in fresh processes, which takes long.
@pytest.mark.parametrize("name", [pytest.param("stock", marks=pytest.mark.slow), "plan"])
def test_changed_folders_of_transformers_are_refused_or_hold_the_same(name, tmp_path):
    pytest.importorskip("transformers")
    assert_survives(name, 6, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_changed_files_are_refused_or_hold_the_same(name, tmp_path):
    if name in ("stock", "plan"):
        pytest.importorskip("transformers")
    assert_survives(name, 80 if name in ("stock", "plan") else 700, 2, tmp_path)


@pytest.mark.parametrize("kind", ["every channel kept", "one channel less", "nothing"])
def test_thousands_of_stages_are_refused_before_any_work(kind, tmp_path, monkeypatch):
    ps.save(compressed(), tmp_path / "file")
    record, tensors = storage.read(tmp_path / "file")
    step = record["stages"][0][0]
    stages = {
        "every channel kept": [[{**step, "keep": f"0-{step['channels'] - 1}"}]] * 5000,
        "one channel less": [[{**step, "channels": 5000 - i, "keep": f"0-{4998 - i}"}] for i in range(5000)],
        "nothing": [[]] * 5000,
    }[kind]
    storage.write(tmp_path / "file", tensors, {**record, "stages": stages})

    def work(*given, **options):
        raise AssertionError("work was done")

    for name in ("apply", "steps_of", "substitute"):
        monkeypatch.setattr(f"pysolve.nn.files.architecture.{name}", work)
    with pytest.raises(ps.DataError, match=r"file does not fit .* it has 5000 stages, more than 100"):
        ps.load(tmp_path / "file", network())


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    many = replace(compressed(), earlier=(Plan(untied=("0.weight",)),) * 101)
    with pytest.raises(ps.PysolveError, match=r"compressed 10[123] times, and files hold up to 100"):
        ps.save(many, tmp_path / "file")
    assert not [*tmp_path.iterdir()]


def test_a_study_imports_nothing_that_its_file_names(tmp_path):
    path = tmp_path / "file"
    mutations.studied().save(tmp_path / "whole")
    arrays, metadata = open_arrays(tmp_path / "whole")
    assert "antigravity" not in sys.modules
    for kind, context in (
        ("builtins.tuple", json.dumps({"__enum__": True, "fqn": "antigravity:A", "name": "a"})),
        ("collections.defaultdict", json.dumps({"default_factory_module": "antigravity"})),
    ):
        record = json.loads(metadata["pysolve_study"])
        form = {"type": kind, "context": context, "children_spec": []}
        record["samples"]["held"][0]["form"] = json.dumps([1, form])
        write_arrays(path, arrays, {"pysolve_study": json.dumps(record)})
        with pytest.raises(ps.DataError, match=r"a (builtins\.tuple|collections\.defaultdict)"):
            ps.Study.load(path, network())
    assert "antigravity" not in sys.modules


def test_checkpoints_of_trainings_that_went_on_are_read_and_forged_ones_change_nothing(tmp_path):
    one = FORMATS["checkpoint"]
    one.make(tmp_path)
    assert judged(one.open, tmp_path, one.open(tmp_path)) == "same"
    whole = torch.load(tmp_path / "file", weights_only=True)
    group = whole["optimizer"]["param_groups"][0]
    for place, name, value, said in (
        (group, "amsgrad", True, "amsgrad of its optimizer is True, not False"),
        (group, "lr", float("nan"), "lr of its optimizer is nan"),
        (whole["progress"], "done", -1, "negative or infinite"),
        (whole["progress"], "done", 1.5, "expected done of its progress"),
        (whole["modules"][0], "0.bias", torch.zeros(1), "0.bias is no torch.float32 of shape"),
        (whole["modules"], 0, {}, "its tensors are not those of the network"),
        (whole["random"], "global", torch.zeros(3), "RNG state"),
        (whole, "after_step", {}, "it lacks 'count'"),
        (whole["optimizer"]["state"][0], "exp_avg", torch.zeros(()), "state is not that of these parameters"),
        (whole["optimizer"]["state"][1], "step", torch.zeros(20), "state is not that of these parameters"),
        (group, "params", [1, 0, *group["params"][2:]], "its optimizer's parameters are others"),
    ):
        before, place[name] = place[name], value
        sealed(whole, tmp_path / "file")
        place[name] = before
        with pytest.raises(ps.DataError, match=f"file is damaged, or no checkpoint: .*{said}.*Give another"):
            one.open(tmp_path)


def test_correlations_that_would_unpack_to_more_than_the_file_are_refused(tmp_path):
    x = np.zeros((2000, 2000))
    np.savez_compressed(tmp_path / "a.npz", xx=x, yx=x, yy=x, x_sum=x[0], y_sum=x[0], count=1, group_size=1)
    with pytest.raises(ps.DataError, match=r"xx\.npy takes 32,000,128 bytes, the file"):
        ps.Correlations.load(tmp_path / "a.npz")


def test_the_judge_sees_what_is_wrong(tmp_path):
    def fails(error):
        def open_file(folder):
            raise error

        return open_file

    assert judged(lambda folder: 1, tmp_path, 1) == "same"
    assert judged(lambda folder: 1, tmp_path, 2) == "other content"
    assert judged(fails(ps.DataError(f"{tmp_path} is damaged")), tmp_path, 1) == "refused"
    assert judged(fails(ps.DataError("damaged")), tmp_path, 1).startswith("no file is named")
    assert judged(fails(KeyError("a")), tmp_path, 1).startswith("KeyError")
    assert len(batches()) == 2
