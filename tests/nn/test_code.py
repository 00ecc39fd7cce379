"""Compressed networks as plain Python: what the code makes is the network, without pysolve."""

import subprocess
import sys
from collections import namedtuple
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.nn.zoo import LeNet5, ResNet

QUIET = {"progress": False, "latency": False}
X = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Heads are counted in an attribute, the norm is the class's own, and weights are tied."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, ids):
        x = self.embed(ids) * self.gain
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).unbind(-3)
        y = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(x))))


attention = Attention


def resnet():
    return ResNet(8)


def network(kind):
    torch.manual_seed(0)
    return {
        "lenet": LeNet5,
        "resnet": resnet,
        "attention": attention,
        "sequential": lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 5, stride=2, padding=(1, 2)), nn.BatchNorm2d(8), nn.ReLU6()),
            nn.Flatten(),
            nn.Linear(8 * 13 * 14, 12, bias=False),
            nn.Hardswish(),
            nn.Linear(12, 4),
        ),
    }[kind]().eval()


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "attention":
        return torch.randint(20, (24, 10), generator=generator)
    size = (24, 3, 32, 32) if kind == "resnet" else (24, 1, 28, 28)
    return torch.randn(size, generator=generator)


@cache
def halved(kind):
    """A network with half of its parameters."""
    return ps.compress(network(kind), [inputs(kind)], target={"params": 0.5}, **QUIET)


def opened(path):
    """The network of a written module, made by a process that cannot import pysolve."""
    names = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["load"]()


@pytest.mark.parametrize("kind", ["lenet", "resnet", "sequential", "attention"])
def test_code_makes_the_network_again_bit_for_bit(kind, tmp_path):
    x = inputs(kind)
    result = ps.compress(network(kind), [x], target={"macs": 0.6}, **QUIET)
    make = f"{__name__}:{kind}" if kind in ("attention", "resnet") else None
    ps.export_code(result, tmp_path / "small.py", make=make, example_inputs=x[:2])
    again = opened(tmp_path / "small.py")
    assert torch.equal(again(x), result.model(x))
    assert type(again) is type(result.model)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in result.model.parameters())
    assert "pysolve" not in (tmp_path / "small.py").read_text().split('"""')[2].replace("pysolve.nn.zoo", "")


@pytest.mark.slow
def test_a_process_without_pysolve_opens_it(tmp_path):
    x, result = inputs("sequential"), halved("sequential")
    ps.export_code(result, tmp_path / "small.py")
    torch.save((x, result.model(x).detach()), tmp_path / "pair.pt")
    code = (
        "import sys; sys.modules['pysolve'] = None\n"
        "import small, torch\n"
        "x, y = torch.load('pair.pt')\n"
        "assert torch.equal(small.load()(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(tmp_path)})


def test_what_no_code_makes_is_exported_or_refused(tmp_path):
    x = inputs("lenet")
    result = ps.low_rank(network("lenet"), [x], rank=4, layout="factored", **QUIET)
    path = tmp_path / "small.py"
    with pytest.raises(ps.PysolveError, match="example_inputs"):
        ps.export_code(result, path)
    assert not [*tmp_path.iterdir()]
    ps.export_code(result, path, example_inputs=x[:2])
    again = opened(path)
    for count in (1, 5, 24):
        assert torch.allclose(again(x[:count]), result.model(x[:count]), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("nowhere.models:make", "cannot be imported"),
        ("pysolve.nn.zoo:Nothing", "cannot be imported"),
        ("torch.nn:Linear", "needs the arguments in_features"),
        ("pysolve.nn.zoo:MnistCnn", "would differ|is a"),
    ],
)
def test_an_original_that_cannot_be_made_is_named(make, said, tmp_path):
    result = halved("lenet")
    with pytest.raises(ps.PysolveError, match=said):
        ps.export_code(result, tmp_path / "small.py", make=make)
    with pytest.raises(ValueError, match=r"\.py"):
        ps.export_code(result, Path(tmp_path) / "small.pt")


def test_the_class_itself_makes_the_original(tmp_path):
    result = halved("lenet")
    ps.export_code(result, tmp_path / "small.py", make=type(result.model))
    pairs = zip(opened(tmp_path / "small.py").parameters(), result.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    for given, make in ((result.model, None), (result, 3), (result, nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="must be"):
            ps.export_code(given, tmp_path / "small.py", make=make)
    for make, said in (("torch:pi", "is no function"), (":make", "cannot be imported")):
        with pytest.raises(ps.PysolveError, match=said):
            ps.export_code(result, tmp_path / "small.py", make=make)


make = model = load_model = LeNet5


@pytest.mark.parametrize("name", ["make", "model", "load_model"])
def test_originals_may_be_named_as_what_the_code_calls_its_own(name, tmp_path):
    result = halved("lenet")
    ps.export_code(result, tmp_path / "small.py", make=f"{__name__}:{name}")
    x = inputs("lenet")
    assert torch.equal(opened(tmp_path / "small.py")(x), result.model(x))


Pair = namedtuple("Pair", "logits extra")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return Pair(y, y.sum(1))


def test_outputs_that_no_program_can_hold_are_told_and_leave_nothing(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    result = ps.low_rank(Named().eval(), [x], rank=2, layout="factored", progress=False, latency=False)
    with pytest.raises(
        ps.PysolveError, match=r"the exported program of Named cannot be written: .*namedtuple"
    ):
        ps.export_code(result, tmp_path / "small.py", example_inputs=x)
    assert not [*tmp_path.iterdir()]
