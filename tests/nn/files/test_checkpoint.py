"""Files give back the saved network to the bit, or one clear error."""

import copy
import json
import os
import resource
import stat
import struct
import sys
import tracemalloc
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cuts import SITES
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from small import NETWORKS, network
from torch import nn
from torch.utils import _pytree as pytree

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.forms import Codebook, Integers, LowRank, Sparse
from pysolve.methods.result import following
from pysolve.nn.cut.bare import find_member
from pysolve.nn.cut.slicing import WEIGHTED, outputs
from pysolve.nn.evaluate import parameters
from pysolve.nn.files import storage
from pysolve.nn.files.architecture import fingerprint
from pysolve.nn.files.format1 import Packed, coded, decoded, pack, unpack
from pysolve.nn.files.storage import WORDS, bits, zipped
from pysolve.nn.layer_kinds import WHOLE_NORMS
from pysolve.nn.layers.attention import opened
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.masking import masks_of, unmasked
from pysolve.nn.running import forward
from pysolve.nn.zoo import Mlp
from pysolve.plan import Collapse, Norm, Plan, Site
from pysolve.report.report import Report

REPORT = Report({"params": 10}, {"params": 5}, (), float("nan"), np.int64(3), 4, notes=("a → b",))


def other_values(model, seed=1):
    """The same architecture with values of its own, in training mode."""
    fresh = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    for tensor in fresh.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return fresh


def made(model, plan, **changes):
    """What a compression of this model by this plan returns."""
    return Compressed(ps.apply(model, plan), plan, REPORT, **{"fingerprint": fingerprint(model)} | changes)


