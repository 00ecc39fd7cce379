"""What gather sums up is what a direct NumPy computation gives, and the network is left as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import relu

from pysolve.correlations import Correlations
from pysolve.errors import DataError, LayerNotFoundError, PysolveError
from pysolve.nn.gather import gather
from pysolve.nn.zoo import Mlp
from pysolve.plan import Site

NAMES = ("xx", "yx", "yy", "x_sum", "y_sum")


def mlp(sizes=(5, 7, 3), seed=0):
    torch.manual_seed(seed)
    return Mlp(sizes)


def inputs(n=20, d=5, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(a, b, rtol=1e-6):
    assert a.count == b.count
    for name in NAMES:
        wanted = getattr(b, name)
        np.testing.assert_allclose(getattr(a, name), wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def direct(layer, x):
    """The same sums from all samples at once, float64."""
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        return Correlations.from_samples(rows.double().numpy(), layer(rows).double().numpy())


@given(st.integers(0, 1000), st.lists(st.integers(1, 19), max_size=4, unique=True))
def test_any_split_into_batches_gives_the_direct_sums(seed, cuts):
    model, x = mlp(seed=seed), inputs(seed=seed)
    found = gather(model, x.tensor_split(sorted(cuts)))
    with torch.no_grad():
        assert_same(found["fc1"], direct(model.fc1, x))
        assert_same(found["fc2"], direct(model.fc2, relu(model.fc1(x))))


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 9))
def test_sums_are_exactly_symmetric(seed, n, d):
    found = gather(mlp((d, 4, 2), seed), [inputs(n, d, seed)])
    for correlations in found.values():
        np.testing.assert_array_equal(correlations.xx, correlations.xx.T)
        np.testing.assert_array_equal(correlations.yy, correlations.yy.T)
        assert correlations.xx.dtype == np.float64


def test_products_are_float64():
    x = torch.tensor([[1.0, 1.0], [1e-6, 1.0]])
    found = gather(nn.Sequential(nn.Linear(2, 1)), [x])["0"]
    exact = x.double().numpy()
    np.testing.assert_array_equal(found.xx, exact.T @ exact)
    assert found.xx[0, 0] > 1.0


@pytest.mark.parametrize("shape", [(6, 3, 5), (2, 3, 4, 5)])
def test_leading_dimensions_are_samples(shape):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(shape)
    found = gather(model, [x])["0"]
    assert found.count == x.numel() // 5
    assert_same(found, direct(model[0], x))


def test_one_unbatched_input_is_one_sample():
    assert gather(nn.Sequential(nn.Linear(5, 4)), [torch.ones(5)])["0"].count == 1


class Tokens(nn.Module):
    """Keyword arguments only, as language models have them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, input_ids, scale=1.0, mask=None):
        return {"logits": self.head(input=self.embed(input_ids) * scale)}


def test_batches_may_be_tensors_tuples_lists_or_mappings():
    model, x, labels = mlp(), inputs(), torch.zeros(20)
    expected = gather(model, [x])["fc2"]
    for batch in ((x, labels), [x, labels], {"x": x}, ({"x": x}, labels)):
        assert_same(gather(model, [batch])["fc2"], expected, rtol=0)
    ids = torch.arange(10).reshape(2, 5)
    found = gather(Tokens(), [{"input_ids": ids, "scale": 2.0, "mask": None}])
    assert found["head"].count == 10


def test_a_generator_and_a_data_loader_are_batches_too():
    model, x = mlp(), inputs()
    expected = gather(model, [x])["fc1"]
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(20))
    assert_same(gather(model, (part for part in x.split(6)))["fc1"], expected)
    assert_same(gather(model, torch.utils.data.DataLoader(dataset, batch_size=6))["fc1"], expected)


def test_layers_and_sites_choose_what_is_gathered():
    model, x = mlp((5, 7, 3, 2)), [inputs()]
    assert list(gather(model, x)) == ["fc1", "fc2", "fc3"]
    assert list(gather(model, x, layers=["fc3", "fc1", "fc3"])) == ["fc3", "fc1"]
    sites = [Site(7, ("fc1",), ("fc2",)), Site(3, ("fc2",), ("fc3",))]
    assert list(gather(model, x, sites)) == ["fc2", "fc3"]
    assert list(gather(model, x, sites[:1], ["fc1"])) == ["fc1", "fc2"]


