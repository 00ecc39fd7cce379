"""State dicts come back to the bit whatever they hold, and their files are as small as they say."""

import copy
import io
import json
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.methods.result import made_with
from pysolve.nn.files import storage
from pysolve.nn.files.architecture import fingerprint
from pysolve.nn.files.checkpoint import CODINGS, file_bytes, stored_bytes
from pysolve.nn.files.format2 import _LARGE, compact, expanded
from pysolve.nn.files.storage import WORDS, bits
from pysolve.nn.layers.masking import unmasked
from pysolve.nn.zoo import LeNet5
from pysolve.plan import Collapse, Plan, Site
from pysolve.report.report import Report
from pysolve.report.rows import Latency, SiteReport

REPORT = Report({"params": 10}, {"params": 5}, (), 0.123456789, 3, 4)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool]


@st.composite
def tensors(draw):
    """Any bits, few values, zeros, −0.0, not a number; of any shape, in any order in memory."""
    rng = np.random.default_rng(draw(seeds))
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.sampled_from([(), (0,), (1,), (7,), (3, 0, 2), (4, 5), (2, 3, 4, 5), (700,), (40, 30)]))
    size = int(np.prod(shape))
    if dtype == torch.bool:
        content = rng.integers(0, 2, size, np.uint8)
    elif draw(st.booleans()):
        content = rng.integers(0, 256, size * dtype.itemsize, np.uint8)
    else:
        special = torch.tensor([0.5, -0.0, np.nan, np.inf, 3.0, 0.25, 1.0][: draw(st.integers(1, 7))])
        if not (dtype.is_floating_point or dtype.is_complex):
            special = special.nan_to_num(2.0, 5.0)
        content = special.to(dtype).view(torch.uint8).reshape(len(special), -1)
        content = content.numpy()[rng.integers(0, len(special), size)].ravel()
    zero = rng.random(size) < draw(st.sampled_from([0, 0, 0.5, 0.95]))
    content = np.where(np.repeat(zero, dtype.itemsize), np.uint8(0), content)
    tensor = torch.from_numpy(content.view(f"u{dtype.itemsize}")).view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if tensor.ndim > 1 and draw(st.booleans()) else tensor


class Holder(nn.Module):
    """A network of some tensors."""

    def __init__(self, held):
        super().__init__()
        for name, tensor in held.items():
            self.register_buffer(name, tensor)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert torch.equal(bits(a[name]), bits(b[name])), name


def saved(model, **report):
    return Compressed(model, Plan(), REPORT, fingerprint=fingerprint(model))


@given(st.dictionaries(st.sampled_from("abcd"), tensors(), min_size=1), st.sampled_from(["ans", "huffman"]))
def test_any_tensors_come_back_to_the_bit(held, kind):
    model = Holder(held)
    made = compact(model, kind)
    assert_same(expanded(made, model), model.state_dict())
    assert sum(one.nbytes for one in made.tensors.values()) == sum(made.sizes.values())
    assert all(made.sizes[name] <= model.state_dict()[name].nbytes for name in made.sizes)


@settings(max_examples=15)
@given(st.dictionaries(st.sampled_from("abcd"), tensors(), min_size=1), st.sampled_from(CODINGS))
def test_files_give_any_tensors_back_and_take_the_bytes_that_were_foretold(tmp_path_factory, held, coding):
    model = Holder(held)
    path = tmp_path_factory.mktemp("a") / "a.safetensors"
    for report in (True, False):
        ps.save(saved(model), path, coding=coding, report=report)
        assert path.stat().st_size == file_bytes(saved(model), coding=coding, report=report)
    fresh = Holder({name: torch.zeros_like(tensor) for name, tensor in held.items()})
    assert_same(ps.load(path, fresh).state_dict(), model.state_dict())


def values_of(count, size, zeros=0.0, seed=0):
    rng = np.random.default_rng(seed)
    table = np.concatenate([[0], rng.standard_normal(count - 1)]).astype(np.float32)
    codes = rng.integers(1 if zeros else 0, count, size)
    codes[rng.random(size) < zeros] = 0
    return torch.from_numpy(table[codes])


def lenet(zeros=0.0):
    """LeNet-5 of 16 values a layer."""
    model = LeNet5().eval()
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            parameter.data = values_of(16, parameter.numel(), zeros, i).reshape(parameter.shape)
    return model


@pytest.mark.parametrize("coding", ["ans", "huffman"])
@pytest.mark.parametrize(("zeros", "share"), [(0.0, 4.0), (0.9, 0.9)])
def test_weights_of_few_values_take_a_few_bits(zeros, share, coding):
    model = lenet(zeros)
    sizes, state = stored_bytes(model, coding), model.state_dict()
    assert sizes.keys() == state.keys()
    for name, tensor in state.items():
        if tensor.ndim > 1:
            # The table of 16 values, and of how often they occur.
            assert 8 * sizes[name] <= 1.05 * share * tensor.numel() + 8 * 140
    payload = sum(sizes.values())
    assert payload < file_bytes(saved(model), coding=coding) < payload + 1000