def results(model, batch):
    """All tensors that a network returns, the same random numbers given."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(forward(model, batch)) if isinstance(leaf, torch.Tensor)]


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(bits(a[name]), bits(b[name])), name


def assert_restored(result, model, path, batch):
    """Saved and loaded, a network is what it was, and the original too."""
    ps.save(result, path)
    original = other_values(model)
    before = copy.deepcopy(original)
    loaded = ps.load(path, original)
    assert_same_state(original, before)
    assert all(module.training for module in original.modules())
    assert_same_state(loaded, result.model)
    assert [m.training for m in loaded.modules()] == [m.training for m in result.model.modules()]
    assert [type(m) for m in loaded.modules()] == [type(m) for m in result.model.modules()]
    for a, b in zip(results(loaded, batch), results(result.model, batch), strict=True):
        assert torch.equal(bits(a), bits(b))
    return loaded


def mlp(sizes=(6, 12, 9, 4), seed=0):
    torch.manual_seed(seed)
    return Mlp(sizes).eval()


def vectors(n=5, d=6):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def narrowed(layer, channels, keep):
    return Collapse(Site(channels, (f"fc{layer}",), (f"fc{layer + 1}",)), keep)


def small():
    """A network without the channels of two sites, and its original."""
    model = mlp()
    return made(model, Plan((narrowed(1, 12, [0, 1, 2, 7]), narrowed(2, 9, [3, 8])))), model


# --- round trips


def column(*indices):
    return np.array(indices)[:, None]


# Of networks with several sites in a layer, and one with channels in two places.
TABLES = {
    "concat": [{"columns": {"c": column(0, 1, 2, 3)}}, {"columns": {"c": column(7, 8, 9, 10, 11)}}],
    "padded_shortcut_in_code": [
        {"rows": {"conv2": column(2, 3, 4, 5)}, "columns": {"fc": column(2, 3, 4, 5)}},
        {},
    ],
    "padded_shortcut_by_a_layer": [
        {"rows": {"conv2": column(1, 2, 3, 4)}, "columns": {"fc": column(1, 2, 3, 4)}},
        {},
        {"rows": {"conv2": column(0, 5, 6, 7)}, "columns": {"fc": column(0, 5, 6, 7)}},
    ],
    "chunked_swiglu": [{"rows": {"a": np.arange(14).reshape(2, 7).T}}],
    "counted_heads": [{}, {"integers": {"1.heads": 1, "1.width": 4}}],
    "shuffled_by_views": [
        {
            "rows": {"stem": np.arange(16).reshape(4, 4).T, "branch": np.arange(8).reshape(2, 4).T},
            "columns": {"branch": np.arange(8).reshape(2, 4).T},
        }
    ],
    "class_token": [{"rows": {"places": np.arange(30).reshape(5, 6).T}}, {}],
    "multihead_attention": [{}, {"integers": {"attention.num_heads": 1}}, {}, {}],
    "transformer_layer": [{"integers": {"self_attn.num_heads": 1}}, {}],
    "unflattened": [{"integers": {"1.unflattened_size.0": 1}}, {}],
    "shuffled_channels": [{"rows": {"0": np.arange(8).reshape(2, 4).T}}],
    "learned_positions": [{"rows": {"places": np.arange(30).reshape(5, 6).T}}, {}],
}


def free_sites(name):
    """Those of a network that can shrink, from their description."""
    layers_of = dict(network(name)[0].named_modules())
    for i, line in enumerate(one for one in SITES[name] if "!" not in one):
        channels, layers = line.split(": ")
        makes, _, passed = layers.partition(" | ")
        writers, readers = (tuple(names.split()) for names in makes.split(" → "))
        tables = TABLES[name][i] if name in TABLES else {}
        names = [one for one in passed.split() if isinstance(layers_of.get(one), WHOLE_NORMS)]
        norms = [Norm(f"{o}.weight", f"{o}.eps", 0.0, type(layers_of[o]) is nn.LayerNorm) for o in names]
        yield Site(int(channels), writers, readers, tuple(passed.split()), **tables, norms=tuple(norms))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_comes_back_to_the_bit(name, tmp_path):
    model, batch = network(name)
    rng = np.random.default_rng(len(name))
    steps, biases = [], {}
    for site in free_sites(name):
        keep = np.sort(rng.choice(site.channels, rng.integers(1, site.channels), replace=False))
        steps.append(Collapse(site, keep))
        for reader in site.readers:
            layer = find_member(opened(model), reader)
            if type(layer) in WEIGHTED and layer.bias is None:
                biases[f"{reader}.bias"] = rng.standard_normal(outputs(layer))
    result = made(model, Plan(tuple(steps), biases))
    assert not steps or parameters(result.model) < parameters(model) + sum(map(len, biases.values()))
    assert_restored(result, model, tmp_path / "a.safetensors", batch)


def test_new_biases_come_back_also_where_the_original_is_not_known(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    step = Collapse(Site(5, ("0",), ("2",)), [1, 4], biases={"2": np.ones(3)})
    result = made(model, Plan((step,), {"0.bias": np.arange(5.0)}))
    for known in (result, replace(result, fingerprint=None)):
        loaded = assert_restored(known, model, tmp_path / "a.safetensors", vectors(d=4))
        assert loaded[0].bias.tolist() == [1, 4]
        assert loaded[2].bias.tolist() == [1, 1, 1]


def test_compressions_remember_what_a_file_needs(tmp_path, monkeypatch):
    def untraced(model, batch):
        raise ps.PysolveError("tracing takes longer than all the rest")

    monkeypatch.setattr("pysolve.methods.studied.trace_once", untraced)
    model, batches = mlp(), [vectors(40)]
    first = ps.compress(model, batches, keep=0.6, progress=False, sites=[narrowed(1, 12, [0]).site])
    second = ps.compress(first, batches, keep=0.7, progress=False, sites=[narrowed(2, 9, [0]).site])
    third = ps.prune(second, amount=0.5, layout="sparse")
    fourth = ps.prune(third, amount=0.2)
    assert first.earlier == ()
    # What was sparse is dense to be pruned again, so it is in the plan before.
    assert fourth.earlier[:2] == third.earlier == (first.plan, second.plan)
    dense = {name: form.dense() for name, form in third.plan.forms.items()}
    assert dense
    values = {**third.plan.values, **dense}
    assert not fourth.earlier[2].forms
    assert fourth.earlier[2].values.keys() == values.keys()
    assert all(np.array_equal(fourth.earlier[2].values[name], value) for name, value in values.items())
    for result in (first, second, third, fourth):
        assert result.fingerprint == fingerprint(model)
        assert_restored(result, model, tmp_path / "a.safetensors", vectors())


def test_a_network_that_runs_sparse_may_lose_channels_elsewhere(tmp_path):
    model = mlp()
    first = ps.prune(model, amount={"fc1": 0.5}, layout="sparse", ignore=["fc2", "fc3"])
    plan = Plan((narrowed(2, 9, [1, 5]),), {"fc3.bias": np.ones(4)})
    second = following(first, Compressed(ps.apply(first.model, plan), plan, REPORT))
    assert_restored(second, model, tmp_path / "a.safetensors", vectors())


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_pruned_networks_come_back_small(layout, tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 50))
    result = ps.prune(model, amount=0.95, layout=layout)
    path = tmp_path / "a.safetensors"
    assert_restored(result, model, path, torch.randn(3, 4, 4, 4))
    dense = 4 * (96 * 200 + 200 * 50)
    # Five bytes an entry, a few gaps without one, the biases and the header.
    assert path.stat().st_size < 0.05 * dense * 5 / 4 * 1.1 + 4 * 256 + 5000


def test_a_sparse_layer_under_two_names_comes_back_as_one(tmp_path):
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    for amount in (0.5, 0.99):
        result = ps.prune(model, amount=amount, layout="sparse")
        loaded = assert_restored(result, model, tmp_path / "a.safetensors", vectors())
        assert loaded[0] is loaded[2]


def test_fine_tuned_values_count_also_entries_that_became_zero(tmp_path):
    model = mlp()
    cut = made(model, Plan((narrowed(1, 12, [0, 5]),)))
    sparse = ps.prune(model, amount=0.5, layout="sparse")
    for result in (cut, sparse):
        with torch.no_grad():
            for i, parameter in enumerate(result.model.parameters()):
                parameter.mul_(1.5).view(-1)[0] = (0.0, -0.0)[i % 2]
        assert_restored(result, model, tmp_path / "a.safetensors", vectors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_come_back_also_where_the_network_was_converted_afterwards(dtype, tmp_path):
    model = mlp().to(dtype)
    plan = Plan((narrowed(1, 12, [0, 5]),))
    assert_restored(made(model, plan), model, tmp_path / "a.safetensors", vectors().to(dtype))
    later = made(mlp(), plan)
    later.model.to(dtype)
    loaded = assert_restored(later, mlp(), tmp_path / "a.safetensors", vectors().to(dtype))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_modes_of_single_layers_come_back(tmp_path):
    result, model = small()
    result.model.fc2.train()
    assert_restored(result, model, tmp_path / "a.safetensors", vectors())


def test_shared_tensors_are_stored_once_and_must_be_shared_again(tmp_path):
    model, batch = network("tied_weights")
    path = tmp_path / "a.safetensors"
    loaded = assert_restored(made(model, Plan()), model, path, batch)
    assert loaded.c.weight is loaded.a.weight
    record, _ = storage.read(path)
    assert record["aliases"] == {"c.weight": "a.weight"}
    assert "c.weight" not in record["rows"]
    ps.save(made(model, Plan()), path, coding="none")
    with safe_open(path, "pt") as file:
        assert "c.weight" not in file.keys()  # noqa: SIM118
    untied = copy.deepcopy(model)
    untied.c.weight = nn.Parameter(model.a.weight.detach() + 1)
    assert_restored(made(untied, Plan()), untied, path, batch)
    with pytest.raises(ps.DataError, match=r"[ac]\.weight shares its memory"):
        ps.load(path, model)


def test_tensors_that_overlap_in_memory_are_saved_apart(tmp_path):
    model = nn.Linear(4, 4)
    model.register_buffer("seen", model.weight.detach()[1:3])
    model.register_buffer("turned", model.weight.detach().t())
    fresh = nn.Linear(4, 4)
    fresh.register_buffer("seen", torch.zeros(2, 4))
    fresh.register_buffer("turned", torch.zeros(4, 4))
    assert_restored(Compressed(model, Plan(), REPORT), fresh, tmp_path / "a.safetensors", vectors(d=4))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (1, 1), (100, 3), (3, 0, 2)])
@pytest.mark.parametrize("fill", [0.0, -0.0, 1.0])
def test_tensors_of_any_shape_come_back(shape, fill, tmp_path):
    model = mlp()
    model.register_buffer("extra", torch.full(shape, fill))
    model.register_buffer("same", torch.full((), fill).expand(shape))
    fresh = mlp()
    fresh.register_buffer("extra", torch.rand(shape))
    fresh.register_buffer("same", torch.rand(shape))
    assert_restored(Compressed(model, Plan(), REPORT), fresh, tmp_path / "a.safetensors", vectors())


def test_numbers_that_torch_only_marks_as_negative_are_saved_so(tmp_path):
    model = mlp()
    model.register_buffer("turn", torch._neg_view(torch.tensor([2.0, 3.0])))
    assert model.turn.is_neg()
    ps.save(Compressed(model, Plan(), REPORT), tmp_path / "a.safetensors")
    loaded = ps.load(tmp_path / "a.safetensors", other_values(model))
    assert loaded.turn.tolist() == [-2, -3]


def test_paths_may_be_strings_and_files_are_the_same_each_time(tmp_path):
    result, model = small()
    ps.save(result, str(tmp_path / "a.safetensors"))
    ps.save(result, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_same_state(ps.load(str(tmp_path / "b.safetensors"), model), result.model)


@pytest.mark.parametrize("coding", ["auto", "none"])
def test_what_a_report_says_changes_no_byte_unless_it_is_asked_for(coding, tmp_path):
    result, _ = small()
    slower = replace(result, report=replace(REPORT, seconds={"find": 1.5}))
    for report in (False, True):
        for name, one in (("a", result), ("b", slower)):
            ps.save(one, tmp_path / name, coding=coding, report=report)
        same = (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert same is not report


def test_the_record_is_plain_json(tmp_path):
    result, _ = small()
    ps.save(result, tmp_path / "a.safetensors", coding="none", report=True)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        record = json.loads(file.metadata()["pysolve"])["record"]
    assert_is_of_small(record, 1)


def test_the_record_of_a_coded_file_is_json_that_zlib_unpacks(tmp_path):
    result, _ = small()
    ps.save(result, tmp_path / "a.safetensors", report=True)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        version, checksum, length = map(int, file.metadata()["pysolve"].split())
        data = file.get_tensor(":coded").numpy().tobytes()
    assert version == 2
    assert zlib.crc32(data, zlib.crc32(f"torch.uint8 ({len(data)},)".encode())) == checksum
    record = json.loads(zlib.decompressobj(-15, WORDS).decompress(data[:length]))
    assert_is_of_small(record, 2)
    assert record["rows"]["fc2.bias"] == ["float32 2", "r"]
    bias = np.frombuffer(
        data[length:], "<f4", offset=sum(row_bytes(record, ("fc1.weight", "fc1.bias", "fc2.weight")))
    )
    assert bias[:2].tolist() == result.model.fc2.bias.tolist()


def row_bytes(record, names):
    """Of rows that are raw, the bytes."""
    for name in names:
        told, row = record["rows"][name]
        assert row == "r"
        yield 4 * int(np.prod([int(n) for n in told.split()[1].split("x")]))


def assert_is_of_small(record, version):
    assert record["version"] == version
    assert record["pysolve"] == ps.__version__
    assert record["original"]["fc1.weight"] == "float32 12x6"
    assert [step["keep"] for step in record["stages"][0]] == ["0-2 7", "3 8"]
    assert record["report"]["divergence"] is None
    assert record["report"]["samples"] == 3
    assert record["report"]["notes"] == ["a → b"]


# --- tensors without their zeros


KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
KINDS += [torch.complex64]


@given(st.sampled_from(KINDS), st.integers(0, 3000), st.floats(0, 0.3), st.integers(0, 2**32 - 1))
def test_tensors_without_their_zeros_are_the_same_to_the_bit_and_smaller(dtype, size, density, seed):
    rng = np.random.default_rng(seed)
    values = rng.choice([1.0, -0.0, np.nan, np.inf, 3.0], size)
    if not dtype.is_floating_point:
        values = np.nan_to_num(values, nan=2.0, posinf=5.0)
    tensor = torch.from_numpy(np.where(rng.random(size) < density, values, 0.0)).to(dtype).reshape(1, size)
    form = coded(tensor)
    if form is None:
        assert 2 * (bits(tensor) != 0).sum() * tensor.itemsize + 400 + size >= tensor.nbytes
        return
    assert form.nbytes < tensor.nbytes
    again = decoded(torch.from_numpy(form.values), torch.from_numpy(form.gaps), (1, size))
    assert torch.equal(
        torch.from_numpy(again.dense()).view(dtype).view(torch.uint8), tensor.view(torch.uint8)
    )


def test_what_has_no_values_cannot_be_saved(tmp_path):
    model = mlp()
    model.register_buffer("here", torch.zeros(3, device="meta"))
    with pytest.raises(
        ps.PysolveError, match=r"here .* is a tensor of torch.float32, .* on meta, which cannot"
    ):
        pack(model)
    model.here = torch.zeros(3).to_sparse()
    with pytest.raises(ps.PysolveError, match="sparse_coo"):
        ps.save(Compressed(model, Plan(), REPORT), tmp_path / "a.safetensors")
    del model.here
    model.register_buffer("fc1:gaps", torch.zeros(3))
    with pytest.raises(ps.PysolveError, match="named like the gaps of fc1"):
        pack(model)
    assert not [*tmp_path.iterdir()]


# --- the wrong network, the wrong file


def test_another_original_is_refused_and_the_first_difference_named(tmp_path):
    result, model = small()
    path = tmp_path / "a.safetensors"
    ps.save(result, path)
    for other, message in (
        (mlp((6, 13, 9, 4)), "fc1.weight as float32 12x6, this one as float32 13x6"),
        (mlp((6, 12, 9, 4, 2)), "fc4.weight as nothing, this one as float32 2x4"),
        (mlp((6, 12, 9)), "fc3.weight as float32 4x9, this one as nothing"),
        (mlp().double(), "fc1.weight as float32 12x6, this one as float64 12x6"),
        (result.model, "fc1.weight as float32 12x6, this one as float32 4x6"),
    ):
        with pytest.raises(ps.DataError, match=f"does not fit this Mlp: the original has {message}. Give"):
            ps.load(path, other)
    with pytest.raises(ps.DataError, match="meta device"):
        ps.load(path, mlp().to("meta"))
    ps.save(replace(result, fingerprint=None), path)
    with pytest.raises(ps.DataError, match="does not fit this Mlp"):
        ps.load(path, mlp((6, 13, 9, 4)))
    assert_same_state(ps.load(path, model), result.model)


def test_wrong_arguments_are_named(tmp_path):
    result, _ = small()
    with pytest.raises(TypeError, match="compressed must be what compress or prune returned, got Mlp"):
        ps.save(result.model, tmp_path / "a.safetensors")
    ps.save(result, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"model must be the original network, .* got Compressed"):
        ps.load(tmp_path / "a.safetensors", result)
    with pytest.raises(FileNotFoundError):
        ps.load(tmp_path / "b.safetensors", mlp())


def damaged(whole, content):
    whole.path.write_bytes(content)
    with pytest.raises(ps.DataError, match=r"no file written by pysolve\.save, or it is damaged: .* Save"):
        ps.load(whole.path, whole.model)


@dataclass
class Whole:
    """A file with everything in it, what it was made of, and room for other files."""

    data: bytes
    model: nn.Module
    result: Compressed
    path: Path


def whole_file(folder, coding):
    model = mlp((6, 40, 30, 4))
    result = ps.prune(made(model, Plan((narrowed(1, 40, np.arange(0, 40, 2)),))), amount={"fc2": 0.9})
    result = ps.prune(result, amount={"fc1": 0.9}, layout="sparse")
    ps.save(result, folder / "a.safetensors", coding=coding)
    return Whole((folder / "a.safetensors").read_bytes(), model, result, folder / "a.safetensors")


@pytest.fixture(scope="module", params=["none", "ans"])
def whole(request, tmp_path_factory):
    return whole_file(tmp_path_factory.mktemp("whole"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return whole_file(tmp_path_factory.mktemp("plain"), "none")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return whole_file(tmp_path_factory.mktemp("short"), "ans")


def test_truncated_files_are_refused(whole):
    data = whole.data
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (*range(0, header + 8, 7), *range(header, len(data), 256), len(data) - 1):
        damaged(whole, data[:length])
    damaged(whole, data + b"\0")


def test_files_with_a_changed_byte_are_refused(whole):
    data = whole.data
    header = 8 + int.from_bytes(data[:8], "little")
    for i in (*range(16), *range(16, header, 11), *range(header - 16, len(data), 5)):
        changed = bytearray(data)
        changed[i] ^= (0x01, 0x80, 0x20, 0xFF)[i % 4]
        damaged(whole, changed)
    whole.path.write_bytes(data)
    assert_same_state(ps.load(whole.path, whole.model), whole.result.model)


@given(data=st.data())
def test_files_with_a_few_changed_bytes_are_refused_or_mean_the_same(whole, data):
    changed = bytearray(whole.data)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    whole.path.write_bytes(changed)
    with suppress(ps.DataError):
        assert_same_state(ps.load(whole.path, whole.model), whole.result.model)


def test_files_of_others_are_refused(whole):
    save_file(whole.model.state_dict(), whole.path)
    damaged(whole, whole.path.read_bytes())
    for other in (b"", b"GGUF" * 100, b"\x80\x04K\x01." * 9, json.dumps({"a": 1}).encode()):
        damaged(whole, other)


# --- files that somebody made to do harm: their checksums are right


def sealed(text, header=None):
    """A file whose record is this text."""
    record = f'{{"checksum":{zlib.crc32(text.encode())},"record":{text}}}'
    head = json.dumps({"__metadata__": {"pysolve": record}, **(header or {})}).encode()
    return struct.pack("<Q", len(head)) + head


@contextmanager
def little_memory(most):
    """At most this many bytes more, from NumPy, Python or torch."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + max(most, 64 << 20), hard))
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def short_sealed(version, text, claimed=None, most=None):
    """A coded file without tensors, whose record is this text; of ``claimed`` bytes, cut after ``most``."""
    data = zipped(text)[:most]
    checksum = zlib.crc32(data, zlib.crc32(f"torch.uint8 ({len(data)},)".encode()))
    told = f"{version} {checksum} {len(data) if claimed is None else claimed}"
    stream = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    head = json.dumps({"__metadata__": {"pysolve": told}, ":coded": stream}).encode()
    return struct.pack("<Q", len(head)) + head + data


