"""Residual branches go whole where that loses least, or where that is told, and leave the best constant."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pysolve as ps
from pysolve.errors import PysolveError
from pysolve.nn.cost.counting import macs
from pysolve.nn.divergence import kl_divergence
from pysolve.nn.evaluate import nbytes, parameters

QUIET = {"progress": False, "latency": False}
WIDTH = 8


class Block(nn.Module):
    """x + f(norm x), of which ``share`` of f's output depends on x."""

    def __init__(self, inner, share=1.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.down.weight.data *= share

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Residual(nn.Sequential):
    """The second of three branches hardly depends on the input."""

    def __init__(self):
        torch.manual_seed(0)
        blocks = Block(12), Block(16, 1e-3), Block(12)
        super().__init__(nn.Linear(4, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))


class Images(nn.Sequential):
    """Two blocks of a residual network."""

    def __init__(self):
        torch.manual_seed(0)

        class Basic(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
                self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

            def forward(self, x):
                y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
                y += x
                return F.relu(y)

        stem, head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)
        super().__init__(stem, Basic(), Basic(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        for norm in (one for one in self.modules() if isinstance(one, nn.BatchNorm2d)):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)


def data(count=8, *shape):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(64, *(shape or (4,)), generator=random) for _ in range(count)]


def network():
    return Residual().eval()


def kept(result):
    return {line.name.split(" ")[0]: line.kept for line in result.report.sites if line.pinned is None}


@settings(max_examples=8)
@given(
    st.sets(st.sampled_from(["1.up", "2.up", "3.up"])),
    st.sampled_from(["sequential", "independent", "bias", "none"]),
)
def test_branches_that_are_told_to_go_are_gone(names, refit):
    model, batches = network(), data()
    result = ps.compress(model, batches, keep=dict.fromkeys(names, 0), refit=refit, **QUIET)
    assert {name for name, count in kept(result).items() if not count} == names
    for name in names:
        block = result.model.get_submodule(name.partition(".")[0])
        assert isinstance(block.norm, nn.Identity)
        assert [*block.state_dict()] == ["down.bias"]
    # What the report says is what is there.
    after = result.report.after
    assert after["params"] == parameters(result.model)
    assert after["macs"] == macs(result.model, batches[0][:1])
    assert after["bytes"] == nbytes(result.model)


def test_the_constant_is_the_mean_of_what_went():
    model, batches = network(), data()
    result = ps.compress(model, batches, keep={"3.up": 0}, refit="independent", **QUIET)
    seen = []
    handle = model[3].down.register_forward_hook(lambda _, given, output: seen.append(output))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    mean = torch.cat(seen).mean(0)
    # An eighth of the samples is held out.
    torch.testing.assert_close(result.model[3].down.bias.detach(), mean, rtol=0.1, atol=0.02)


def test_a_branch_that_does_nothing_goes_within_a_target():
    model, batches = network(), data()
    result = ps.compress(model, batches, target={"macs": 0.6}, **QUIET)
    assert kept(result)["2.up"] <= 1
    line = next(line for line in result.report.sites if line.name.startswith("2.up"))
    assert line.measured is not None
    assert result.report.divergence < 1e-3


def test_all_branches_may_go_within_a_target():
    model, batches = network(), data()
    least = ps.compress(model, batches, target={"macs": 0.08}, **QUIET)
    assert sum(kept(least)[name] for name in ("1.up", "2.up", "3.up")) <= 2
    assert least.report.after["macs"] <= 0.08 * least.report.before["macs"]


def test_the_divergence_of_nothing_is_measured_alone():
    model, batches = network(), data()
    study = ps.study(model, batches, progress=False)
    result = ps.compress(model, study, target={"macs": 0.08}, **QUIET)
    gone = [line for line in result.report.sites if line.kept == 0]
    assert gone
    for line in gone:
        alone = ps.compress(model, study, keep={line.name.split(" ")[0]: 0}, refit="independent", **QUIET)
        held = torch.cat([*study.held])
        with torch.no_grad():
            wanted = float(kl_divergence(model(held), alone.model(held)))
        assert line.measured == pytest.approx(wanted, rel=0.05, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "shape", "names"),
    [(Residual, (4,), ("1.up", "3.up")), (Images, (3, 8, 8), ("1.conv1", "2.conv1"))],
)
def test_files_bring_them_back_bit_for_bit(make, shape, names, tmp_path):
    model, batches = make().eval(), data(8, *shape)
    result = ps.compress(model, batches, keep=dict.fromkeys(names, 0), **QUIET)
    ps.save(result, tmp_path / "small.safetensors")
    again = ps.load(tmp_path / "small.safetensors", make().eval())
    with torch.no_grad():
        torch.testing.assert_close(again(batches[0]), result.model(batches[0]), rtol=0, atol=0)
    assert again.state_dict().keys() == result.model.state_dict().keys()


