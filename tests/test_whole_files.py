"""A file is written whole or not at all, whoever writes it."""

import os
import stat

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve.whole_files import replacing, replacing_folder


def test_a_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("failing", ["body", "fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_what_fails_leaves_what_was_there(tmp_path, monkeypatch, failing, existing):
    path = tmp_path / "a.txt"
    if existing:
        path.write_text("old")

    def fails(*args):
        raise OSError("no space left")

    def write():
        with replacing(path) as part:
            part.write_text("half")
            if failing == "body":
                fails()

    if failing != "body":
        monkeypatch.setattr(os, failing, fails)
    with pytest.raises(OSError, match="no space left"):
        write()
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "old")] * existing


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_files_are_as_open_as_others(tmp_path):
    with replacing(tmp_path / "a.txt") as part:
        part.chmod(0o600)
    (tmp_path / "b").touch()
    assert len({stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}) == 1


def test_a_place_that_cannot_be_written_is_named_before_any_writing(tmp_path):
    with pytest.raises(ps.PysolveError, match=r"no/a\.txt cannot be written: there is no folder"):
        replacing(tmp_path / "no" / "a.txt").__enter__()
    for place in (tmp_path, "/dev/null"):
        with pytest.raises(ps.PysolveError, match="what is there is no file"):
            replacing(place).__enter__()
    assert not [*tmp_path.iterdir()]


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, leads in (("file", "disk/file"), ("folder", "disk/folder"), ("new", "disk/new")):
        (tmp_path / name).symlink_to(leads)
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "disk" / "folder").mkdir()
    for name in ("file", "new"):
        with replacing(tmp_path / name) as part:
            part.write_text("new")
    with replacing_folder(tmp_path / "folder") as part:
        (part / "one").write_text("new")
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "new"))
    for name in ("file", "new", "folder/one"):
        assert (tmp_path / "disk" / name).read_text() == "new"


@pytest.mark.parametrize("kind", [replacing, replacing_folder])
def test_a_name_that_is_too_long_is_an_error_of_the_disk(tmp_path, kind):
    with pytest.raises(ps.PysolveError, match="File name too long"), kind(tmp_path / ("n" * 300)):
        pass
    assert not [*tmp_path.iterdir()]


def full_disk(file, *args, **kwargs):
    with open(file, "wb") if isinstance(file, os.PathLike) else file as opened:
        opened.write(b"half of it")
    raise OSError(28, "No space left on device")


def test_checkpoints_correlations_and_networks_leave_nothing_behind(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((20, 3))
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    result = ps.prune(model, amount=0.5)
    batches = [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]
    monkeypatch.setattr(np, "savez", full_disk)
    monkeypatch.setattr(torch, "save", lambda state, path: full_disk(path))
    monkeypatch.setattr("pysolve.nn.files.storage.save_file", lambda content, path, **_: full_disk(path))
    for write in (
        ps.Correlations.from_samples(x, x).save,
        lambda path: ps.save(result, path),
        lambda path: ps.finetune(model, batches, epochs=1, progress=False, checkpoint=path),
    ):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "file")
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [b"\xff", b"a/b"])
def test_locks_of_others_stand_in_nobodys_way(tmp_path, name):
    other = tmp_path / "theirs.0123abcd.part"
    other.mkdir()
    (other / "pysolve.lock").write_bytes(name)
    with replacing(tmp_path / "file") as new:
        new.write_bytes(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert (other / "pysolve.lock").read_bytes() == name