HUGE = {"dtype": "F32", "shape": [2**25, 2**25], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**63 + 5) + b"{" * 1000,
        struct.pack("<Q", 10**9) + b"{" * 1000,
        sealed("{}", {"a": HUGE}),
        sealed("{}", {"a": {**HUGE, "data_offsets": [0, 2**52]}}),
        sealed("{}", {"a": {**HUGE, "shape": [2**40] * 4}}),
        sealed("[" * 100_000 + "]" * 100_000),
        sealed("[" + "[]," * 1_000_000 + "0]"),
        sealed("9" * 5000),
        sealed('{"version":1e999,"checksums":{}}'),
        sealed('{"version":1}'),
        sealed("[]"),
        sealed('{"version":2,"checksums":{}}'),
        short_sealed(2, b'{"version":2,"report":"' + b" " * 50_000_000 + b'"}'),
        short_sealed(2, b"[" + b"[]," * 600_000 + b"0]"),
        short_sealed(2, b"[" * 100_000 + b"]" * 100_000),
        short_sealed(2, b'{"version":2}'),
        short_sealed(2, b'{"version":2}', claimed=9_999_999_999),
        short_sealed(2, b'{"version":2}', claimed=3),
        short_sealed(2, b'{"version":2}', most=3),
        short_sealed(2, b'{"version":2}', most=0),
        short_sealed(2, b'{"version":1,"checksums":{}}'),
        short_sealed(2, b'{"version":2,"checksums":{}}'),
        short_sealed(2, b'{"version":2,"checksums":{":coded":0}}'),
        short_sealed(2, b"\xff\xfe"),
        short_sealed(3, b'{"version":3,"checksums":{}}'),
    ],
)
def test_headers_that_claim_too_much_take_no_memory(data, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    model = mlp()
    # What is packed may take 2 MB when it is unpacked.
    packed = 9_000_000 * (b":coded" in data)
    # From 3.13 on lists in lists are read deeper before they are too deep.
    own = 200_000 if sys.version_info < (3, 13) else 500_000
    with little_memory(4 * len(data) + own + packed), pytest.raises(ps.DataError):
        ps.load(path, model)


def test_a_file_that_is_nearly_all_header_is_neither_read_nor_written(tmp_path):
    path = tmp_path / "a.safetensors"
    record = {"version": 1, "report": "x" * 3_000_000}
    with pytest.raises(ps.DataError, match="more than a quarter and 2 MB"):
        storage.write(path, {}, record)
    assert not any(tmp_path.iterdir())
    path.write_bytes(sealed(json.dumps({**record, "checksums": {}})))
    with little_memory(200_000), pytest.raises(ps.DataError, match="more than a quarter and 2 MB"):
        ps.load(path, mlp())


def test_the_length_of_a_header_is_checked_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.delattr(storage, "safe_open")
    path = tmp_path / "a.safetensors"
    for length, size in ((2**60, 30), (10**9, 1000), (23, 30)):
        path.write_bytes(struct.pack("<Q", length).ljust(size, b"{"))
        with pytest.raises(ps.DataError, match=f"header should take {length} bytes, but the file has {size}"):
            ps.load(path, mlp())


def test_tensors_that_no_one_wants_are_not_copied(tmp_path):
    path = tmp_path / "a.safetensors"
    result, model = small()
    ps.save(result, path)
    record, tensors = storage.read(path)
    storage.write(path, {**tensors, "more": torch.zeros(4_000_000)}, record)
    with little_memory(1_000_000), pytest.raises(ps.DataError, match="only one of them has more"):
        ps.load(path, model)


def forged(whole, change):
    """The usual file with a record and tensors changed, its checksums right."""
    whole.path.write_bytes(whole.data)
    record, tensors = storage.read(whole.path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(record, tensors)
    storage.write(whole.path, tensors, record)


VALUES = "fc1.values"
GAPS = "fc1.values:gaps"


def step(**changes):
    """A change of the only step."""
    return lambda record, _: record["stages"][0][0].update(changes)


def tensor(name, value):
    return lambda _, tensors: tensors.update({name: value})


def field(**changes):
    return lambda record, _: record.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(version=3), "has format version 3, but this pysolve reads versions 1 and 2: update"),
        (field(version=True), "has format version True"),
        (field(version=None), "has format version None"),
        (lambda record, _: record.pop("stages"), "expected a field 'stages'"),
        (field(stages={}), "expected stages to be a list, got an object"),
        (field(stages=[[3]]), "expected a step to be an object, got an integer"),
        (field(original=[]), "expected original to be an object, got a list"),
        (field(biases="fc1.bias"), "expected biases to be a list"),
        (field(biases=["fc9.bias"]), "it has no layer 'fc9'"),
        (field(biases=[".bias"]), " is a Mlp, which has no channels"),
        (field(sparse=["fc1", 7]), "every part of sparse to be a string, got an integer"),
        (field(sparse=[]), "only one of them has fc1.values"),
        (field(sparse=["fc1", "fc2"]), "only one of them has"),
        (field(sparse=[""]), "is a Mlp, which has no sparse form"),
        (field(training=3), "expected training to be a list, got an integer"),
        (field(training=["fc9"]), "it has no layer 'fc9'"),
        (field(aliases={"fc1.bias": 4}), "expected aliases to be a string"),
        (field(aliases={"fc1.bias": "fc2.bias"}), "only one of them has fc1.bias"),
        (step(keep=[1, 2]), "expected keep as indices"),
        (step(keep="0-99999999999"), "expected keep as indices"),
        (step(keep="0-9999999999"), "expected keep within 0 … 39"),
        (step(keep="0-39 0-39"), "expected keep within 0 … 39, each once"),
        (step(keep="3 2"), "keep must list channel indices in ascending order"),
        (step(keep=""), "no channel of fc1 → fc2 would be left"),
        (step(keep="0-18"), "expected fc1.values of shape .19, 6., got .20, 6."),
        (step(channels=2**50), "expected a site of 1 … 40 channels"),
        (step(channels=0), "expected a site of 1 … 40 channels"),
        (step(channels=True), "expected channels to be an integer, got true or false"),
        (step(writers=[]), "expected fc1.values of shape"),
        (step(writers=[], readers=[]), "expected a site of 1 … 0 channels"),
        (step(writers=["fc1", "fc1 "]), "it has no layer 'fc1 '"),
        (step(readers=[""]), "expected a site|several steps speak|is a Mlp|exactly"),
        (step(rows={"fc1": "0-9999999"}), "expected rows within 0 … 39"),
        (step(rows={"fc1": "0-38"}), "as many indices for each of 40 channels"),
        (step(rows={"fc3": "0-3"}), "as many indices|rows names 'fc3'"),
        (lambda record, _: record["stages"].append(record["stages"][0]), "a site of 1 … 20 channels"),
        (lambda record, _: record["stages"][0].append(record["stages"][0][0]), "same rows of fc1"),
    ],
)
def test_records_that_do_not_hold_are_refused(change, message, whole):
    forged(whole, change)
    with little_memory(1_000_000), pytest.raises(ps.DataError, match=message):
        ps.load(whole.path, whole.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(shapes=[]), "expected shapes to be an object"),
        (lambda record, _: record["shapes"].update({VALUES: [2**25, 2**25]}), "fc1.values of shape"),
        (lambda record, _: record["shapes"].pop(VALUES), "only one of them has fc1.values:gaps"),
        (tensor(GAPS, torch.full((10**5,), 255, dtype=torch.uint8)), "at most 120 values"),
        (tensor(GAPS, torch.zeros(12)), "a row of uint8 or uint16 gaps"),
        (tensor(GAPS, torch.full((12,), 254, dtype=torch.uint8)), "reach beyond the 120 places"),
        (tensor(GAPS, torch.zeros(11, dtype=torch.uint8)), "a gap for each of 12 values"),
        (tensor(VALUES, torch.zeros(10**5)), "expected at most 120 values"),
        (tensor(VALUES, torch.zeros(3, 4)), "expected a row of values"),
        (tensor(VALUES, torch.zeros(12, dtype=torch.int32)), "fc1.values in torch.float32, got"),
        (tensor("fc2.bias", torch.zeros(31)), "expected fc2.bias of shape .30., got .31."),
        (tensor("fc2.bias", torch.zeros(30).int()), "expected fc2.bias in torch.float32, got torch.int32"),
        (tensor("fc9.bias", torch.zeros(31)), "only one of them has fc9.bias"),
        (lambda _, tensors: tensors.pop("fc3.bias"), "only one of them has fc3.bias"),
    ],
)
def test_tensors_that_do_not_hold_are_refused(change, message, plain):
    forged(plain, change)
    with little_memory(1_000_000), pytest.raises(ps.DataError, match=message):
        ps.load(plain.path, plain.model)


