"""Matrices in one parameter, as of experts, lose inputs and outputs as layers do."""

import numpy as np
import pytest
import torch
from cuts import assert_cuts_cleanly, free, outputs, shown
from small import Net
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.errors import CollapseError, LayerNotFoundError
from pysolve.nn.cost.costs import cost_model
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.evaluate import nbytes, parameters
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan, Site

EXPERTS, INPUTS, INNER, OUTPUTS = 3, 6, 8, 5


class Experts(nn.Module):
    """Two matrices for each expert, and how to multiply with them."""

    def __init__(self, run, up, down, bias=None):
        super().__init__()
        self.run = run
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, *shape) / 2) for shape in (up, down))
        self.bias = None if bias is None else nn.Parameter(torch.randn(EXPERTS, bias))

    def forward(self, x, gates):
        return self.run(self, x, gates)


def one_by_one(experts, x, gates):
    """Every expert on all rows."""
    total = 0
    for e in range(EXPERTS):
        hidden = F.linear(x, experts.up[e], experts.bias[e]).relu()
        total = total + gates[:, e, None] * F.linear(hidden, experts.down[e])
    return total


def together(experts, x, gates):
    """All experts on all rows, inputs before outputs."""
    hidden = torch.bmm(x.expand(EXPERTS, *x.shape), experts.up).relu()
    return (torch.bmm(hidden, experts.down) * gates.T[:, :, None]).sum(0)


def picked(experts, x, gates):
    """The matrices of one expert for each row, from the left; both halves of the rows meet."""
    best = gates.argmax(-1)
    first, second = torch.bmm(experts.up[best], x[:, :, None]).squeeze(-1).chunk(2, -1)
    return torch.bmm(experts.down[best], (first.sigmoid() * second)[:, :, None]).squeeze(-1)


def by_einsum(experts, x, gates):
    hidden = torch.einsum("nd,ehd->enh", x, experts.up).relu()
    return torch.einsum("enh,ehd->nd", hidden * gates.T[:, :, None], experts.down)


def grouped(experts, x, gates):
    """Rows in the order of their experts, both halves of the rows in turns."""
    best, order = gates.argmax(-1).sort()
    ends = torch.bincount(best, minlength=EXPERTS).cumsum(0).to(torch.int32)
    hidden = F.grouped_mm(x[order].bfloat16(), experts.up.mT.bfloat16(), offs=ends)
    hidden = F.grouped_mm(hidden[:, ::2] * hidden[:, 1::2].tanh(), experts.down.bfloat16(), offs=ends)
    return hidden[order.argsort()].float()


KINDS = {
    "one_by_one": lambda: Experts(one_by_one, (INNER, INPUTS), (OUTPUTS, INNER), INNER),
    "together": lambda: Experts(together, (INPUTS, INNER), (INNER, OUTPUTS)),
    "picked": lambda: Experts(picked, (2 * INNER, INPUTS), (OUTPUTS, INNER)),
    "by_einsum": lambda: Experts(by_einsum, (INNER, INPUTS), (INNER, OUTPUTS)),
    "grouped": lambda: Experts(grouped, (32, 16), (16, 24)),
}
SITES = {
    "one_by_one": [
        "6: stem → experts.up:oi",
        "8: experts.up:oi → experts.down:oi | experts.bias",
        "5: experts.down:oi → fc",
    ],
    "together": ["6: stem → experts.up:io", "8: experts.up:io → experts.down:io", "5: experts.down:io → fc"],
    "picked": ["6: stem → experts.up:oi", "8: experts.up:oi → experts.down:oi", "5: experts.down:oi → fc"],
    "by_einsum": ["6: stem → experts.up:oi", "8: experts.up:oi → experts.down:io", "5: experts.down:io → fc"],
    "grouped": ["2: stem → experts.up:oi", "2: experts.up:oi → experts.down:io", "3: experts.down:io → fc"],
}


def network(name):
    torch.manual_seed(0)
    experts = KINDS[name]()
    turned = name in ("together",)
    width = experts.up.shape[-2 if turned else -1]
    made = experts.down.shape[-1 if name in ("together", "by_einsum", "grouped") else -2]

    def run(net, x):
        hidden = net.stem(x).relu()
        return net.fc(net.experts(hidden, x[:, :EXPERTS].softmax(-1)).tanh())

    layers = {"stem": nn.Linear(4, width), "fc": nn.Linear(made, 3)}
    return Net(run, experts=experts, **layers).eval(), torch.randn(7, 4)


@pytest.mark.parametrize("name", KINDS)
def test_sites_are_exactly_these(name):
    assert [shown(site) for site in free(find_sites(*network(name)))] == SITES[name]


