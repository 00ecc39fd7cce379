"""Layers of whole numbers compute what codes and scales say, and round inputs as little as 8 bits allow."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.forms import Integers
from pysolve.methods.goal import Options
from pysolve.methods.result import account
from pysolve.methods.study import Study
from pysolve.nn import QuantConv2d, QuantLinear, to_dense, to_torchao
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.files.architecture import architecture, fingerprint, rebuilt
from pysolve.nn.gathering.calibration import Calibration
from pysolve.nn.layers import quantized
from pysolve.nn.layers.base import answers_of
from pysolve.nn.layers.quantized import multiplies_exactly, restored
from pysolve.nn.layers.runtime import in_form

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": 3, "dilation": (1, 2), "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 0), "padding_mode": "circular"},
}


def nearest(layer, *, dynamic=False):
    """Each output's weights at 8 bits."""
    weight = layer.weight.detach().flatten(1)
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8).reshape(layer.weight.shape)
    return Integers(codes.numpy(), scales.numpy(), dynamic=dynamic)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)).eval()


def images(n=6):
    return torch.randn(n, 2, 9, 8, generator=torch.Generator().manual_seed(1))


def plan_for(model):
    return ps.Plan(forms={f"{name}.weight": nearest(model[name], dynamic=name != 0) for name in (0, 4, 6)})


def compressed():
    model = network()
    plan, batch = plan_for(model), images()
    smaller = ps.apply(model, plan, probe=batch)
    known = Study(model, Options(), calibration=Calibration(0, [batch], [batch]))
    return Compressed(smaller, plan, account(model, smaller, known), (), fingerprint(model))