def full_report(rng):
    """A report with as much in it as a compression of four layers writes, numbers of all digits."""
    costs = {name: int(rng.integers(1e6)) for name in ("params", "nonzeros", "bytes", "macs")}
    names = ("conv1 → conv2", "conv2 → fc1", "fc1 → fc2", "fc2 → nothing")
    sites = tuple(SiteReport(name, 50, 20, *rng.random(4).tolist()) for name in names)
    times = [Latency(*rng.random(3).tolist(), size, 1) for size in (1, 1, 32, 32)]
    return Report(
        costs,
        costs,
        sites,
        rng.random(),
        1000,
        100,
        seconds={name: rng.random() for name in ("find", "gather", "measure", "refit", "apply", "report")},
        latencies=((times[0], times[1]), (times[2], times[3])),
        warnings=("few samples: 256 were given, and fc1 was fitted on 224 rows for its 800 inputs.",),
        made_with=made_with(0),
    )


@pytest.fixture(scope="module")
def collapsed():
    """A LeNet-5 without most of its channels, with a report, and its original."""
    model, rng = lenet(), np.random.default_rng(0)
    layers = [("conv1", "conv2", 20), ("conv2", "fc1", 50), ("fc1", "fc2", 500)]
    steps = [
        Collapse(Site(n, (a,), (b,)), np.sort(rng.choice(n, n // 5, replace=False))) for a, b, n in layers
    ]
    plan = Plan(tuple(steps))
    return Compressed(ps.apply(model, plan), plan, full_report(rng), fingerprint=fingerprint(model)), model


def test_little_but_the_weights_is_in_the_file_of_a_small_network(collapsed, tmp_path):
    result, model = collapsed
    payload = sum(stored_bytes(result.model).values())
    assert file_bytes(result, report=True) <= payload + 1200
    assert file_bytes(result) <= payload + 800
    ps.save(result, tmp_path / "a.safetensors")
    assert_same(ps.load(tmp_path / "a.safetensors", model).state_dict(), result.model.state_dict())
    record, _ = storage.read(tmp_path / "a.safetensors")
    assert "report" not in record


def test_numbers_of_the_report_have_five_digits_in_coded_files(tmp_path):
    for coding, divergence in (("ans", 0.12346), ("none", 0.123456789)):
        ps.save(saved(nn.Linear(2, 2)), tmp_path / "a.safetensors", coding=coding, report=True)
        assert storage.read(tmp_path / "a.safetensors")[0]["report"]["divergence"] == divergence


def test_large_tensors_that_cannot_be_made_smaller_are_the_files_own():
    noise = torch.randint(-(2**31), 2**31 - 1, (_LARGE // 4,), dtype=torch.int32)
    made = compact(Holder({"noise": noise, "less": noise[:-1]}), "ans")
    assert torch.equal(made.tensors["noise"], noise)
    assert made.table["less"] == [f"int32 {len(noise) - 1}", "r"]
    assert made.sizes == {"noise": noise.nbytes, "less": noise.nbytes - 4}


@pytest.mark.parametrize("coding", ["ans", "huffman", "none"])
def test_bytes_of_further_names_and_of_places_in_sparse_layers_are_those_of_the_first(coding):
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 40))
    model.append(model[0])
    sizes = stored_bytes(ps.prune(model, amount=0.8, layout="sparse").model, coding)
    assert sizes["0.indices"] == sizes["0.indptr"] == sizes["3.values"] == 0
    entries = 240
    assert 3 * entries < sizes["0.values"] <= 5 * entries + 40
    if coding == "none":
        assert sizes["0.values"] >= 5 * entries


def test_masked_networks_count_without_what_is_masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100))
    masked = ps.prune(model, amount=0.9, layout="masked").model
    assert stored_bytes(masked) == stored_bytes(unmasked(masked))
    assert stored_bytes(masked)["0.weight"] < 5500


def test_files_without_zeros_are_smaller_than_with_and_coded_ones_smaller_still():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100))
    result = ps.prune(model, amount=0.8, layout="dense")
    ans, huffman, none = (file_bytes(result, coding=coding) for coding in ("ans", "huffman", "none"))
    assert ans < 1.01 * huffman
    assert huffman < 0.7 * none
    assert none < 0.4 * 4 * 10_000


def test_auto_is_ans_where_it_is_installed_and_huffman_elsewhere(tmp_path, monkeypatch):
    model = lenet()
    path = tmp_path / "a.safetensors"
    assert file_bytes(saved(model)) == file_bytes(saved(model), coding="ans")
    ps.save(saved(model), path)
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert file_bytes(saved(model)) == file_bytes(saved(model), coding="huffman")
    with pytest.raises(ImportError, match=r"a\.safetensors .*pip install 'pysolve-compress\[coding\]'"):
        ps.load(path, model)
    with pytest.raises(ImportError, match=r"pysolve-compress\[coding\]"):
        ps.save(saved(model), path, coding="ans")
    ps.save(saved(model), path)
    assert_same(ps.load(path, LeNet5()).state_dict(), model.state_dict())


