"""Ctrl-C at any call of the network leaves everything as it was; so does the interpreter's exit."""

import os
import random
import subprocess
import sys
import textwrap
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pysolve as ps
from pysolve import _core

HERE = Path(__file__).parent
QUIET = {"progress": False}


class Net(nn.Module):
    """Convolutions, norms and a bare parameter; counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3))
        return self.c(x) * self.scale


def images(n=40, seed=1):
    return [torch.randn(n // 2, 3, 6, 6, generator=torch.Generator().manual_seed(seed + i)) for i in range(2)]


def labelled():
    return [(x, torch.arange(len(x)) % 4) for x in images()]


VERBS = {
    "inspect": lambda model, folder: ps.inspect(model, images()[0]),
    "study": lambda model, folder: ps.study(model, images(), **QUIET),
    "study, kept": lambda model, folder: ps.study(model, images(), **QUIET, checkpoint=folder / "kept"),
    "compress": lambda model, folder: ps.compress(model, images(), target={"params": 0.6}, **QUIET),
    "distill": lambda model, folder: ps.compress(model, images(), keep=0.6, distill={"epochs": 2}, **QUIET),
    "prune": lambda model, folder: ps.prune(model, images(), amount=0.5, **QUIET),
    "low rank": lambda model, folder: ps.low_rank(model, images(), rank=2, **QUIET),
    "quantize": lambda model, folder: ps.quantize(model, images(), scheme="codebook", bits=4, **QUIET),
    "deep": lambda model, folder: ps.deep_compress(model, images(), target={"bytes": 0.4}, **QUIET),
    "sweep": lambda model, folder: ps.sweep(model, images(), targets=[{"params": 0.6}], **QUIET),
    "gradual": lambda model, folder: ps.prune_gradually(model, labelled(), amount=0.5, epochs=2, **QUIET),
}
# These train the network that they are given.
TRAINING = {
    "finetune": lambda model, folder: ps.finetune(
        model, labelled(), epochs=2, evaluate=lambda one: 1.0, checkpoint=folder / "training", **QUIET
    ),
    "distilled": lambda model, folder: ps.distill(model, Net().eval(), images(), epochs=2, **QUIET),
}


def state(model, *, values=True):
    """Everything that a call must not change."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    found = {
        "classes": [(name, type(one)) for name, one in model.named_modules()],
        "modes": [(name, one.training) for name, one in model.named_modules()],
        "names": [sorted(vars(one)) for one in model.modules()],
        "hooks": [
            [len(hooks) for name, hooks in sorted(vars(one).items()) if name.endswith("hooks")]
            for one in model.modules()
        ],
        "trained": [(name, one.requires_grad) for name, one in model.named_parameters()],
        "objects": [id(one) for one in model.parameters()],
        "random": [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()],  # noqa: NPY002
        "threads": (torch.get_num_threads(), _core.num_threads()),
        "torch": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch._C._len_torch_dispatch_stack(),
            torch.overrides._len_torch_function_stack(),
        ),
        "streams": (id(sys.stdout), id(sys.stderr), id(warnings.showwarning)),
        "code": (id(nn.Module.__call__), id(nn.Module.register_parameter), id(nn.functional.linear)),
    }
    if values:
        found["values"] = [(name, one.detach().numpy().tobytes()) for name, one in tensors]
        found["gradients"] = [name for name, one in model.named_parameters() if one.grad is not None]
    return found


def assert_interrupted(run, name, tmp_path, left, *, values=True):
    """Whether the network ran as often; afterwards, all is as it was."""
    model = Net()
    model.norm.eval()
    (tmp_path / "out").mkdir(exist_ok=True)
    seen = 0

    def stop(*given):
        nonlocal seen
        seen += 1
        if seen > left:
            raise KeyboardInterrupt

    handle = model.c.register_forward_pre_hook(stop)
    before = state(model, values=values)
    try:
        run(model, tmp_path / "out")
    except KeyboardInterrupt:
        after = state(model, values=values)
        wrong = [part for part in before if before[part] != after[part]]
        assert not wrong, f"{name}, after {left} calls: {wrong}"
        leftovers = [one.name for one in (tmp_path / "out").rglob("*.part")]
        assert not leftovers
        return True
    finally:
        handle.remove()
    return False


@pytest.mark.parametrize("name", VERBS)
def test_ctrl_c_leaves_everything_as_it_was(name, tmp_path):
    assert any([assert_interrupted(VERBS[name], name, tmp_path, left) for left in (0, 3)])


@pytest.mark.parametrize("name", TRAINING)
def test_ctrl_c_in_a_training_leaves_all_but_the_values_as_it_was(name, tmp_path):
    assert any([assert_interrupted(TRAINING[name], name, tmp_path, left, values=False) for left in (1, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("name", {**VERBS, **TRAINING})
def test_ctrl_c_at_many_calls_leaves_everything_as_it_was(name, tmp_path):
    run = {**VERBS, **TRAINING}[name]
    for left in range(40):
        assert_interrupted(run, name, tmp_path, left, values=name in VERBS)


WORKING = """
import sys, threading, time
import numpy as np
import pysolve as ps
from scipy.sparse import random as sparse

rng = np.random.default_rng(0)
x = rng.standard_normal((400, 200))
known = ps.Correlations.from_samples(x, x @ rng.standard_normal((200, 60)))
matrix = ps.SparseMatrix.from_csr(sparse(600, 600, 0.2, "csr", np.float32, rng=0))
batch = rng.standard_normal((64, 600)).astype(np.float32)
callback = (lambda *told: sum(range(2000))) if "callback" in sys.argv else None

def solve():
    while True:
        ps.solve_linear_reconstruction(known.r_xx, known.r_yx, 1e-4, "fista", max_iter=50, callback=callback)

def multiply():
    while True:
        matrix.matmul(batch)

for work in (solve, multiply) * 4:
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print("end")
"""


@pytest.mark.parametrize("how", ["alone", "callback"])
def test_the_interpreter_ends_while_threads_solve(how):
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKING), how],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