@st.composite
def forms(draw, dynamic=False):
    """Any codes, with groups that do not divide the inputs, scales over decades."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    h, d = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    bits = draw(st.integers(2, 8))
    group = None if dynamic else draw(st.none() | st.integers(1, d + 2))
    top = 1 << (bits - 1)
    parts = -(-d // (group or d))
    zeros = draw(st.booleans()) and not dynamic
    return Integers(
        rng.integers(-top, top, (h, d), dtype=np.int8),
        (10.0 ** rng.uniform(-3, 1, (h, parts))).astype(np.float32),
        rng.integers(-top, top, (h, parts), dtype=np.int8) if zeros else None,
        bits,
        group,
        dynamic,
    )


@st.composite
def layers_and_rows(draw):
    """A layer that rounds its inputs, and rows of either or both signs, of zeros, and very large or small."""
    form = draw(forms(dynamic=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((draw(st.integers(1, 5)), form.shape[1])).astype(np.float32)
    x *= np.float32(10.0 ** draw(st.integers(-12, 12)))
    sign = draw(st.sampled_from(["both", "positive", "negative", "zero"]))
    x = {"both": x, "positive": np.abs(x), "negative": -np.abs(x), "zero": 0 * x}[sign]
    torch.manual_seed(0)
    return QuantLinear.from_form(linear_of(form), form), x


def linear_of(form, **options):
    return nn.Linear(form.shape[1], form.shape[0], **options)


@given(forms())
def test_the_weight_is_what_the_form_stands_for_bit_for_bit(form):
    layer = QuantLinear.from_form(linear_of(form), form)
    dense = torch.from_numpy(form.dense()).float()
    for weight in (layer.weight, layer.decoded(), to_dense(layer).weight):
        assert torch.equal(weight, dense)
    again = layer.form()
    assert np.array_equal(again.dense(), form.dense())
    assert (again.bits, again.group, again.dynamic) == (form.bits, form.group, form.dynamic)


@given(forms(), st.integers(0, 4))
def test_a_layer_that_does_not_round_is_the_dense_one(form, n):
    layer, x = QuantLinear.from_form(linear_of(form), form), torch.randn(n, 2, form.shape[1])
    dense = to_dense(layer)
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(layer.traced(x), dense(x))
    assert torch.equal(dense.bias, layer.bias)


@given(layers_and_rows())
def test_rounded_inputs_are_multiplied_exactly(case):
    layer, x = case
    with torch.no_grad():
        got = layer(torch.from_numpy(x)).double().numpy()
    codes, scales = layer.codes.numpy().astype(object), layer.scales.detach().numpy().astype(float)
    bias = layer.bias.detach().numpy().astype(float)
    for row, y in zip(x, got, strict=True):
        low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
        width = max((high - low) / np.float32(255), np.finfo(np.float32).tiny)
        middle = low + np.float32(128) * width
        steps = np.rint((row - middle) / width).astype(int)
        assert -128 <= steps.min() <= steps.max() <= 127
        # Whole numbers of any size, and what they stand for in double precision.
        product, sums = (codes @ steps.astype(object)).astype(float), codes.sum(1).astype(float)
        expected = scales[:, 0] * (float(width) * product + float(middle) * sums) + bias
        size = scales[:, 0] * np.abs(codes).sum(1).astype(float) * float(high - low) + np.abs(bias)
        assert np.all(np.abs(y - expected) <= 1e-5 * size)


@given(layers_and_rows())
def test_an_output_is_off_by_half_a_step_of_every_input_at_most(case):
    layer, x = case
    rows = torch.from_numpy(x)
    with torch.no_grad():
        difference = (layer(rows) - to_dense(layer)(rows)).abs().double()
    high, low = rows.amax(1).clamp_min(0), rows.amin(1).clamp_max(0)
    reach = (high - low).double()[:, None] * layer.weight.detach().abs().sum(1).double()
    size = reach + layer.bias.detach().abs().double()
    assert bool((difference <= reach / 510 + 1e-5 * size).all())


@given(layers_and_rows())
def test_it_runs_the_same_where_small_numbers_are_not_multiplied_exactly(case):
    layer, x = case
    rows = torch.from_numpy(x)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        fast = layer(rows)
        patch.setattr(quantized, "multiplies_exactly", lambda: False)
        slow = layer(rows)
        traced = layer.traced(rows)
    size = float(rows.abs().max() * layer.weight.abs().sum(1).max())
    tolerance = 1e-5 * (size + float(layer.bias.detach().abs().max()))
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    torch.testing.assert_close(traced, slow, atol=tolerance, rtol=0)


def test_products_of_small_numbers_are_found_inexact_where_pairs_overflow(monkeypatch):
    def saturating(a, b):
        pairs = (a.int()[:, :, None] * b.int()[None]).reshape(len(a), -1, 2, b.shape[1]).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1).int()

    multiplies_exactly.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not multiplies_exactly()
    multiplies_exactly.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    assert not multiplies_exactly()
    multiplies_exactly.cache_clear()


def test_a_row_of_zeros_gives_the_bias_and_zeros_stay_zeros():
    layer = in_form(nn.Linear(30, 4), nearest(nn.Linear(30, 4), dynamic=True))
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(2, 30)), layer.bias.expand(2, 4))
    x = torch.randn(5, 30).relu()
    assert torch.equal(restored(x) == 0, x < x.amax(1, keepdim=True) / 510)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_its_row_alone(value):
    layer = in_form(nn.Linear(8, 3), nearest(nn.Linear(8, 3), dynamic=True))
    x = torch.randn(3, 8)
    with torch.no_grad():
        clean = layer(x)
        x[1, 2] = value
        got = layer(x)
    assert not bool(got[1].isfinite().any())
    assert torch.equal(got[::2], clean[::2])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 0, 8), (2, 3, 8), (2, 0), (2, 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_of_any_shape_are_taken(shape, dynamic):
    d = shape[-1]
    codes = np.arange(3 * d, dtype=np.int8).reshape(3, d)
    layer = in_form(nn.Linear(d, 3), Integers(codes, np.ones((3, int(d > 0)), np.float32), dynamic=dynamic))
    for x in (torch.randn(shape), torch.randn(shape, requires_grad=True)):
        assert layer(x).shape == (*shape[:-1], 3)


def test_inputs_and_codes_of_any_strides_are_taken():
    dense = nn.Linear(16, 3)
    layer, x = in_form(dense, nearest(dense, dynamic=True)), torch.randn(4, 16)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(layer(x.t().contiguous().t()), y)
        torch.testing.assert_close(layer(x[:1].as_strided((1, 16), (0, 1))), y[:1])
        torch.testing.assert_close(layer(x[:1].as_strided((1, 16), (1, 1))), y[:1])
        layer.codes = layer.codes.t().contiguous().t()
        torch.testing.assert_close(layer(x), y)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_the_dense_one(options):
    dense = nn.Conv2d(4, 8, **options)
    form = nearest(dense)
    layer, x = in_form(dense, form), torch.randn(3, 4, 9, 8)
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(form.dense()))
    for other in (layer, to_dense(layer), layer.traced):
        torch.testing.assert_close(other(x), dense(x))
    assert repr(to_dense(layer)) == repr(dense)
    assert answers_of(layer) == answers_of(dense)
    assert "bits=8" in repr(layer)


def test_gradients_go_to_inputs_scales_and_biases_as_through_the_dense_weight():
    layer = in_form(nn.Linear(12, 5), nearest(nn.Linear(12, 5), dynamic=True)).requires_grad_()
    x, g = torch.randn(4, 12), torch.randn(4, 5)
    layer(x).backward(g)
    by_kernel = [layer.scales.grad.clone(), layer.bias.grad.clone()]
    layer.zero_grad()
    read = x.clone().requires_grad_()
    layer(read).backward(g)
    near = restored(x)
    steps = layer.codes.float()
    by_scales = ((g.T @ near) * steps).sum(1, keepdim=True)
    for found in (by_kernel, [layer.scales.grad, layer.bias.grad]):
        torch.testing.assert_close(found[0], by_scales, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found[1], g.sum(0))
    torch.testing.assert_close(read.grad, g @ layer.weight.detach())


def test_training_scales_moves_the_weight_that_is_kept():
    torch.manual_seed(0)
    layer = in_form(nn.Linear(6, 4), nearest(nn.Linear(6, 4))).requires_grad_()
    x, target = torch.randn(50, 6), torch.randn(50, 4)
    optimizer = torch.optim.SGD([layer.scales], lr=1e-6)
    losses = []
    for _ in range(20):
        with torch.no_grad():
            losses.append(float((layer(x) - target).square().mean()))
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("trained", [True, False])
def test_only_the_bias_is_trained_unless_asked(trained):
    dense = nn.Linear(6, 4).train(trained)
    dense.bias.requires_grad_(trained)
    layer = in_form(dense, nearest(dense))
    assert layer.training == trained
    assert [name for name, one in layer.named_parameters() if one.requires_grad] == ["bias"] * trained
    assert to_dense(layer).bias.requires_grad == trained


def test_the_decoded_weight_is_kept_and_follows_the_state():
    layer, other = (in_form(nn.Linear(6, 4), nearest(nn.Linear(6, 4))) for _ in range(2))
    with torch.no_grad():
        first = layer.in_use()
        assert layer.in_use() is first
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.weight, other.weight)
        layer.double()
        assert layer.weight.dtype == torch.float64
        layer.codes.zero_()
        assert not bool(layer.weight.any())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_states_hold_codes_alone(copied):
    layer = in_form(nn.Linear(60, 40), nearest(nn.Linear(60, 40), dynamic=True))
    with torch.no_grad():
        y = layer(torch.ones(1, 60))
        assert layer.weight.any()
    other = copied(layer)
    assert not other._kept
    assert layer._kept
    with torch.no_grad():
        assert torch.equal(other(torch.ones(1, 60)), y)
    assert {name: value.dtype for name, value in layer.state_dict().items()} == {
        "codes": torch.int8,
        "scales": torch.float32,
        "bias": torch.float32,
    }
    assert len(pickle.dumps(layer)) < 60 * 40 * 2


def test_a_weight_decoded_in_inference_mode_can_take_part_in_training():
    layer = in_form(nn.Linear(6, 4), nearest(nn.Linear(6, 4), dynamic=True)).requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(2, 6))
        assert layer.weight.any()
    x = torch.randn(2, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_a_network_gets_its_layers_from_a_plan():
    model, x = network(), images()
    smaller = ps.apply(model, plan_for(model), probe=x)
    assert [type(smaller[i]) for i in (0, 4, 6)] == [QuantConv2d, QuantLinear, QuantLinear]
    assert smaller[4].dynamic
    with torch.no_grad():
        y, got, exact = model(x), smaller(x), to_dense(smaller)(x)
    assert 0 < (got - exact).norm() < 0.02 * y.norm()
    assert (exact - y).norm() < 0.02 * y.norm()
    assert (parameters(smaller), macs(smaller, x)) == (parameters(model), macs(model, x))
    assert nbytes(smaller) < 0.3 * nbytes(model)


def test_a_bias_from_the_plan_goes_with_the_codes():
    layer = nn.Linear(6, 4, bias=False)
    plan = ps.Plan(values={"0.bias": np.arange(4.0)}, forms={"0.weight": nearest(layer)})
    smaller = ps.apply(nn.Sequential(layer), plan, probe=torch.randn(5, 6))
    assert smaller[0].bias.tolist() == [0, 1, 2, 3]


class Looking(nn.Module):
    """A network whose code tells a Linear from anything else, by a thousandth of its outputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x):
        return self.fc(x) * (1.0 if isinstance(self.fc, nn.Linear) else 1.001)