def test_unknown_codings_are_named(tmp_path):
    for call in (
        lambda: ps.save(saved(nn.Linear(2, 2)), tmp_path / "a", coding="zip"),
        lambda: file_bytes(saved(nn.Linear(2, 2)), coding="zip"),
        lambda: stored_bytes(nn.Linear(2, 2), "zip"),
    ):
        with pytest.raises(ValueError, match="unknown coding 'zip'; choose one of auto, ans, huffman, none"):
            call()
    assert not [*tmp_path.iterdir()]


def test_what_is_saved_is_not_changed(collapsed):
    result, _ = collapsed
    before = copy.deepcopy(result.model.state_dict())
    file_bytes(result)
    stored_bytes(result.model)
    assert_same(result.model.state_dict(), before)


# --- another program's reader, after docs/format.md


def read_by_the_book(path):
    """{name: (type and shape, entries)} of a file of version 2."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    version, checksum, n = map(int, header["__metadata__"]["pysolve"].split())
    coded = data[slice(*header[":coded"]["data_offsets"])]
    assert (version, zlib.crc32(f"torch.uint8 ({len(coded)},)".encode() + coded)) == (2, checksum)
    record = json.loads(zlib.decompressobj(-15, zdict=WORDS).decompress(coded[:n]))
    stream, kinds = io.BytesIO(coded[n:]), {"float32": 4, "int64": 8, "float16": 2, "bool": 1}
    found = {}
    for name, (told, row) in record["rows"].items():
        dtype, _, shape = told.partition(" ")
        size = int(np.prod([int(part) for part in shape.split("x") if part]))
        found[name] = (told, numbers(row, size, kinds[dtype], stream))
    assert not stream.read()
    return found


def numbers(row, size, width, stream):
    """A row, in Python's integers."""
    if isinstance(row, int):
        return [row] * size
    if row == "r":
        return [int.from_bytes(stream.read(width), "little") for _ in range(size)]
    head, *rest = row
    if head == "t":
        table = numbers(rest[1], rest[0], width, stream)
        return [table[code] for code in numbers(rest[2], size, 1 if rest[0] <= 256 else 2, stream)]
    if head == "p":
        planes = [numbers(one, size, 1, stream) for one in rest]
        return [int.from_bytes(entry, "little") for entry in zip(*planes, strict=True)]
    if head == "g":
        return without_gaps(rest, size, width, stream)
    low, n, wide, length = rest
    table = [int.from_bytes(stream.read(wide), "little") for _ in range(n)]
    found = (
        huffman(table, stream.read(length), size) if head == "h" else ans(table, stream.read(length), size)
    )
    return [low + one for one in found]


def without_gaps(rest, size, width, stream):
    wide, n, *rows = rest
    gaps, top = numbers(rows[0], n, wide, stream), 256**wide - 1
    values = iter(numbers(rows[1], sum(gap < top for gap in gaps), width, stream))
    entries = []
    for gap in gaps:
        entries += [0] * gap + ([next(values)] if gap < top else [])
    return entries + [0] * (size - len(entries))


def huffman(lengths, data, size):
    codes, code, last = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - last
        codes[length, code], code, last = symbol, code + 1, length
    if len(codes) == 1:
        return [*codes.values()] * size
    text, found = "".join(f"{byte:08b}" for byte in data), []
    while len(found) < size:
        length = next(n for n in range(1, len(text) + 1) if (n, int(text[:n], 2)) in codes)
        found.append(codes[length, int(text[:length], 2)])
        text = text[length:]
    assert len(text) < 8
    assert "1" not in text
    return found


def ans(table, data, size):
    used = [symbol for symbol, count in enumerate(table) if count]
    if len(used) == 1:
        return used * size
    stream = pytest.importorskip("constriction").stream
    chances = np.array([table[symbol] for symbol in used]) / sum(table)
    coder = stream.stack.AnsCoder(np.frombuffer(data, np.uint32))
    return [used[i] for i in coder.decode(stream.model.Categorical(chances, perfect=False), size)]


@pytest.mark.parametrize("coding", ["ans", "huffman"])
def test_another_program_reads_the_file_after_its_description(coding, tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(300).astype(np.float32))
    bfloat = noise.bfloat16().float()
    held = {"few": values_of(16, 200), "rare": values_of(16, 600, 0.9), "none": torch.zeros(3, 0)}
    held |= {"noise": noise, "bfloat": bfloat, "halves": noise.half(), "count": torch.tensor(5)}
    held |= {"apart": torch.where(torch.arange(900) % 300 == 7, 1.5, 0.0), "on": noise > 1}
    held |= {"sparse": torch.where(torch.arange(300) % 9 > 0, 0, noise)}
    model = Holder(held)
    ps.save(saved(model), tmp_path / "a.safetensors", coding=coding)
    found = read_by_the_book(tmp_path / "a.safetensors")
    assert {name: told for name, (told, _) in found.items()} == fingerprint(model)
    for name, (_, entries) in found.items():
        tensor = model.state_dict()[name]
        assert np.array(entries, f"u{tensor.itemsize}").tobytes() == bits(tensor).numpy().tobytes(), name