def row(name, told):
    """A change of how a tensor is written."""
    return lambda record, _: record["rows"][name].__setitem__(1, told)


def coded_bytes(change):
    return lambda _, tensors: tensors.update({":coded": change(tensors[":coded"])})


HUGE_TABLE = ["a", 0, 65535, 2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(rows=[]), "expected rows to be an object"),
        (field(rows={}), "only one of them has"),
        (field(version=1), "expected a field 'shapes'"),
        (
            lambda record, _: record["rows"].update({"fc9.bias": ["float32 3", 0]}),
            "only one of them has fc9.bias",
        ),
        (lambda record, _: record["rows"].pop("fc3.bias"), "only one of them has fc3.bias"),
        (lambda record, _: record["rows"].update({"fc2.bias": 3}), "expected fc2.bias to be a list"),
        (lambda record, _: record["rows"].update({"fc2.bias": []}), "data type and row of fc2.bias"),
        (lambda record, _: record["rows"]["fc2.bias"].__setitem__(0, 3), "expected fc2.bias to be a string"),
        (
            lambda record, _: record["rows"]["fc2.bias"].__setitem__(0, "float32 31"),
            r"of shape \[30\], got \[31\]",
        ),
        (
            lambda record, _: record["rows"]["fc2.bias"].__setitem__(0, "float32"),
            r"of shape \[30\], got \[\]",
        ),
        (
            lambda record, _: record["rows"]["fc2.bias"].__setitem__(0, "int32 30"),
            "fc2.bias in torch.float32",
        ),
        (lambda record, _: record["rows"]["fc2.bias"].__setitem__(0, "save 30"), "unknown data type 'save'"),
        (lambda record, _: record["rows"]["fc2.bias"].__setitem__(0, "complex128 30"), "unknown data type"),
        (row("fc2.bias", None), "a row to be a list"),
        (row("fc2.bias", True), "a row to be a list"),
        (row("fc2.bias", -1), "-1 is no number of uint32"),
        (row("fc2.bias", 1 << 32), "is no number of uint32"),
        (row("fc2.bias", []), "unknown way to write uint32"),
        (row("fc2.bias", [[]]), "unknown way to write uint32"),
        (row("fc2.bias", ["z", 1]), "unknown way to write uint32"),
        (row("fc2.bias", ["a", 0, 3, 1, 4]), "unknown way to write uint32"),
        (row("fc2.bias", ["p", 0, 0, 0]), "expected the 4 bytes of uint32, got 3"),
        (row("fc2.bias", ["p", 0, 0, 0, ["p", 0]]), "unknown way to write uint8"),
        (row("fc2.bias", ["p", 0, 0, 0, HUGE_TABLE]), "are not uint8|bytes are left"),
        (row("fc2.bias", ["p", 0, 0, 0, ["a", 0, 3, 3, 4]]), "3 coded numbers of 3 bytes"),
        (row("fc2.bias", ["p", 0, 0, 0, ["a", 0, 3, 1]]), "expected 4 integers"),
        (row("fc2.bias", ["p", 0, 0, 0, ["a", -1, 3, 1, 4]]), "from -1 on are not uint8"),
        (row("fc2.bias", ["p", 0, 0, 0, ["a", 0, 3, 1, 1 << 60]]), "bytes are left"),
        (row("fc2.bias", ["p", 0, 0, 0, ["a", 0, 3, 1, -4]]), "bytes are left"),
        (row("fc2.bias", ["p", 0, 0, 0, ["a", 0, 3, 1, 3]]), "row of uint32"),
        (row("fc2.bias", ["t", 1 << 60, 0, 0]), "does not go with 30 entries"),
        (row("fc2.bias", ["t", 0, 0, 0]), "does not go with 30 entries"),
        (row("fc2.bias", ["t", 3, 0]), "does not go with 30 entries"),
        (row("fc2.bias", ["t", 3, 0, 3]), "value 3 of a table of 3"),
        (
            row("fc2.bias", ["t", 3, 0, ["t", 3, 0, ["t", 3, 0, ["t", 3, 0, ["t", 3, 0, ["t", 3, 0, 0]]]]]]),
            "unknown way",
        ),
        (row("fc2.bias", ["g", 1, 1 << 60, 0, 0]), "expected at most 30 gaps, got"),
        (row("fc2.bias", ["g", 1, -1, 0, 0]), "expected at most 30 gaps, got -1"),
        (row("fc2.bias", ["g", 4, 2, 0, 0]), "gaps of one or two bytes"),
        (row("fc2.bias", ["g", 1, 2, 0]), "gaps of one or two bytes"),
        (row("fc2.bias", ["g", 1, 2, 29, 0]), "reach beyond the 30 places"),
        (row("fc2.bias", ["g", 1, 2, 255, 0]), "gap for each of 0 values"),
        (row(VALUES, "r"), "expected entries and gaps between them, got r"),
        (row(VALUES, 0), "expected entries and gaps between them, got 0"),
        (coded_bytes(lambda stream: stream[:-1]), "bytes are left"),
        (coded_bytes(lambda stream: torch.cat([stream, stream[:1]])), "1 bytes belong to no tensor"),
        (tensor("fc9.bias", torch.zeros(31)), "only one of them has fc9.bias"),
    ],
)
def test_rows_that_do_not_hold_are_refused(change, message, short):
    forged(short, change)
    with little_memory(1_000_000), pytest.raises(ps.DataError, match=message):
        ps.load(short.path, short.model)