def test_rounded_inputs_hide_no_mistake_from_the_probe():
    model = Looking()
    plan = ps.Plan(forms={"fc.weight": nearest(model.fc, dynamic=True)})
    with pytest.raises(ps.CollapseError, match="outputs differ"):
        ps.apply(model, plan, probe=torch.randn(5, 6))
    assert ps.apply(model, plan).fc.dynamic


def test_what_cannot_take_the_form_is_told():
    linear, conv = nn.Linear(6, 4), nn.Conv2d(2, 3, 1)
    with pytest.raises(ps.CollapseError, match=r"0\.weight cannot take .*shape \(4, 6\), got \(4, 5\)"):
        ps.apply(nn.Sequential(linear), ps.Plan(forms={"0.weight": nearest(nn.Linear(5, 4))}))
    with pytest.raises(ps.CollapseError, match="only Linear and Conv2d have a form of integers, got Conv1d"):
        ps.apply(nn.Sequential(nn.Conv1d(2, 3, 1)), ps.Plan(forms={"0.weight": nearest(nn.Conv1d(2, 3, 1))}))
    with pytest.raises(ps.PysolveError, match="dynamic=False"):
        in_form(conv, nearest(conv, dynamic=True))
    with pytest.raises(ps.DataError, match="one scale for each output"):
        Integers(np.zeros((2, 4), np.int8), np.ones((2, 2), np.float32), group=2, dynamic=True)


