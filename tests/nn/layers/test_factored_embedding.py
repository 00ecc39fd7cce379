"""A factored embedding is the one with the product for its weight; rows apart are given to the bit."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pysolve as ps
from pysolve.errors import CollapseError, PysolveError
from pysolve.forms import LowRank
from pysolve.nn.cost.counting import macs
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.layers.factored import Factored
from pysolve.nn.layers.factored_embedding import FactoredEmbedding, FactoredHead
from pysolve.nn.layers.runtime import in_form, to_dense
from pysolve.plan import Plan

ROWS, WIDTH = 20, 6


def form(rank=2, apart=(), rows=ROWS, width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((rows - len(apart), rank)), rng.standard_normal((rank, width))
    if not len(apart):
        return LowRank(*parts)
    return LowRank(*parts, np.array(apart), rng.standard_normal((len(apart), width)))


class Tied(nn.Module):
    """A head, two embeddings, and what lies between."""

    def __init__(self, bias=False, more=False):
        super().__init__()
        self.words, self.between = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=bias)
        self.others = nn.Embedding(ROWS, WIDTH) if more else None
        self.head.weight = self.words.weight
        if more:
            self.others.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        return self.head(self.between(x if self.others is None else x + self.others(ids)).tanh())


def ids(n=5, m=7, rows=ROWS):
    return torch.randint(0, rows, (n, m), generator=torch.Generator().manual_seed(0))


@st.composite
def apart(draw):
    return sorted(draw(st.sets(st.integers(0, ROWS - 1), max_size=ROWS - 3)))


@given(rows=apart(), rank=st.integers(1, 3), double=st.booleans())
def test_it_gives_the_rows_of_the_product_and_those_apart_to_the_bit(rows, rank, double):
    layer = nn.Embedding(ROWS, WIDTH, padding_idx=3, dtype=torch.float64 if double else torch.float32)
    own = form(rank, rows)
    made = in_form(layer, own)
    assert isinstance(made, FactoredEmbedding)
    every = torch.arange(ROWS)
    wanted = torch.from_numpy(own.dense()).to(layer.weight)
    for one in (made(every), made.weight, made.to_dense().weight):
        assert torch.allclose(one, wanted, atol=1e-12 if double else 1e-5)
    assert torch.equal(made(every)[rows], wanted[rows])
    assert (made.rank, made.num_embeddings, made.embedding_dim, made.padding_idx) == (rank, ROWS, WIDTH, 3)
    assert (nbytes(made), parameters(made)) == (made.form().nbytes, round(own.density * ROWS * WIDTH))
    again = made.form()
    for part in ("outer", "inner", "rows", "exact"):
        old, new = getattr(own, part), getattr(again, part)
        assert (old is None and new is None) or np.allclose(old, new, atol=1e-6)


@given(rows=apart(), bias=st.booleans(), more=st.booleans())
def test_a_tied_pair_stays_tied_and_computes_what_the_product_does(rows, bias, more):
    torch.manual_seed(0)
    model = Tied(bias, more).double().eval()
    plan = Plan(forms={"words.weight": form(2, rows)})
    made, wide = apply(model, plan, probe=ids()), masked(model, plan)
    assert torch.allclose(made(ids()), wide(ids()), atol=1e-10)
    assert isinstance(made.head, FactoredHead)
    assert made.head.outer.weight is made.words.inner.weight
    assert made.head.inner.weight is made.words.outer.weight
    sizes = [*made.between.parameters(), *([made.head.bias] if bias else [])]
    own = form(2, rows)
    numbers = own.outer.size + own.inner.size + (0 if own.exact is None else own.exact.size)
    assert parameters(made) == numbers + sum(one.numel() for one in sizes)
    assert torch.allclose(made.head.weight, made.words.weight)
    dense = to_dense(made)
    assert dense.head.weight is dense.words.weight
    assert torch.allclose(dense(ids()), made(ids()), atol=1e-10)
    copied = copy.deepcopy(made)
    assert copied.head.outer.weight is copied.words.inner.weight


@pytest.mark.parametrize("rows", [(), (2, 5, 11)])
def test_macs_are_what_torch_counts(rows):
    model = apply(Tied(), Plan(forms={"words.weight": form(2, rows)}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids())
    tokens = ids().numel()
    wanted = tokens * (2 * WIDTH * 2 + 2 * (ROWS - len(rows)) + len(rows) * WIDTH + WIDTH * WIDTH)
    assert macs(model, ids()) == counter.get_total_flops() / 2 == wanted


@pytest.mark.parametrize("rows", [(), (2, 5, 11)])
def test_exported_and_compiled_programs_give_the_same(rows):
    model = apply(Tied(), Plan(forms={"words.weight": form(2, rows)})).eval()
    wanted = model(ids())
    program = torch.export.export(model, (ids(),))
    assert torch.allclose(program.module()(ids()), wanted, atol=1e-5)
    assert torch.equal(torch.compile(model, backend="eager")(ids()), wanted)


def test_both_factors_and_rows_apart_are_trained():
    model = apply(Tied(), Plan(forms={"words.weight": form(2, (1, 4))}))
    model(torch.arange(ROWS)[None]).square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())


def test_an_embedding_that_scales_keeps_its_code():
    class Scaled(nn.Embedding):
        def forward(self, x):
            return 3 * super().forward(x)

    made = in_form(Scaled(ROWS, WIDTH), form(2, (1, 4)))
    wanted = 3 * torch.from_numpy(form(2, (1, 4)).dense()).float()
    assert torch.allclose(made(torch.arange(ROWS)), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "given", "said"),
    [
        (nn.Embedding(ROWS, WIDTH, max_norm=1.0), form(), "max_norm"),
        (nn.Embedding(ROWS, WIDTH + 1), form(), "expected a form of shape"),
        (nn.Linear(WIDTH, ROWS), form(2, (1,)), "only of embeddings"),
    ],
)
def test_what_cannot_be_is_refused(layer, given, said):
    with pytest.raises(PysolveError, match=said):
        in_form(layer, given)


def test_a_head_cannot_be_factored_without_its_embedding():
    with pytest.raises(CollapseError, match="untie them"):
        apply(Tied(), Plan(forms={"head.weight": form()}))


def test_other_layers_are_factored_as_before():
    model = ps.nn.to_dense(apply(nn.Sequential(nn.Linear(6, 20)), Plan(forms={"0.weight": form()})))
    assert not any(isinstance(one, Factored) for one in model.modules())