class Shared(nn.Module):
    """One layer that is called twice and has two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_every_call_of_a_shared_layer_counts():
    torch.manual_seed(0)
    model, x = Shared(), inputs()
    with torch.no_grad():
        both = direct(model.first, x) + direct(model.first, torch.tanh(model.first(x)))
    assert_same(gather(model, [x])["first"], both)
    found = gather(model, [x], layers=["first", "second"])
    assert_same(found["second"], both)
    paired = gather(model, [x], layers=["first"], target_model=model)
    assert_same(paired["first"], both)


def test_targets_come_from_the_target_network():
    model, target, x = mlp(seed=1), mlp(seed=2), inputs()
    found = gather(model, [(x,)], layers=["fc2"], target_model=target)["fc2"]
    with torch.no_grad():
        read, wanted = relu(model.fc1(x)), target(x)
    assert_same(found, Correlations.from_samples(read.double().numpy(), wanted.double().numpy()))


def test_targets_are_taken_before_a_layer_changes_them_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = inputs()
    with torch.no_grad():
        wanted = model[0](x)
    assert_same(
        gather(model, [x], layers=["0"], target_model=model)["0"],
        Correlations.from_samples(x.double().numpy(), wanted.double().numpy()),
    )


def test_networks_that_share_layers_do_not_hear_each_other():
    torch.manual_seed(0)
    model, x = mlp(), inputs()
    target = nn.Module()
    target.fc1, target.fc2 = model.fc1, nn.Linear(7, 3)
    target.forward = lambda x: target.fc2(relu(target.fc1(x)))
    found = gather(model, [x], target_model=target)
    assert found["fc1"].count == found["fc2"].count == 20
    assert_same(found["fc1"], direct(model.fc1, x))


class Calls(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.fc, self.times = nn.Linear(5, 5), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.fc(x)
        return x


@pytest.mark.parametrize(("times", "target"), [(2, 1), (1, 2)])
def test_both_networks_must_call_a_layer_equally_often(times, target):
    with pytest.raises(PysolveError, match="fc is called more often"):
        gather(Calls(times), [inputs()], target_model=Calls(target))


def test_both_networks_must_see_the_same_samples():
    half = nn.Sequential(nn.Linear(5, 5))
    half.register_forward_pre_hook(lambda module, args: (args[0][:10],))
    with pytest.raises(PysolveError, match="the same samples"):
        gather(nn.Sequential(nn.Linear(5, 5)), [inputs()], target_model=half)


def test_positions_keeps_a_share_of_the_rows_and_always_the_same():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)), torch.randn(8, 25, 5)
    first, again = (gather(model, x.split(4), positions=0.1) for _ in range(2))
    assert first["0"].count == first["1"].count == 20
    assert_same(first["0"], again["0"], rtol=0)
    assert gather(model, [x[:, 0]], positions=0.1)["0"].count == 8
    assert gather(model, [x[:1, :1]], positions=0.1)["0"].count == 1


def test_positions_pairs_inputs_with_their_own_outputs():
    torch.manual_seed(0)
    model, target = (nn.Sequential(nn.Linear(5, 5, bias=False)) for _ in range(2))
    for other in (None, target):
        found = gather(model, [torch.randn(8, 25, 5)], positions=0.2, target_model=other)["0"]
        weight = (other or model)[0].weight.detach().double().numpy()
        np.testing.assert_allclose(found.yx, weight @ found.xx, atol=1e-5 * np.abs(found.xx).max())


def test_modes_come_back_and_hooks_go():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()
    gather(model, [inputs()])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks for module in model.modules())


def test_modes_come_back_and_hooks_go_after_an_error_too():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()

    def batches():
        yield inputs()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        gather(model, batches(), target_model=model)
    with pytest.raises(RuntimeError):
        gather(model, [torch.ones(3, 9)])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks for module in model.modules())


def test_evaluation_mode_is_used_and_nothing_is_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = inputs()
    original = x.clone()
    first, again = (gather(model, [x])["3"] for _ in range(2))
    assert_same(first, again, rtol=0)
    assert torch.equal(x, original)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_networks_are_summed_in_float64():
    model = mlp().to(torch.bfloat16)
    found = gather(model, [inputs(dtype=torch.bfloat16)])["fc1"]
    assert_same(found, direct(model.fc1, inputs(dtype=torch.bfloat16)))


def test_no_batches_or_empty_batches_are_data_errors():
    used = iter([inputs()])
    gather(mlp(), used)
    for nothing in ([], used):
        with pytest.raises(DataError, match="there are no batches"):
            gather(mlp(), nothing)
    with pytest.raises(DataError, match="fc1 saw no samples"):
        gather(mlp(), [torch.zeros(0, 5)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_data_errors_naming_the_layer(bad):
    x = inputs()
    x[3, 2] = bad
    with pytest.raises(DataError, match="inputs of fc1 hold NaN or infinity"):
        gather(mlp(), [inputs(), x])
    model = mlp()
    with torch.no_grad():
        model.fc2.bias[0] = bad
    with pytest.raises(DataError, match="outputs of fc2"):
        gather(model, [inputs()])


def test_opposite_infinities_do_not_cancel():
    x = inputs()
    x[0, 0], x[1, 0] = float("inf"), -float("inf")
    with pytest.raises(DataError, match="inputs of fc1"):
        gather(mlp(), [x])


def test_an_unknown_layer_brings_up_the_close_names():
    with pytest.raises(LayerNotFoundError, match=r"Mlp has no layer 'fc_2': did you mean 'fc2'"):
        gather(mlp(), [inputs()], layers=["fc_2"])
    with pytest.raises(LayerNotFoundError, match="named_modules"):
        gather(mlp(), [inputs()], layers=["transformer"])
    with pytest.raises(LayerNotFoundError):
        gather(mlp(), [inputs()], target_model=mlp((5, 3)))


def test_a_layer_that_is_not_linear_is_named_with_its_type():
    with pytest.raises(PysolveError, match="1 is a ReLU"):
        gather(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), [inputs()], layers=["1"])


def test_a_network_without_linear_layers_is_refused():
    with pytest.raises(PysolveError, match="no layer to gather"):
        gather(nn.Sequential(nn.ReLU()), [inputs()])
    with pytest.raises(PysolveError, match="no layer to gather"):
        gather(mlp(), [inputs()], layers=[])


def test_a_layer_that_never_runs_is_named():
    model = mlp()
    model.spare = nn.Linear(2, 2)
    model.children = lambda: iter([model.fc1, model.fc2])
    with pytest.raises(PysolveError, match="spare was never called"):
        gather(model, [inputs()])
    assert list(gather(model, [inputs()], layers=["fc1"])) == ["fc1"]


def test_the_projection_that_attention_never_calls_is_left_out():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.attend(x, x, x)[0])

    assert list(gather(Attention(), [torch.randn(2, 4, 6)])) == ["head"]


def test_a_batch_on_another_device_is_refused_with_both_devices():
    stranger = torch.zeros(4, 5, device="meta")
    with pytest.raises(ValueError, match=r"batch is on meta, but the network is on cpu: pass device='cpu'"):
        gather(mlp(), [stranger])
    with pytest.raises(ValueError, match="move the network there first"):
        gather(mlp(), [inputs()], device="meta")


def test_a_device_moves_the_batches():
    class Far(torch.Tensor):
        """A tensor that notes where it is moved to."""

        moved = ()

        def to(self, *args, device=None, **kwargs):
            Far.moved = (*Far.moved, device)
            return self.as_subclass(torch.Tensor).to(*args, device=device, **kwargs)

    gather(mlp(), [inputs().as_subclass(Far), {"x": inputs().as_subclass(Far)}], device="cpu")
    assert Far.moved == ("cpu", "cpu")


@pytest.mark.parametrize("batch", ["text", 3, (), np.ones((2, 5)), None])
def test_other_batches_are_refused_with_the_accepted_forms(batch):
    with pytest.raises(TypeError, match="a batch must be a tensor"):
        gather(mlp(), [batch])


def test_one_batch_in_place_of_batches_is_refused():
    for batch in (inputs(), {"x": inputs()}):
        with pytest.raises(TypeError, match="wrap it in a list"):
            gather(mlp(), batch)
    with pytest.raises(TypeError, match="'fc1'"):
        gather(mlp(), [inputs()], layers="fc1")


@pytest.mark.parametrize("positions", [0.0, -1.0, 1.5, float("nan")])
def test_positions_must_be_a_share(positions):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        gather(mlp(), [inputs()], positions=positions)
