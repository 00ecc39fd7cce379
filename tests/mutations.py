"""Damaged and forged files of every format, and a judge: the same content, or a refusal that says what to do.

`python tests/mutations.py --seconds 600 --seed 0 [FORMAT …]` tries as many as there is time for, `--count` so
many; `tests/test_mutations.py` tries some.
"""

import argparse
import copy
import json
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import pysolve as ps
from pysolve.correlations import Correlations
from pysolve.nn.files import storage, sums
from pysolve.nn.files.sums_folder import SumsFolder
from pysolve.training import resume

# Seconds of processor time that a small file may take.
MOST_SECONDS = 1.0


@dataclass(frozen=True)
class Format:
    """How files of one format are made in a folder, opened from it, and forged with right checksums."""

    make: Callable[[Path], None]
    open: Callable[[Path], object]
    forge: Callable[[Path, np.random.Generator], None] | None = None


def plain(value):
    """Any content as what can be compared: bytes of tensors and arrays."""
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Correlations):
        return plain(vars(value))
    return repr(value)


# --- networks


@cache
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 9), nn.Linear(9, 4)
    ).eval()


@cache
def batches():
    torch.manual_seed(1)
    return [torch.randn(40, 6), torch.randn(20, 6)]


@cache
def compressed():
    first = ps.compress(network(), batches(), keep=0.6, progress=False, latency=False)
    return ps.prune(first, amount={"0": 0.5}, method="magnitude", layout="sparse")


def opened_network(folder):
    loaded = ps.load(folder / "file", network())
    loaded(batches()[0])
    return plain(loaded.state_dict()), [(type(m).__name__, m.training) for m in loaded.modules()]


def forged_network(folder, rng):
    record, tensors = storage.read(folder / "file")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if rng.random() < 0.8:
        record = changed(record, rng)
    else:
        name = pick(rng, [*tensors])
        tensors[name] = other_tensor(tensors[name], rng)
    storage.write(folder / "file", tensors, record)


# --- correlations, studies, folders of sums


def made_correlations(folder):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 3))
    Correlations.from_samples(x, y).save(folder / "file")


def opened_correlations(folder):
    found = Correlations.load(folder / "file")
    found.error(np.zeros(found.yx.shape))
    return plain(found)


def forged_correlations(folder, rng):
    with np.load(folder / "file") as file:
        arrays = dict(file)
    name = pick(rng, [*arrays])
    arrays[name] = other_array(arrays[name], rng)
    (np.savez_compressed if rng.random() < 0.3 else np.savez)(folder / "file.npz", **arrays)
    (folder / "file.npz").replace(folder / "file")
    if rng.random() < 0.3:
        forged_npy(folder / "file", rng)


