"""Several processes, each with its share of the batches, end with the network of a single one."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import modules_of, one_of

from pysolve.correlations import Correlations
from pysolve.nn.ranks import ALONE, Ranks, merged

modules = modules_of("torchrun_compress")
example = one_of("torchrun_compress")
EXAMPLES = Path(__file__).parents[2] / "examples"

WORKER = """
import os, sys, traceback
from datetime import timedelta
import torch, torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, {examples!r})
import pysolve as ps
from torchrun_compress import batches, network
torch.set_num_threads(1)
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", f"file://{{folder}}/meet", timedelta(seconds=20), size, rank)
group, given, model = dist.group.WORLD, batches(rank, size), network()
options, dense = dict(progress=False, process_group=group), dict(layout="dense")
def write(name, result):
    save_file(result.model.state_dict(), f"{{folder}}/{{name}}-{{rank}}.safetensors")
status = 0
try:
{body}
except Exception:
    traceback.print_exc()
    status = 1
# Not by way of the interpreter's end: threads of gloo abort about one in a hundred processes there.
sys.stderr.flush()
os._exit(status)
"""

VERBS = {
    "compress": 'ps.compress(model, given, target={"macs": 0.5}, **options)',
    "low_rank": 'ps.low_rank(model, given, target={"params": 0.5}, prune=True, layout="factored", **options)',
    "prune": 'ps.prune(model, given, method="obs", amount=0.5, layout="dense", **options)',
    "quantize": 'ps.quantize(model, given, target={"bytes": 0.2}, scheme="codebook", **dense, **options)',
    "deep_compress": (
        'ps.deep_compress(model, given, target={"bytes": 0.1}, distill={"epochs": 1}, **dense, **options)'
    ),
}


def start(size, folder, body):
    script = folder / "worker.py"
    script.write_text(WORKER.format(examples=str(EXAMPLES), body=indent(body, " " * 4)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), folder],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ran(size, folder, body):
    """Exit status and last line of the errors of every process."""
    processes = start(size, folder, body)
    errors = [one.communicate(timeout=300)[1].strip() for one in processes]
    return [(one.returncode, error.splitlines()[-1:]) for one, error in zip(processes, errors, strict=True)]


@cache
def alone(verb, network, batches):
    import pysolve as ps

    scope = {"ps": ps, "model": network(), "given": batches(0, 1), "options": {"progress": False}}
    scope["dense"] = {"layout": "dense"}
    return eval(VERBS[verb], scope).model.state_dict()


def check(size, folder, verbs, example):
    body = "\n".join(f"write({verb!r}, {VERBS[verb]})" for verb in verbs)
    assert ran(size, folder, body) == [(0, [])] * size
    for verb in verbs:
        wanted = alone(verb, example.network, example.batches)
        for rank in range(size):
            found = load_file(folder / f"{verb}-{rank}.safetensors")
            assert found.keys() == wanted.keys()
            if verb == "deep_compress":
                # What matches the outputs sees the samples of one process.
                first = load_file(folder / f"{verb}-0.safetensors")
                assert all(torch.equal(found[name], first[name]) for name in found)
                continue
            for name, value in wanted.items():
                assert found[name].shape == value.shape
                assert (found[name] - value).norm() <= 1e-5 * value.norm()


@pytest.mark.slow
def test_two_processes_end_with_the_network_of_one(tmp_path, example):
    check(2, tmp_path, ["compress"], example)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_verb_on_several_processes_ends_with_the_network_of_one(tmp_path, example, size):
    check(size, tmp_path, [*VERBS], example)


@pytest.mark.slow
def test_sums_of_several_processes_are_those_of_one_within_rounding(tmp_path, example):
    import pysolve as ps

    body = """
found = ps.study(model, given, memory="1GiB", checkpoint=f"{folder}/sums", **options)
found.save(f"{folder}/{rank}.study")
again = ps.study(model, given, memory="1GiB", checkpoint=f"{folder}/sums", **options)
assert all((again.correlations[n].xx == one.xx).all() for n, one in found.correlations.items())
"""
    assert ran(3, tmp_path, body) == [(0, [])] * 3
    wanted = ps.study(example.network(), example.batches(0, 1), progress=False)
    for rank in range(3):
        found = ps.Study.load(tmp_path / f"{rank}.study", example.network())
        assert {*found.correlations} == {*wanted.correlations}
        for name, one in wanted.correlations.items():
            other = found.correlations[name]
            assert other.count == one.count
            assert np.linalg.norm(other.xx - one.xx) <= 1e-12 * np.linalg.norm(one.xx)


FAILURES = {
    "dies": ("if rank == 1: os._exit(3)", 3, "the processes of the group could not go on"),
    "fails": ("if rank == 1: given[2] = given[2] * float('nan')", 1, "process 1 of the group failed"),
    "hangs": (
        "if rank == 1:\n    import time\n    time.sleep(30)\n    os._exit(3)",
        3,
        "the processes of the group could not go on",
    ),
    "holds another network": (
        "if rank == 1: model[0].up.weight.data += 1",
        1,
        "process 1 of the group has another network than process 0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILURES)
def test_a_process_that_fails_ends_the_others_with_one_error(tmp_path, what):
    change, status, words = FAILURES[what]
    found = ran(2, tmp_path, f"{change}\n{VERBS['compress']}")
    assert [one for one, _ in found] == [1, status]
    (line,) = found[0][1]
    assert "PysolveError" in line
    assert words in line


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path):
    out = tmp_path / "small.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [EXAMPLES / "torchrun_compress.py", "--out", out, "--timeout", "120"]
    done = subprocess.run(
        [*command, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("macs") >= 1
    assert out.exists()


def test_a_single_process_needs_no_group():
    own = Correlations.from_samples(np.ones((3, 2)), np.ones((3, 1)))
    assert merged(own, 2, 1, 1, ALONE) is own
    assert (ALONE.rank, ALONE.size, ALONE.all(5), ALONE.first(5), ALONE.counts(5)) == (0, 1, [5], 5, [5])
    assert ALONE.shared_out(3, lambda i: i * i) == [0, 1, 4]
    assert [*ALONE.together("ab", lambda one: 1)] == [("a", [1]), ("b", [1])]


def test_what_is_no_group_is_refused():
    with pytest.raises(TypeError, match=r"process_group must be a group .*, got str"):
        Ranks("gloo")