LEAVES = st.none() | st.booleans() | st.integers(-1, 50) | st.floats(0, 1e300)
JSON = st.recursive(
    LEAVES | st.text("019- fc.", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("fc1"), inner, max_size=3),
    max_leaves=5,
)


def assert_refused_or_harmless(file, data, first, deeper):
    """With another value at one place of its record, from a ``first`` key on and as long as ``deeper``."""

    def change(record, _):
        place, key = record, data.draw(first(sorted(record)))
        while isinstance(place[key], dict | list) and place[key] and data.draw(deeper):
            place = place[key]
            key = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
        place[key] = data.draw(JSON)

    forged(file, change)
    with suppress(ps.DataError):
        assert_same_state(ps.load(file.path, file.model), file.result.model)


@given(data=st.data())
def test_any_value_anywhere_in_the_record_is_refused_or_does_no_harm(whole, data):
    assert_refused_or_harmless(whole, data, st.sampled_from, st.booleans())


# --- whole or not at all


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_a_save_that_fails_leaves_what_was_there(failing, tmp_path, monkeypatch):
    result, model = small()
    path = tmp_path / "a.safetensors"
    ps.save(result, path)
    before = path.read_bytes()

    def fails(*args, **kwargs):
        if failing == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(storage if failing == "save_file" else os, failing, fails)
    other = ps.prune(model, amount=0.5)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(OSError, match="no space left"):
            ps.save(other, target)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_files_are_as_open_as_others(tmp_path):
    result, _ = small()
    ps.save(result, tmp_path / "a.safetensors")
    (tmp_path / "b").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_packed_tensors_are_unpacked_by_any_network_of_these_layers():
    model = mlp()
    packed = pack(model)
    assert isinstance(packed, Packed)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in unpack(packed, model).items())