def test_convolutions_leave_a_block_that_adds_a_constant():
    model, batches = Images().eval(), data(8, 3, 8, 8)
    result = ps.compress(model, batches, keep={"2.conv1": 0}, **QUIET)
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        y = result.model[2](x)
    torch.testing.assert_close(y, F.relu(x + result.model[2].bn2.bias.detach().reshape(-1, 1, 1)))


def test_channels_in_front_of_a_branch_s_last_ones_go_along():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 9), nn.Linear(9, 7), nn.Linear(7, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + self.third(F.relu(self.second(F.relu(self.first(x))))))

    torch.manual_seed(0)
    result = ps.compress(Deep().eval(), data(), keep={"second": 0}, **QUIET)
    assert kept(result) == {"first": 0, "second": 0}
    assert [*dict(result.model.named_parameters())] == ["third.bias", "head.weight", "head.bias"]
    with pytest.raises(ValueError, match="one channel must stay"):
        ps.compress(Deep().eval(), data(), keep={"first": 0}, **QUIET)


def test_what_follows_makes_up_for_a_branch():
    model, batches = network(), data()
    apart, after = (
        ps.compress(model, batches, keep={"1.up": 0}, refit=refit, **QUIET).report.divergence
        for refit in ("independent", "sequential")
    )
    assert after < apart


@pytest.mark.parametrize("widths", ["per_layer", "uniform"])
def test_one_channel_stays_where_it_must(widths):
    with pytest.raises(ValueError, match="one channel must stay"):
        ps.compress(network(), data(), keep={"0": 0}, widths=widths, **QUIET)


def test_branches_that_are_told_to_go_leave_the_others_one_width_and_no_constant():
    model = network()
    with torch.no_grad():
        for block in (model[1], model[2], model[3]):
            block.down.bias = None
    keep = {"2.up": 0, "1.up": 0.5}
    result = ps.compress(model, data(), keep=keep, widths="uniform", **QUIET)
    assert (kept(result)["1.up"], kept(result)["2.up"], kept(result)["3.up"]) == (6, 0, 6)
    assert not result.model[2].down.bias.any()
    assert result.model[1].down.bias is None


def test_a_share_of_all_sites_never_takes_branches():
    result = ps.compress(network(), data(), keep=0.01, **QUIET)
    assert min(kept(result).values()) == 1
    with pytest.raises(ValueError, match="must be positive"):
        ps.compress(network(), data(), keep=0, **QUIET)


@pytest.mark.parametrize(
    "verb",
    [
        lambda *given: ps.low_rank(*given, target={"params": 0.2}, prune=True, layout="factored", **QUIET),
        lambda *given: ps.deep_compress(*given, target={"bytes": 0.25}, progress=False),
        lambda *given: ps.prune(*given, method="elimination", amount=0.9, **QUIET),
        lambda *given: ps.compress(*given, target={"params": 0.2}, widths="uniform", **QUIET),
        lambda *given: ps.compress(*given, lam=1e3, **QUIET),
    ],
)
def test_other_verbs_leave_one_channel(verb):
    result = verb(network(), data())
    assert all(
        isinstance(result.model[i].up, nn.Linear) or hasattr(result.model[i].up, "rank") for i in (1, 2, 3)
    )


def test_a_network_without_branches_can_be_made_smaller_again(tmp_path):
    batches = data()
    first = ps.compress(network(), batches, keep={"2.up": 0}, **QUIET)
    second = ps.compress(first, batches, target={"macs": 0.6}, **QUIET)
    assert second.report.after["macs"] <= 0.6 * second.report.before["macs"]
    ps.save(second, tmp_path / "small.safetensors")
    again = ps.load(tmp_path / "small.safetensors", network())
    with torch.no_grad():
        torch.testing.assert_close(again(batches[0]), second.model(batches[0]), rtol=0, atol=0)
    integers = ps.quantize(first, batches, scheme="int8", progress=False)
    assert isinstance(integers.model[2].up, type(first.model[2].up))


def test_it_can_be_copied_exported_and_trained_on():
    model, batches = network(), data()
    result = ps.compress(model, batches, keep={"2.up": 0, "1.up": 3}, **QUIET)
    x = batches[0]
    with torch.no_grad():
        wanted = result.model(x)
        program = torch.export.export(result.model, (x,))
        torch.testing.assert_close(program.module()(x), wanted)
        torch.testing.assert_close(copy.deepcopy(result.model)(x), wanted, rtol=0, atol=0)
    ps.distill(result.model, model, batches, epochs=1, progress=False)
    assert np.isfinite(result.report.divergence)


def test_folders_of_transformers_say_what_is_missing(tmp_path):
    transformers = pytest.importorskip("transformers")
    import families

    torch.manual_seed(0)
    model, _ = families.llama(transformers)
    batches = [{"input_ids": torch.randint(30, (8, 10))} for _ in range(6)]
    result = ps.compress(model.eval(), batches, keep={"model.layers.1.mlp.up_proj": 0}, **QUIET)
    with pytest.raises(PysolveError, match=r"model\.layers\.1, one of whose branches is gone"):
        ps.save_pretrained(result, tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
    assert ps.save_pretrained(result, tmp_path / "own", stock=False).difference == 0