@pytest.mark.parametrize("name", KINDS)
def test_random_plans_cut_cleanly(name):
    model, batch = network(name)
    sites = find_sites(model, batch)
    for seed in range(3):
        assert_cuts_cleanly(model, batch, sites, seed)


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_that_keeps_all_changes_nothing(name):
    model, batch = network(name)
    steps = tuple(Collapse(site, range(site.channels)) for site in free(find_sites(model, batch)))
    (wanted,), (got,) = outputs(model, batch), outputs(apply(model, Plan(steps)), batch)
    assert torch.equal(wanted, got)


@pytest.mark.parametrize("name", KINDS)
def test_costs_are_those_of_the_cut_network(name):
    model, batch = network(name)
    sites = free(find_sites(model, batch))
    kept = np.array([site.channels // 2 for site in sites])
    smaller = apply(model, Plan(tuple(Collapse(s, np.arange(k)) for s, k in zip(sites, kept, strict=True))))
    costs = cost_model(model, sites, batch)
    for network_, k in ((model, [site.channels for site in sites]), (smaller, kept)):
        found = costs.cost(k)
        assert (found["params"], found["bytes"]) == (parameters(network_), nbytes(network_))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keep", [0.5, None])
def test_experts_are_compressed_and_saved(name, keep, tmp_path):
    model, batch = network(name)
    batches = [torch.randn(16, 4) for _ in range(4)]
    goal = {"keep": keep} if keep else {"target": {"params": 0.7}}
    result = ps.compress(model, batches, progress=False, latency=False, **goal)
    smaller = {name: value.shape for name, value in result.model.named_parameters()}
    assert smaller["experts.down"].numel() < model.experts.down.numel()
    assert_masked_is_cut(model, result.plan, batch)
    ps.save(result, tmp_path / "cut.safetensors")
    (wanted,), (got,) = (
        outputs(one, batch) for one in (result.model, ps.load(tmp_path / "cut.safetensors", model))
    )
    assert torch.equal(wanted, got)


def assert_masked_is_cut(model, plan, batch):
    (wanted,), (got,) = (outputs(make(model, plan), batch) for make in (masked, apply))
    assert (wanted - got).abs().max() <= 1e-5 * wanted.abs().max()


def test_inputs_that_matter_least_go_first():
    model, _ = network("together")
    model.experts.down.data[:, [1, 4, 6]] *= 1e-3
    batches = [torch.randn(32, 4) for _ in range(4)]
    inner = free(find_sites(model, batches[0]))[1]
    result = ps.compress(model, batches, keep={"experts.up:io": 5}, progress=False)
    (step,) = (step for step in result.plan.steps if step.site.writers == inner.writers)
    assert step.keep.tolist() == [0, 2, 3, 5, 7]
    assert any(
        "parameter (experts.down:io, experts.up:io), those stay" in note for note in result.report.notes
    )
    assert not any("experts" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("method", ["ln", "activation", "nisp", "elimination", "lasso"])
@pytest.mark.parametrize("name", ["one_by_one", "by_einsum"])
def test_every_method_prunes_experts(name, method):
    model, batch = network(name)
    batches = [torch.randn(16, 4) for _ in range(4)]
    result = ps.prune(model, batches, method=method, amount=0.5, progress=False)
    assert result.model.experts.down.numel() < model.experts.down.numel()
    assert_masked_is_cut(model, result.plan, batch)


@pytest.mark.parametrize("name", KINDS)
def test_channels_and_other_kinds_go_together(name):
    model, batch = network(name)
    batches = [torch.randn(32, 4) for _ in range(4)]
    options = {"progress": False}
    for result in (
        ps.low_rank(model, batches, target={"params": 0.8}, prune=True, layout="factored", **options),
        ps.deep_compress(model, batches, target={"bytes": 0.5}, **options),
    ):
        (got,) = outputs(result.model, batch)
        assert got.isfinite().all()


def test_layers_can_be_gathered_beside_stacks():
    model, batch = network("together")
    found = ps.gather(model, [batch], sites=find_sites(model, batch), progress=False)
    assert "fc" in found
    assert not any(":" in name for name in found)


def test_other_values_are_no_stacks():
    model, batch = network("together")
    for name in ("experts.up:oo", "stem:oi", "experts.lost:oi"):
        site = Site(6, ("stem",), (name,))
        with pytest.raises((LayerNotFoundError, CollapseError)):
            apply(model, Plan((Collapse(site, range(3)),)))
    site = Site(1, ("stem",), ("fc",), ("experts.up:io",))
    with pytest.raises(CollapseError, match="pass none"):
        apply(model, Plan((Collapse(site, range(1)),)))
    del batch


def test_experts_to_be_ignored_stay():
    model, batch = network("together")
    assert not free(find_sites(model, batch, ignore=["experts"]))