class Versioned(nn.Module):
    """Its layer is narrower in state dicts of before version 2, as the stem of MNASNet is."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version", 1) < 2:
            self.a = nn.Linear(8, 7)
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_layers_do_not_take_their_values_for_those_of_an_older_version(tmp_path):
    model, path = Versioned().eval(), tmp_path / "a.safetensors"
    result = ps.compress(model, [torch.randn(64, 8)], keep=0.5, progress=False)
    ps.save(result, path)
    assert_same_state(ps.load(path, model), result.model)


def test_other_files_and_folders_are_told_as_what_they_are(tmp_path):
    model = mlp()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ps.DataError, match=r"plain\.safetensors .* which a state dict alone does not have"):
        ps.load(tmp_path / "plain.safetensors", model)
    with pytest.raises(
        ps.DataError, match=r"a\.pt is no file written by pysolve\.save.*torch\.save wrote it"
    ):
        ps.load(tmp_path / "a.pt", model)
    with pytest.raises(ps.DataError, match=r"is a folder: give the file, of plain\.safetensors in it"):
        ps.load(tmp_path, model)
    assert not storage.is_compressed(tmp_path / "plain.safetensors")
    assert not storage.is_compressed(tmp_path / "a.pt")
    assert not storage.is_compressed(tmp_path)
    ps.save(small()[0], tmp_path / "b.safetensors")
    assert storage.is_compressed(tmp_path / "b.safetensors")


# --- masked networks


@pytest.fixture(scope="module")
def covered(tmp_path_factory):
    """A network with two masked layers, one of them under two names, and its file."""
    model = mlp((6, 40, 30, 4))
    model.again = model.fc2
    model.eval()
    result = ps.prune(model, amount={"fc1": 0.5, "fc2": 0.9}, layout="masked")
    path = tmp_path_factory.mktemp("covered") / "a.safetensors"
    ps.save(result, path)
    return Whole(path.read_bytes(), model, result, path)


def test_masked_networks_are_masked_again_and_compute_the_same(covered):
    covered.path.write_bytes(covered.data)
    loaded = ps.load(covered.path, other_values(covered.model))
    assert_same_state(loaded, covered.result.model)
    assert torch.equal(bits(loaded(vectors())), bits(covered.result.model(vectors())))
    assert not any(module.training for module in unmasked(loaded).modules())
    assert [*masks_of(loaded)] == [*masks_of(covered.result.model)]
    assert loaded.again is loaded.fc2
    assert loaded.fc3.weight.all()


def test_masked_networks_go_on_with_what_training_made_of_them(covered):
    trained = copy.deepcopy(covered.result.model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    result = replace(covered.result, model=trained)
    path = covered.path.with_name("b.safetensors")
    ps.save(result, path)
    loaded = ps.load(path, covered.model)
    # Below the masks something else may lie: only what is in use is saved.
    assert torch.equal(loaded(vectors()), trained(vectors()))
    assert all(
        torch.equal(loaded.get_submodule(n).weight, trained.get_submodule(n).weight) for n in ("fc1", "fc2")
    )
    assert all(
        torch.equal(mask.mask, masks_of(loaded)[name].mask) for name, mask in masks_of(trained).items()
    )


@pytest.mark.parametrize("amount", [0.5, 0.6, 0.9])
def test_files_of_masked_networks_are_smaller_than_dense_ones(amount, tmp_path):
    model = mlp((40, 300, 10))
    save_file(model.state_dict(), tmp_path / "dense")
    ps.save(ps.prune(model, amount=amount, layout="masked"), tmp_path / "masked")
    dense, masked = ((tmp_path / name).stat().st_size for name in ("dense", "masked"))
    # Entries take a byte more than weights; the record is the rest.
    assert masked < (1 - amount) * 1.25 * dense + 8000
    assert masked < dense or amount == 0.5


def test_a_masked_original_stands_for_the_network_below(covered):
    loaded = ps.load(covered.path, covered.result.model)
    assert torch.equal(loaded(vectors()), covered.result.model(vectors()))


def test_files_without_a_word_on_masks_are_read(covered):
    forged(covered, lambda record, _: record.pop("masked"))
    loaded = ps.load(covered.path, covered.model)
    assert not masks_of(loaded)
    assert torch.equal(loaded(vectors()), covered.result.model(vectors()))


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        ({}, "expected masked to be a list"),
        (["fc1", 3], "every part of masked to be a string"),
        (["fc9"], "has no layer 'fc9'"),
        ([""], " is a Mlp, which has no weight to mask"),
        (["fc1"] * 10**5 + ["fc8"], "has no layer 'fc8'"),
    ],
)
def test_records_of_masks_that_do_not_hold_are_refused(masked, message, covered):
    forged(covered, field(masked=masked))
    with little_memory(20_000_000), pytest.raises(ps.DataError, match=message):
        ps.load(covered.path, covered.model)


def test_sparse_layers_cannot_be_masked(whole):
    forged(whole, field(masked=["fc1"]))
    with pytest.raises(ps.DataError, match="fc1 is a SparseLinear, which has no weight to mask"):
        ps.load(whole.path, whole.model)


# --- layers that became two


def low(layer, rank, *, spatial=False, seed=0):
    """Random factors for a layer."""
    h, c, *kernel = layer.weight.shape
    inner, outer = [*kernel], [1] * len(kernel)
    if spatial:
        inner[-1], outer[-1] = 1, kernel[-1]
    rng = np.random.default_rng(seed)
    return LowRank(
        rng.standard_normal((h, rank, *outer), dtype=np.float32),
        rng.standard_normal((rank, c, *inner), dtype=np.float32),
    )


def factored(model, ranks, values=None):
    """A network with some layers of random factors, from {name: rank or (rank, True)}."""
    forms = {}
    for name, asked in ranks.items():
        rank, spatial = asked if isinstance(asked, tuple) else (asked, False)
        forms[f"{name}.weight"] = low(model.get_submodule(name), rank, spatial=spatial)
    return made(model, Plan(values=values or {}, forms=forms))


KINDS_OF_LAYERS = {
    "linear": (nn.Linear(6, 5), 2, (6,)),
    "linear over positions": (nn.Linear(6, 5, bias=False), 3, (4, 6)),
    "kernel first": (nn.Conv2d(3, 5, 3, stride=2, padding=(1, 2)), 2, (3, 8, 9)),
    "height and width": (nn.Conv2d(3, 5, (3, 5), stride=(2, 1), padding=1, bias=False), (4, True), (3, 8, 9)),
    "same": (nn.Conv2d(3, 5, 3, padding="same", dilation=2), (2, True), (3, 8, 9)),
    "valid": (nn.Conv2d(3, 5, 3, padding="valid"), (2, True), (3, 8, 9)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, True), (3, 8, 9)),
    "1-d": (nn.Conv1d(3, 5, 3, padding=1), 2, (3, 8)),
    "3-d": (nn.Conv3d(2, 3, 2, dilation=2), (2, True), (2, 5, 6, 7)),
}


@pytest.mark.parametrize("kind", KINDS_OF_LAYERS)
def test_factored_layers_of_every_kind_come_back(kind, tmp_path):
    layer, rank, shape = copy.deepcopy(KINDS_OF_LAYERS[kind])
    model = nn.Sequential(layer, nn.ReLU()).eval()
    batch = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    result = factored(model, {"0": rank})
    loaded = assert_restored(result, model, tmp_path / "a.safetensors", batch)
    for two in (loaded[0], result.model[0]):
        assert isinstance(two, Factored)
        two.inner.weight.requires_grad_()
    assert repr(loaded) == repr(result.model)


@pytest.mark.parametrize("known", [True, False])
def test_a_factored_layer_may_have_a_new_bias(known, tmp_path):
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).eval()
    result = factored(model, {"0": 2, "2": 1}, {"0.bias": np.arange(5.0)})
    result = result if known else replace(result, fingerprint=None)
    loaded = assert_restored(result, model, tmp_path / "a.safetensors", vectors())
    assert loaded[0].bias.tolist() == [0, 1, 2, 3, 4]
    assert loaded[2].bias is None


@pytest.mark.parametrize("known", [True, False])
def test_biases_that_come_to_layers_within_factored_ones_come_back(known, tmp_path):
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)).eval()
    first = factored(model, {"0": 3})
    plan = Plan(
        values={"0.inner.bias": np.ones(3), "0.outer.bias": np.arange(5.0)},
        forms={"0.outer.weight": low(first.model[0].outer, 2)},
    )
    second = following(first, Compressed(ps.apply(first.model, plan), plan, REPORT))
    second = second if known else replace(second, fingerprint=None)
    loaded = assert_restored(second, model, tmp_path / "a.safetensors", vectors())
    assert loaded[0].inner.bias.tolist() == [1, 1, 1]
    assert loaded[0].outer.outer.bias.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("known", [True, False])
def test_a_stage_with_cuts_forms_and_biases_comes_back(known, tmp_path):
    model = Mlp((6, 12, 9, 8, 4)).eval()
    model.fc2 = nn.Linear(12, 9, bias=False)
    steps = (narrowed(1, 12, [0, 2, 3, 5, 7]), narrowed(2, 9, [1, 2, 3, 8]), narrowed(3, 8, [4, 5, 6]))
    narrower = ps.apply(model, Plan(steps))
    codes = np.random.default_rng(0).integers(-8, 8, (4, 3), np.int8)
    forms = {
        "fc1.weight": Codebook(np.arange(30, dtype=np.uint8).reshape(5, 6) % 3, np.array([0.0, 0.5, 2.0])),
        "fc2.weight": low(narrower.fc2, 2),
        "fc3.weight": Sparse.from_dense(np.eye(3, 4, dtype=np.float32)),
        "fc4.weight": Integers(codes, np.ones((4, 1), np.float32), bits=4),
    }
    result = made(model, Plan(steps, {"fc2.bias": np.arange(9.0)}, forms))
    result = result if known else replace(result, fingerprint=None)
    loaded = assert_restored(result, model, tmp_path / "a.safetensors", vectors())
    assert loaded.fc2.bias.tolist() == [1, 2, 3, 8]


def test_a_network_that_is_one_layer_comes_back_in_every_form(tmp_path):
    model, rng = nn.Linear(6, 5), np.random.default_rng(0)
    codes, scales = rng.integers(-8, 8, (5, 6), np.int8), np.ones((5, 1), np.float32)
    for form in (low(model, 2), Sparse.from_dense(np.eye(5, 6, dtype=np.float32)), Integers(codes, scales)):
        result = made(model, Plan(forms={"weight": form}))
        assert type(result.model) is not nn.Linear
        assert_restored(result, model, tmp_path / "a.safetensors", vectors())


def test_chains_of_low_rank_and_everything_else_come_back_at_every_step(tmp_path):
    model = mlp((20, 24, 22, 4))
    batches = [vectors(80, 20) @ torch.randn(20, 20, generator=torch.Generator().manual_seed(1))]
    quick = {"progress": False, "layout": "factored"}
    chain = [ps.low_rank(model, batches, rank={"fc1": 6, "fc2": 5}, **quick)]
    chain.append(ps.compress(chain[-1], batches, keep=0.6, progress=False))
    inner = chain[-1].model.fc1.inner
    most = inner.weight.numel() // sum(inner.weight.shape) - 1
    chain.append(ps.low_rank(chain[-1], batches, rank={"fc1.inner": max(1, most)}, **quick))
    chain.append(ps.prune(chain[-1], amount=0.5, layout="sparse"))
    assert isinstance(chain[2].model.fc1.inner, Factored)
    for result in chain:
        loaded = assert_restored(result, model, tmp_path / "a.safetensors", vectors(3, 20))
        assert torch.equal(loaded(vectors(3, 20)), result.model(vectors(3, 20)))
    trained = copy.deepcopy(chain[1].model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    assert_restored(replace(chain[1], model=trained), model, tmp_path / "b.safetensors", vectors(3, 20))


def test_convolutional_networks_come_back_after_low_rank(tmp_path):
    model, batch = network("residual")
    x = torch.randn(24, *batch.shape[1:], generator=torch.Generator().manual_seed(3))
    for structure in ("channel", "spatial"):
        result = ps.low_rank(model, [x], rank=1, structure=structure, layout="factored", progress=False)
        assert sum(isinstance(layer, Factored) for layer in result.model.modules()) > 1
        assert_restored(result, model, tmp_path / "a.safetensors", batch)


def test_a_factored_layer_under_two_names_comes_back_as_one(tmp_path):
    model = mlp()
    model.again = model.fc2
    result = factored(model, {"fc2": 3})
    loaded = assert_restored(result, model, tmp_path / "a.safetensors", vectors())
    assert loaded.again is loaded.fc2
    assert isinstance(loaded.again, Factored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factored_layers_keep_their_type(dtype, tmp_path):
    model = mlp().to(dtype)
    assert_restored(factored(model, {"fc1": 3}), model, tmp_path / "a.safetensors", vectors().to(dtype))


def test_factors_that_a_file_cannot_tell_are_refused_when_they_are_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    form = LowRank(np.ones((3, 2, 3, 1), np.float32), np.ones((2, 2, 1, 3), np.float32))
    with pytest.raises(ps.PysolveError, match="kernel first, or along the last dimension"):
        ps.save(made(model, Plan(forms={"0.weight": form})), tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


def test_files_of_before_layers_were_factored_are_read(whole):
    forged(whole, lambda record, _: record.pop("factored"))
    assert_same_state(ps.load(whole.path, whole.model), whole.result.model)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A network with two factored layers, and its file."""
    model = mlp((60, 40, 30, 4))
    result = factored(model, {"fc1": 7, "fc2": 5})
    path = tmp_path_factory.mktemp("halved") / "a.safetensors"
    ps.save(result, path)
    return Whole(path.read_bytes(), model, result, path)


