"""Sums in several passes, on disk, and taken up after a kill are those of one pass in memory, to the bit."""

import gc
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pysolve.errors import DataError, PysolveError
from pysolve.nn.files import sums_folder
from pysolve.nn.gathering import passes
from pysolve.nn.gathering.memory import Bound, in_bytes, windows
from pysolve.nn.graph.branches import find_layers
from pysolve.nn.graph.export import trace

PARTS = ("xx", "yx", "yy", "x_sum", "y_sum", "count", "group_size")


class Attention(nn.Module):
    """Three layers that read the same, and one that reads what they write; one that nothing calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.conv, self.unused = nn.Conv1d(8, 5, 3), nn.Linear(3, 3)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return self.conv(self.out(weights @ self.v(x)).mT)


MODEL = Attention().eval()
NAMES = ("q", "k", "v", "out", "conv", "unused")
SHARES = {"conv": 0.5}


def batches(count=6):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(4, 7, 8, generator=random) for _ in range(count)]


GRAPH = trace(MODEL, batches()[0])


def planned(bound, names=NAMES, **options):
    layers, given = find_layers(GRAPH, MODEL), {"once": False, **options}
    return passes.passes_for(MODEL, batches()[0], GRAPH, layers, names, bound, **given)


PLAN = planned(None)


def gathered(stream=None, checkpoint=None, model=MODEL, shares=SHARES, **changes):
    given = batches() if stream is None else stream
    own = replace(PLAN, **changes)
    return passes.gathered(model, lambda number: iter(given), own, shares, ["v"], checkpoint, progress=False)


ONE = gathered()


def assert_same(found):
    assert [*found] == [*ONE] == ["q", "k", "v", "out", "conv"]
    for name, wanted in ONE.items():
        one = found[name]
        assert all(np.array_equal(getattr(one, part), getattr(wanted, part)) for part in PARTS)


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 50), max_size=8), st.integers(50, 120))
def test_windows_hold_all_in_order_and_no_two_would_fit_into_one(sizes, room):
    found = windows(sizes, room)
    assert [name for names in found for name in names] == [*sizes]
    totals = [sum(sizes[name] for name in names) for names in found]
    assert max(totals, default=0) <= room
    firsts = [sizes[names[0]] for names in found[1:]]
    assert all(total + first > room for total, first in zip(totals, firsts, strict=False))


def test_what_fits_nowhere_is_named():
    with pytest.raises(PysolveError, match="b alone takes 9 bytes, more than the 5 bytes"):
        windows({"a": 4, "b": 9}, 5)


def test_layers_that_read_the_same_are_summed_once():
    assert PLAN.sharing == {"q": ["q", "k", "v"], "out": ["out"], "conv": ["conv"], "unused": ["unused"]}
    assert ONE["q"].xx is ONE["v"].xx


def test_layers_are_gathered_whatever_their_order():
    plan = planned(None, NAMES[::-1])
    found = passes.gathered(MODEL, lambda number: iter(batches()), plan, SHARES, ["v"], progress=False)
    assert {*found} == {*ONE}
    for name, wanted in ONE.items():
        np.testing.assert_array_equal(found[name].xx, wanted.xx)
        np.testing.assert_array_equal(found[name].yx, wanted.yx)


@pytest.mark.parametrize("split", [[["q", "out", "conv", "unused"]], [["q"], ["out", "conv"], ["unused"]]])
def test_sums_in_passes_and_on_disk_are_those_of_one_pass(split):
    assert_same(gathered(each=split, on_disk=True))


def test_temporary_files_go_with_the_correlations():
    found = gathered(on_disk=True)
    folder = next(iter(found.stored["q"].arrays.values())).path.parent
    assert folder.is_dir()
    del found
    assert not folder.exists()


class Killed(Exception):
    pass


def killed_at(index):
    yield from batches()[:index]
    raise Killed


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(sums_folder, "SECONDS", 0.0)
    monkeypatch.setattr(sums_folder, "SHARE", 1e9)


@pytest.mark.parametrize("kills", [[0], [3], [1, 4], [5, 2, 6]])
@pytest.mark.parametrize("split", [[["q", "out", "conv", "unused"]], [["q", "conv"], ["out", "unused"]]])
def test_a_killed_call_goes_on_with_the_same_bits(tmp_path, at_once, kills, split):
    for index in kills:
        with pytest.raises(Killed):
            gathered(killed_at(index), tmp_path, each=split)
    ran = []
    handle = MODEL.register_forward_hook(lambda *_: ran.append(1))
    try:
        assert_same(gathered(None, tmp_path, each=split))
    finally:
        handle.remove()
    assert len(ran) == len(split) * 6 - max(kills)


def test_what_is_complete_runs_nothing_any_more(tmp_path):
    gathered(None, tmp_path)

    def never(*_):
        raise AssertionError

    handle = MODEL.register_forward_hook(never)
    try:
        assert_same(gathered(None, tmp_path))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (batches()[::-1], "batch 0 is not the one"),
        ([*batches()[:3], batches()[3] + 1e-6, *batches()[4:]], "batch 3 is not the one"),
        (batches()[:4], "there are 4 batches, after 6"),
    ],
)
def test_other_batches_are_refused(tmp_path, given, words):
    gathered(None, tmp_path)
    with pytest.raises(DataError, match=words):
        gathered(given, tmp_path)


def test_batches_that_change_between_passes_are_refused():
    shuffled = iter([batches(), batches()[::-1]])
    split = replace(PLAN, each=[["q"], ["out"]], on_disk=True)
    with pytest.raises(DataError, match="the same batches in the same order"):
        passes.gathered(MODEL, lambda number: iter(next(shuffled)), split, {}, [], progress=False)


def test_another_network_and_other_options_are_refused(tmp_path):
    gathered(None, tmp_path)
    other = Attention().eval()
    with torch.no_grad():
        other.q.weight[0, 0] += 1e-3
    with pytest.raises(PysolveError, match="another network"):
        gathered(None, tmp_path, model=other)
    with pytest.raises(PysolveError, match="another share of positions"):
        gathered(None, tmp_path, shares={})
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(DataError, match=r"record\.json is damaged"):
        gathered(None, tmp_path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums_folder, "write_arrays", full)
    with pytest.raises(PysolveError, match=r"sums cannot be kept in .*No space left"):
        gathered(None, tmp_path)


@pytest.fixture
def untouched(monkeypatch):
    """Nothing is taken yet, and nothing can be given back."""
    monkeypatch.setattr("pysolve.nn.gathering.memory.resident", lambda: 0)
    monkeypatch.setattr("pysolve.nn.gathering.memory.give_back", lambda: None)


@pytest.fixture
def small(untouched, monkeypatch):
    """Products take little memory, too."""
    monkeypatch.setattr("pysolve.nn.gathering.passes.room", lambda inputs: 0)
    monkeypatch.setattr(passes, "MATRICES", 0)


def test_the_least_memory_that_is_named_is_enough(untouched):
    with pytest.raises(PysolveError, match=r"the correlations of conv .* a batch of 4 samples") as caught:
        planned(Bound(1, 0))
    least = int(re.search(r"memory='(\d+)MiB'", str(caught.value))[1])
    assert planned(Bound(least << 20, 0)).samples >= 1
    with pytest.raises(PysolveError, match="Give at least"):
        planned(Bound(least - 1 << 20, 0))


def test_passes_grow_and_samples_shrink_with_less_memory(small):
    found = [planned(Bound(total, 0), NAMES[:-1]) for total in (14_000, 18_000, 25_000, 10**6)]
    assert [len(one.each) for one in found] == sorted((len(one.each) for one in found), reverse=True)
    assert [one.samples for one in found] == sorted(one.samples for one in found)
    assert not found[-1].on_disk
    assert found[-1].said == ""


def test_what_goes_nowhere_is_refused_before_any_work(small, monkeypatch, tmp_path):
    bound = Bound(14_000, 0, "14 kB")
    with pytest.raises(PysolveError, match=r"within memory=14 kB the sums take 2 passes .* only once"):
        planned(bound, NAMES[:-1], once=True)
    asked = []
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: asked.append(place) or usage(100))
    folder = tmp_path / "not" / "yet"
    with pytest.raises(PysolveError, match=rf"more than memory=14 kB leaves, and .* free in {folder}"):
        planned(bound, NAMES[:-1], folder=folder)
    assert asked == [tmp_path]


def test_words_for_bytes():
    assert [*map(in_bytes, (5, 2048, 3 << 20, 3 << 29))] == ["5 bytes", "2 KiB", "3 MiB", "1.5 GiB"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_gone_on_from(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "import test_passes as t\n"
        "t.sums_folder.SECONDS, t.sums_folder.SHARE = 0.0, 1e9\n"
        "def slowly():\n"
        "    for batch in t.batches():\n"
        "        time.sleep(1)\n"
        "        yield batch\n"
        f"t.gathered(slowly(), t.Path({str(tmp_path / 'sums')!r}))\n"
    )
    run = subprocess.Popen([sys.executable, script], env={**os.environ})
    part = tmp_path / "sums" / "part.safetensors"
    while not part.exists() and run.poll() is None:
        time.sleep(0.1)
    time.sleep(1.5)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert_same(gathered(None, tmp_path / "sums"))


@pytest.mark.slow
def test_temporary_files_of_a_process_that_was_killed_go_with_the_next(tmp_path, monkeypatch):
    made = "from pysolve.nn.files.sums_folder import SumsFolder as S; kept = S(None, {}); print(kept.path)"
    script = [sys.executable, "-c", f"import os; {made}; os.kill(os.getpid(), 9)"]
    for _ in range(2):
        dead = subprocess.run(script, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
        assert dead.returncode == -signal.SIGKILL
        assert len([*tmp_path.iterdir()]) == 1
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living, next_one = sums_folder.SumsFolder(None, {}), sums_folder.SumsFolder(None, {})
    assert {*tmp_path.iterdir()} == {living.path, next_one.path}
    assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()} == {0o700}
    del living, next_one
    gc.collect()
    assert not [*tmp_path.iterdir()]


# Bytes that a call takes at most beyond what the process has, where all words are predicted at every place.
PEAK = """
import warnings
from pathlib import Path

import torch
from small import Net
from torch import nn

import pysolve as ps


def told(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
# What torch loads at its first export is no part of it.
few = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
ps.compress(few, [torch.randn(64, 8) for _ in range(4)], keep=0.5, latency=False, progress=False)
layers = {"words": nn.Embedding(16000, 64), "up": nn.Linear(64, 256), "down": nn.Linear(256, 64)}
model = Net(
    lambda net, x: net.head((y := net.words(x)) + net.down(net.up(y).relu())),
    **layers,
    head=nn.Linear(64, 16000),
).eval()
batches = list(torch.randint(16000, (64, 256)).split(8))
Path("/proc/self/clear_refs").write_text("5")
start = told("VmRSS")
ps.compress(model, batches, target={"macs": 0.97}, memory="512MiB", latency=False, progress=False)
print(told("VmHWM") - start)
"""


@pytest.mark.slow
def test_memory_is_bounded_where_every_word_is_predicted():
    """Logits of all samples take 1 GiB: without a count of them a call took 821 MiB, and now 550 to 620."""
    tests = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (tests, tests.parent)))
    run = subprocess.run(
        [sys.executable, "-c", PEAK],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 1.35 * 2**29