def test_files_give_the_layers_back_bit_for_bit(tmp_path):
    result, x = compressed(), images()
    ps.save(result, tmp_path / "network")
    again = ps.load(tmp_path / "network", network())
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert [again[4].dynamic, again[6].dynamic] == [True, True]
    for name, value in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@given(forms())
def test_a_record_tells_bits_groups_and_zeros(form):
    model = nn.Sequential(linear_of(form))
    plan = ps.Plan(forms={"0.weight": form})
    record = architecture(Compressed(ps.apply(model, plan), plan, None, (), fingerprint(model)))
    again = rebuilt(record, model)[0].form()
    assert (again.bits, again.dynamic) == (form.bits, form.dynamic)
    assert again.group == (form.group if form.scales.shape[1] > 1 else None)
    assert again.scales.shape == form.scales.shape
    assert (again.zeros is None) == (form.zeros is None)


@pytest.mark.parametrize(
    ("name", "bits", "told"),
    [
        ("4", [9, 0, 0, 1], "2 … 8 bits"),
        ("4", [8, 97, 0, 0], "groups of up to 96 inputs, got 97"),
        ("4", [8, 10**30, 0, 0], "groups of up to 96 inputs"),
        ("4", [8, -1, 0, 0], "got -1"),
        ("4", [8, 2, 0, 1], "one scale for each output"),
        ("4", [8, 0, 0], "got 3 numbers"),
        ("4", [8, 0, 0, True], "an integer"),
        ("4", "8", "a list"),
        ("1", [8, 0, 0, 0], "no form of integers"),
        ("9", [8, 0, 0, 0], "no layer '9'"),
    ],
)
def test_records_that_fit_no_network_are_refused(name, bits, told):
    record = architecture(compressed()) | {"quantized": {name: bits}}
    with pytest.raises(ps.PysolveError, match=told):
        rebuilt(record, network())


def test_a_network_is_pruned_after_it_was_quantised(tmp_path):
    result, x = compressed(), images()
    dense = Compressed(to_dense(result.model), result.plan, result.report, (), result.fingerprint)
    pruned = ps.prune(dense, [x], amount=0.5, progress=False)
    ps.save(pruned, tmp_path / "network")
    again = ps.load(tmp_path / "network", network())
    with torch.no_grad():
        assert torch.equal(again(x), pruned.model(x))


def test_a_program_needs_nothing_of_this_package_and_holds_codes():
    model, x = compressed().model, images()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        for batch in (x, x[:2]):
            torch.testing.assert_close(program.module()(batch), model(batch), atol=1e-5, rtol=1e-4)
    held = {**program.state_dict, **program.constants}
    assert sum(tensor.nbytes for tensor in held.values()) < 0.35 * nbytes(network())
    assert not any("pysolve" in str(node.target) for node in program.graph.nodes)


def test_torchao_runs_the_same_codes():
    pytest.importorskip("torchao", minversion="0.18")
    if not multiplies_exactly():
        pytest.skip("torchao's products overflow on this processor")
    model, x = compressed().model, images()
    other = to_torchao(model)
    assert type(other[4]) is nn.Linear
    assert torch.equal(other[4].weight.qdata, model[4].codes)
    assert type(other[0]) is QuantConv2d
    with torch.no_grad():
        y = to_dense(model)(x)
        assert 0 < (other(x) - y).norm() < 0.03 * y.norm()


def test_torchao_takes_only_layers_that_round():
    with pytest.raises(ps.PysolveError, match="to_dense"):
        in_form(nn.Linear(6, 4), nearest(nn.Linear(6, 4))).to_torchao()


def test_without_torchao_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'pysolve-compress\[quant\]'"):
        to_torchao(compressed().model)