def ranks(*stages):
    return lambda record, _: record.update(factored=[*stages], stages=[[] for _ in stages])


def rank(value, spatial=False):
    return {"rank": value, "spatial": spatial}


FC2 = {"fc2": rank(5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(factored={}), "expected factored to be a list, got an object"),
        (field(factored=[]), "only one of them has fc1"),
        (ranks([]), "expected factored to be an object, got a list"),
        (ranks({"fc1": 7}), "a factored layer to be an object, got an integer"),
        (ranks({"fc9": rank(7)}), "has no layer 'fc9'"),
        (ranks({"": rank(7)}), " is a Mlp, which cannot be factored"),
        (ranks(FC2), "only one of them has fc1"),
        (ranks(FC2 | {"fc1": rank(6)}), "expected fc1.inner.weight of shape .6, 60., got .7, 60."),
        (ranks(FC2 | {"fc1": rank(7), "fc3": rank(1)}), "only one of them has fc3"),
        (ranks(FC2 | {"fc1": rank(41)}), "rank of at most 40, got 41"),
        (ranks(FC2 | {"fc1": rank(2401)}), "fc1 cannot have rank 2401"),
        (ranks(FC2 | {"fc1": rank(10**300)}), "fc1 cannot have rank 1000"),
        (ranks(FC2 | {"fc1": rank(0)}), "a rank of at least 1, got 0"),
        (ranks({"fc1": rank(7)}, {"fc1": rank(7)}), "fc1 is a Factored, which cannot be factored"),
        (ranks({"fc1": rank(7)}, FC2, {"fc1.inner": rank(2)}), "only one of them has fc1.inner"),
        (lambda record, _: record["factored"].extend([{}] * 10**4 + [{"fc1.inner": rank(1)}]), None),
        (lambda record, _: record["factored"][0]["fc1"].update(spatial=True), None),
    ],
)
def test_records_of_ranks_that_do_not_hold_are_refused(change, message, halved):
    forged(halved, change)
    with little_memory(1_000_000):
        if message is None:
            # What no stage is there for, or means nothing to a Linear, does no harm.
            assert_same_state(ps.load(halved.path, halved.model), halved.result.model)
            return
        with pytest.raises(ps.DataError, match=message):
            ps.load(halved.path, halved.model)