def forged_npy(path, rng):
    """An array whose header promises other sizes than there are."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(rng, [*members])
    shape = pick(
        rng, ["(9999999999,)", "(4611686018427387904,)", "(100000, 100000)", "(-1,)", "(2,", "([],)"]
    )
    kind = pick(rng, ["'<f8'", "'<f4'", "'|O'", "'<U99999999'", "[('a','<f8')]"])
    head = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (-(len(head) + 11) % 64) + "\n"
    members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in members.items():
            archive.writestr(one, content)


@cache
def studied():
    return ps.study(network(), batches(), progress=False)


def opened_study(folder):
    found = ps.Study.load(folder / "file", network())
    about = {name: getattr(found.calibration, name) for name in ("limit", "seen", "out")}
    lists = {name: [*getattr(found.calibration, name)] for name in ("held", "apart", "kept")}
    every = {name: found.correlations[name] for name in found.correlations}
    for name, one in every.items():
        one.error(np.zeros(one.yx.shape))
        assert one.yx.shape == studied().correlations[name].yx.shape
    for batch in pytree.tree_leaves(lists):
        network()(batch)
    return plain(about), plain(lists), plain(every)


def forged_sums(path, rng):
    """A file of arrays with one value of its header changed, and the checksum of the changed one."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header["__metadata__"]
    where = rng.random()
    if where < 0.4:
        key = pick(rng, [one for one in about if one != "crc32"])
        about[key] = json.dumps(changed(json.loads(about[key]), rng)) if rng.random() < 0.9 else anything(rng)
    elif where < 0.8:
        key = pick(rng, [one for one in header if one != "__metadata__"])
        header[key] = changed(header[key], rng)
    else:
        header = changed(header, rng)
        about = header.get("__metadata__")
    if isinstance(about, dict) and about:
        about = {"crc32": "0" * 8, **{key: value for key, value in about.items() if key != "crc32"}}
    others = {key: value for key, value in header.items() if key != "__metadata__"}
    text = json.dumps({"__metadata__": about, **others}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    seal = sums._SEAL % zlib.crc32(text)
    text = seal + text[len(seal) :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def made_folder(folder):
    kept = SumsFolder(folder / "sums", {"network": "this"})
    for name, one in studied().correlations.items():
        kept.add(name, {name: one})


def opened_folder(folder):
    kept = SumsFolder(folder / "sums", {"network": "this"})
    names = [*studied().correlations]
    assert all(kept.has(name) for name in names)
    found = kept.correlations(names)
    # A layer that no sample has reached has none.
    return plain({name: found.get(name) for name in names}), kept.batches


def forged_folder(folder, rng):
    forged_sums(pick(rng, sorted((folder / "sums").glob("*.safetensors"))), rng)


# --- checkpoints


class Masks:
    """A step that has a state."""

    def __init__(self):
        self.count = torch.zeros(3)

    def __call__(self, share):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count.copy_(state["count"])


def parts():
    torch.manual_seed(0)
    model = copy.deepcopy(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return resume.Parts([model], optimizer, schedule, [torch.Generator().manual_seed(3)], Masks())


def stepped(own):
    own.modules[0](batches()[0]).square().sum().backward()
    own.optimizer.step()
    own.optimizer.zero_grad()
    own.after_step(0.5)


def made_checkpoint(folder):
    own = parts()
    stepped(own)
    progress = resume.Progress(
        done=1, position=1, losses=[0.5], score=0.3, best=resume.copied(own.modules[0])
    )
    resume.write(folder / "file", progress, own, {"lr": 0.01})


def state_of(own):
    return plain(
        [
            own.modules[0].state_dict(),
            own.optimizer.state_dict(),
            own.after_step.state_dict(),
            own.generators[0].get_state(),
            torch.get_rng_state(),
        ]
    )


def opened_checkpoint(folder):
    own = parts()
    before = state_of(own)
    try:
        progress = resume.read(folder / "file", own, {"lr": 0.01})
    except ps.PysolveError:
        assert state_of(own) == before, "a refused checkpoint changed the training"
        raise
    found = state_of(own), plain(vars(progress))
    stepped(own)
    own.generators[0].seed()
    return found


def forged_checkpoint(folder, rng):
    state = torch.load(folder / "file", weights_only=True)
    sealed(changed(state, rng), folder / "file")


def sealed(state, path):
    """Write a checkpoint of any state, with its checksum."""
    with path.open("w+b") as file:
        torch.save(state, file)
        resume.seal(file)


# --- folders of transformers


@cache
def llama():
    import transformers
    from families import batches as copies
    from families import made

    model, batch = made(transformers, "llama")
    return ps.compress(model, copies(batch), keep=0.5, widths="uniform", progress=False, latency=False)


@cache
def llama_folder(stock):
    with tempfile.TemporaryDirectory() as place:
        ps.save_pretrained(llama(), Path(place) / "network", stock=stock)
        return {one.name: one.read_bytes() for one in (Path(place) / "network").iterdir()}


def made_pretrained(stock):
    def make(folder):
        for name, content in llama_folder(stock).items():
            (folder / name).write_bytes(content)

    return make


def opened_pretrained(folder):
    loaded = ps.load_pretrained(folder)
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        return plain(loaded.state_dict()), plain(loaded(tokens).logits), repr(loaded.config)


FORMATS = {
    "coded": Format(lambda f: ps.save(compressed(), f / "file"), opened_network, forged_network),
    "huffman": Format(
        lambda f: ps.save(compressed(), f / "file", coding="huffman"), opened_network, forged_network
    ),
    "plain": Format(
        lambda f: ps.save(compressed(), f / "file", coding="none"), opened_network, forged_network
    ),
    "correlations": Format(made_correlations, opened_correlations, forged_correlations),
    "study": Format(
        lambda f: studied().save(f / "file"), opened_study, lambda f, rng: forged_sums(f / "file", rng)
    ),
    "sums": Format(made_folder, opened_folder, forged_folder),
    "checkpoint": Format(made_checkpoint, opened_checkpoint, forged_checkpoint),
    "stock": Format(made_pretrained(True), opened_pretrained),
    "plan": Format(made_pretrained(False), opened_pretrained),
}


# --- changes


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def anything(rng):
    """A value that a record may hold in a wrong place."""
    return pick(
        rng,
        [
            *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53, 2**64, 10**30, 0.5, 1e308, -0.0),
            *("", "0", "0-3", "fc9", "F64", "float32 6", "é", [], {}, [0], [[]], [1, 2, 3], {"a": 1}),
            *([2**32, 2**32], [0, 2**62], ["0"], "x" * 1000, float("inf"), float("nan")),
        ],
    )


def changed(value, rng):
    """A nested value with another one somewhere in it, without something, or with something twice."""
    if isinstance(value, torch.Tensor):
        return other_tensor(value, rng)
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return anything(rng)
    found = copy.copy(value)
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    key = pick(rng, keys)
    what = rng.random()
    if what < 0.1:
        del found[key]
    elif what < 0.2 and isinstance(value, dict):
        found[pick(rng, ["a", "0", "", 3])] = found.pop(key)
    elif what < 0.25 and isinstance(value, list):
        found[key:key] = [value[key]] * int(pick(rng, [1, 2, 5000]))
    elif what < 0.35:
        found[key] = value[pick(rng, keys)]
    else:
        found[key] = changed(value[key], rng)
    return found


def other_tensor(value, rng):
    made = [
        lambda: value.to(pick(rng, [torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8])),
        lambda: value[:-1] if value.ndim else value.reshape(1, 1),
        lambda: value.flatten(),
        lambda: torch.zeros(0),
        lambda: torch.zeros(*value.shape, 2),
        lambda: anything(rng),
    ]
    if value.dtype == torch.uint8:
        made.append(lambda: torch.randint(0, 256, value.shape, dtype=torch.uint8))
    found = pick(rng, made)()
    return found if isinstance(found, torch.Tensor) else torch.zeros(3, 3)


def other_array(value, rng):
    made = [
        lambda: value.astype(pick(rng, ["f4", "f2", "i8", "u1", "?", "c16", "U5", "datetime64[s]"])),
        lambda: value[..., :-1] if value.ndim else value.reshape(1, 1),
        lambda: value.ravel(),
        lambda: np.zeros(0),
        lambda: np.full(value.shape, pick(rng, [np.nan, np.inf, -1.0])),
        lambda: np.array(str(anything(rng))),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pick(rng, made)()


def damaged(content, rng):
    """How, and the bytes: some are others, are missing, come twice, or are zero."""
    data, size = bytearray(content), len(content)
    place, length = int(rng.integers(size)), int(rng.integers(1, 200))
    how = pick(rng, ["bit", "byte", "bytes", "end", "cut", "splice", "zeros", "more", "swap", "front"])
    if how == "bit":
        data[place] ^= 1 << int(rng.integers(8))
    elif how == "byte":
        data[place] = int(rng.integers(256))
    elif how == "bytes":
        for _ in range(int(rng.integers(2, 6))):
            data[int(rng.integers(size))] = int(rng.integers(256))
    elif how == "end":
        del data[place:]
    elif how == "cut":
        del data[place : place + length]
    elif how == "splice":
        start = int(rng.integers(size))
        data[place : place + length] = content[start : start + length]
    elif how == "zeros":
        page = place // 64 * 64
        data[page : page + 64] = bytes(len(data[page : page + 64]))
    elif how == "more":
        data += rng.bytes(length)
    elif how == "swap":
        middle, end = place + length, place + 2 * length
        data[place:end] = content[middle:end] + content[place:middle]
    else:
        # Most of what matters is at either end.
        place = int(rng.integers(min(size, 64))) * pick(rng, [1, -1])
        data[place] ^= 1 << int(rng.integers(8))
    return how, bytes(data)


# --- the judge


def judged(open_file, folder, wanted):
    """ "same" or "refused", else what is wrong."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ps.PysolveWarning)
            found = open_file(folder)
    except ps.PysolveError as error:
        found, said = None, str(error)
        if str(folder) not in said:
            return f"no file is named: {said[:200]}"
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)
        ours = [one for one in line if "/pysolve/" in one.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "test"
        return f"{type(error).__name__} at {where}: {str(error)[:150]}"
    if (seconds := time.process_time() - start) > MOST_SECONDS:
        return f"{seconds:.1f} s"
    if found is None:
        return "refused"
    return "same" if wanted is None or found == wanted else "other content"


def tried(name, rng, place):
    """One changed file of a format: how it was changed, and what became of it."""
    one = FORMATS[name]
    home = Path(tempfile.mkdtemp(dir=place))
    one.make(home)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = whole(name, place)
    if one.forge is not None and rng.random() < 0.35:
        try:
            one.forge(home, rng)
        except (
            ps.PysolveError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            RuntimeError,
            OverflowError,
        ):
            return "forged", "not written"
        return "forged", judged(one.open, home, None)
    file = pick(rng, sorted(path for path in home.rglob("*") if path.is_file()))
    content = file.read_bytes()
    how, data = damaged(content, rng)
    file.write_bytes(data)
    if data == content:
        return how, "same"
    return f"{how} of {file.name}" if len([*home.rglob("*")]) > 1 else how, judged(one.open, home, wanted)


_WHOLE = {}


def whole(name, place):
    """The content of an undamaged file."""
    if name not in _WHOLE:
        home = Path(tempfile.mkdtemp(dir=place))
        FORMATS[name].make(home)
        _WHOLE[name] = FORMATS[name].open(home)
    return _WHOLE[name]


GOOD = ("same", "refused", "not written")


def main():
    """Try changed files until the time is over, print what is wrong, and count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = given.formats or [name for name in FORMATS if name not in ("stock", "plan")]
    told, counts, end = Counter(), Counter(), time.monotonic() + given.seconds
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for number in range(given.count):
            if time.monotonic() > end:
                break
            name = names[number % len(names)]
            with tempfile.TemporaryDirectory(dir=place) as home:
                how, became = tried(name, np.random.default_rng([given.seed, number]), home)
            counts[name, became if became in GOOD else "WRONG"] += 1
            if became not in GOOD:
                told[name, how, became] += 1
                if told[name, how, became] == 1:
                    print(f"{name} {given.seed}/{number}: {how}: {became}", flush=True)
    for key, times in sorted(counts.items()):
        print(*key, times)
    return sum(times for (_, became), times in counts.items() if became == "WRONG")


if __name__ == "__main__":
    sys.exit(bool(main()))
