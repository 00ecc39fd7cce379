"""Full disks, folders that may not be written or are gone, and kills: one error, and the old file whole."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve import whole_files
from pysolve.cli.outputs import write
from pysolve.errors import WriteError
from pysolve.nn.files.sums_folder import SumsFolder
from pysolve.report.page import page
from pysolve.whole_files import replacing, replacing_folder

HERE = Path(__file__).parent
QUIET = {"progress": False, "latency": False}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 20)).eval()


@cache
def result():
    return ps.prune(network(), amount=0.5, method="magnitude")


@cache
def narrowed():
    return ps.compress(network(), studied(), keep=0.5, **QUIET)


@cache
def studied():
    torch.manual_seed(1)
    return ps.study(network(), [torch.randn(60, 30)], progress=False)


@cache
def llama():
    transformers = pytest.importorskip("transformers")
    from families import batches, made

    model, batch = made(transformers, "llama")
    return ps.compress(model, batches(batch), keep=0.5, widths="uniform", **QUIET)


def correlations(path):
    x = np.random.default_rng(0).standard_normal((60, 40))
    ps.Correlations.from_samples(x, x).save(path)


def checkpoint(path):
    data = [(torch.zeros(4, 30), torch.zeros(4, dtype=torch.long))]
    path.unlink(missing_ok=True)
    ps.finetune(network(), data, epochs=1, progress=False, checkpoint=path)


def folder_of_sums(path):
    folder = SumsFolder(path, {"network": "this"})
    folder.add("0", dict(studied().correlations))


WRITERS = {
    "save": lambda path: ps.save(result(), path),
    "format 1": lambda path: ps.save(result(), path, coding="none"),
    "correlations": correlations,
    "study": lambda path: studied().save(path),
    "checkpoint": checkpoint,
    "plot": lambda path: ps.plot_channels(narrowed().report, path.with_suffix(".png")),
    "page": lambda path: write(path, page(result().report, "a title")),
    "pretrained": lambda path: ps.save_pretrained(llama(), path, overwrite=True),
    "plan of pretrained": lambda path: ps.save_pretrained(llama(), path, stock=False, overwrite=True),
}


# They are opened again each time, one of them in a fresh process.
SLOW = {name: pytest.mark.slow for name in ("pretrained", "plan of pretrained")}


def contents(folder):
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@contextmanager
def short_disk(most):
    """No file may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails(number, path):
    def function(*args, **options):
        raise OSError(number, os.strerror(number), str(path))

    return function


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in WRITERS])
def test_a_disk_that_is_full_is_told_with_bytes_and_leaves_the_old_file(name, tmp_path):
    path = tmp_path / "file"
    writer = WRITERS[name]
    for most in (0, 300):
        with short_disk(most), pytest.raises(ps.PysolveError) as caught:
            writer(path)
        said = str(caught.value)
        assert isinstance(caught.value, WriteError), said
        assert f"{path}" in said
        assert "cannot be written: File too large" in said
        assert "are free there. Make room" in said
        assert contents(tmp_path) == {}
    if name == "checkpoint":
        return
    writer(path)
    before = contents(tmp_path)
    with short_disk(300), pytest.raises(ps.PysolveError, match="File too large"):
        writer(path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("place", ["mkdir", "fsync", "replace"])
@pytest.mark.parametrize("name", [name for name in WRITERS if "pretrained" not in name])
def test_whatever_the_system_says_is_one_kind_of_error(name, place, number, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / "file")
    before = contents(tmp_path)
    monkeypatch.setattr(os, place, fails(number, tmp_path))
    with pytest.raises(WriteError, match=os.strerror(number)) as caught:
        replacing_writes(name, tmp_path / "file")
    assert caught.value.errno == number
    monkeypatch.undo()
    after = contents(tmp_path)
    assert name == "checkpoint" or after == before


def replacing_writes(name, path):
    if name == "checkpoint":
        path = path.with_name("other")
    WRITERS[name](path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_gone_is_named(name, tmp_path, monkeypatch):
    with pytest.raises(ps.PysolveError, match="there is no folder"):
        WRITERS[name](tmp_path / "gone" / "file")
    home = tmp_path / "here"
    home.mkdir()
    claimed = whole_files._locked

    def taken_away(*args):
        found = claimed(*args)
        os.replace(home, tmp_path / "there")
        return found

    monkeypatch.setattr(whole_files, "_locked", taken_away)
    with pytest.raises(WriteError, match=r"No such file.* there is no folder"):
        WRITERS[name](home / "file")


def test_folders_of_sums_say_what_cannot_be_kept(tmp_path):
    said = r"cannot be (kept|written).*File too large"
    for most in (0, 2000):
        with short_disk(most), pytest.raises(ps.PysolveError, match=said):
            folder_of_sums(tmp_path / f"sums{most}")


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("no"), ps.DataError("bad"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(tmp_path / "a"):
            raise error
    assert not [*tmp_path.iterdir()]


def test_what_needs_so_many_bytes_is_told(tmp_path):
    def write(size, error):
        with replacing(tmp_path / "a", size) as part:
            part.write_text("12345")
            raise error

    with pytest.raises(WriteError, match=r"It needs 12,345 bytes, and [\d,]+ are free there\. Make room"):
        write(12345, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(WriteError, match=r"No space left.* It needs more than 5 bytes, and [\d,]+ are"):
        write(None, RuntimeError("Error while serializing: I/O error (os error 28)"))


# --- processes that are killed


def started(code, *args):
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout.readline().strip() == b"ready"
    return process


def killed(process):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


WAITING = """
import sys, time
from pathlib import Path
from pysolve.whole_files import replacing, replacing_folder
name, path = sys.argv[1], Path(sys.argv[2])
with (replacing if name == "file" else replacing_folder)(path) as part:
    inside = part if name == "file" else part / "a"
    inside.write_text("half")
    (part.parent / ".tmp-of-a-library").write_text("half")
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("name", ["file", "folder"])
def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(name, tmp_path):
    dead, alive = (started(WAITING, name, tmp_path / one) for one in ("dead", "alive"))
    assert len([*tmp_path.iterdir()]) == 2
    killed(dead)
    mine = tmp_path / "of-a-user.01234567.part"
    mine.mkdir()
    (mine / "work").write_text("mine")
    (tmp_path / "empty.01234567.part").mkdir()
    try:
        with replacing(tmp_path / "new") as part:
            part.write_text("new")
        left = sorted(one.name for one in tmp_path.iterdir())
        assert [name.partition(".")[0] for name in left] == ["alive", "new", "of-a-user"]
        assert (mine / "work").read_text() == "mine"
    finally:
        killed(alive)
    with replacing(tmp_path / "new") as part:
        part.write_text("new")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["new", "of-a-user.01234567.part"]


DYING = """
import os, signal, sys
from pathlib import Path
from pysolve.whole_files import replacing_folder
path, replace = Path(sys.argv[1]), os.replace
def dies(source, target):
    if Path(target) == path:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dies
print("ready", flush=True)
with replacing_folder(path) as part:
    (part / "a").write_text("new")
"""


def test_a_folder_whose_writer_was_killed_between_two_renames_comes_back_new(tmp_path):
    path = tmp_path / "network"
    with replacing_folder(path) as part:
        (part / "a").write_text("old")
    dying = started(DYING, path)
    assert dying.wait() == -signal.SIGKILL
    dying.stdout.close()
    assert not path.exists()
    with replacing(tmp_path / "other") as part:
        part.write_text("other")
    assert contents(tmp_path) == {"network/a": b"new", "other": b"other"}


KILLED = ("save", "format 1", "correlations", "study", "plot", "page")


def kill_many(folder, count, names):
    """Kill writers at any moment, and save; leftovers that were seen in between."""
    rng, leftovers = np.random.default_rng(0), 0
    for number in range(count):
        name = names[number % len(names)]
        home = folder / name.replace(" ", "-")
        home.mkdir(exist_ok=True)
        WRITERS[name](home / "file.png")
        child = os.fork()
        while not child:
            WRITERS[name](home / "file.png")
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        leftovers += any(one.name.endswith(".part") for one in home.iterdir())
        opened_again(name, home / "file.png")
        WRITERS[name](home / "file.png")
        assert [one.name for one in home.iterdir()] == ["file.png"], name
        opened_again(name, home / "file.png")
    return leftovers


def opened_again(name, path):
    if name == "correlations":
        ps.Correlations.load(path)
    elif name in ("save", "format 1"):
        ps.load(path, network())
    elif name == "study":
        for one in ps.Study.load(path, network()).correlations.values():
            assert one.count


@pytest.mark.slow
def test_after_kills_nothing_is_left_once_something_is_saved(tmp_path):
    assert kill_many(tmp_path, 60, KILLED) > 10


def test_savers_at_once_do_not_mix(tmp_path):
    code = """
    import sys
    from pathlib import Path
    from pysolve.whole_files import replacing, replacing_folder
    path, text = Path(sys.argv[1]), sys.argv[2] * 100_000
    print("ready", flush=True)
    for _ in range(60):
        with replacing(path / "file") as part:
            part.write_text(text)
        with replacing_folder(path / "folder") as part:
            (part / "a").write_text(text)
            (part / "b").write_text(text)
    """
    savers = [started(code, tmp_path, letter) for letter in "xyz"]
    seen = set()
    while any(one.poll() is None for one in savers):
        if (tmp_path / "file").exists():
            seen.add((tmp_path / "file").read_text())
    for one in savers:
        assert one.wait() == 0
        one.stdout.close()
    whole = {letter * 100_000 for letter in "xyz"}
    assert seen <= whole
    assert (tmp_path / "folder/a").read_text() == (tmp_path / "folder/b").read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]