def test_layers_cannot_be_made_larger_and_larger_by_factoring_their_factors(halved):
    """Each factor of full rank has as many numbers as the layer, twice as many together."""
    model, names, stages = mlp((30, 30, 4)), ["fc1"], []
    for _ in range(12):
        stages.append({name: rank(30) for name in names})
        names = [f"{name}.{part}" for name in names for part in ("inner", "outer")]
    forged(halved, lambda record, _: record.update(factored=stages, stages=[[]] * 12, original=None))
    with little_memory(5_000_000), pytest.raises(ps.DataError, match="have over 4 times the original"):
        ps.load(halved.path, model)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.EmbeddingBag(4, 4), nn.ReLU()]
)
def test_records_that_factor_other_layers_are_refused(layer, halved):
    model = nn.Sequential(layer)
    forged(halved, lambda record, _: record.update(factored=[{"0": rank(1)}], original=None))
    with pytest.raises(ps.DataError, match=r"(cannot|can) be factored"):
        ps.load(halved.path, model)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"0.weight_hh_l0": rank(7)}], "0.weight_hh_l0 cannot have rank 7"),
        ([{"0.weight_hh_l0": rank(2, spatial=True)}], "0.weight_hh_l0 cannot have rank 2"),
        ([{"0.bias_hh_l0": rank(1)}], "has no layer '0.bias_hh_l0'"),
        ([{"0.weight_hh_l0": rank(2)}, {"0.weight_hh_l0": rank(2)}], "has no layer '0.weight_hh_l0'"),
        ([{"0.weight_hh_l0": rank(2)}, {"0.weight_hh_l0_outer": rank(1)}], "only a layer's weight can be"),
        ([{"0.weight_hh_l0": rank(2)}, {"0.weight_ih_l0": rank(2)}], "only one of them has"),
    ],
)
def test_records_of_ranks_of_recurrent_weights_are_checked(stages, message, halved):
    forged(halved, lambda record, _: record.update(factored=stages, stages=[[]] * len(stages), original=None))
    with pytest.raises(ps.DataError, match=message):
        ps.load(halved.path, nn.Sequential(nn.LSTM(5, 6)))


@given(data=st.data())
def test_any_value_in_a_record_of_ranks_is_refused_or_does_no_harm(halved, data):
    assert_refused_or_harmless(halved, data, lambda _: st.just("factored"), st.integers(0, 3))
