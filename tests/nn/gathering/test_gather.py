"""What gather sums up is what a direct NumPy computation gives, and the network is left as it was."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import relu, unfold

from pysolve.correlations import Correlations
from pysolve.errors import DataError, LayerNotFoundError, PysolveError
from pysolve.nn.gathering.gather import gather
from pysolve.nn.zoo import LeNet5, Mlp
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
    with pytest.raises(DataError, match="itself refuses the batch"):
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


def test_a_layer_that_has_no_matrix_is_named_with_its_type():
    with pytest.raises(PysolveError, match="1 is a ReLU; gather handles Linear layers and convolutions"):
        gather(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), [inputs()], layers=["1"])


def test_grouped_convolutions_are_left_out_unless_named_and_then_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    images = torch.zeros(2, 2, 8, 8)
    assert list(gather(model, [images])) == ["0", "2"]
    with pytest.raises(PysolveError, match=r"1 is a grouped Conv2d \(groups=4\)"):
        gather(model, [images], layers=["1"])


def test_a_network_without_layers_to_gather_for_is_refused():
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


@pytest.mark.parametrize("how", [{}, {"add_bias_kv": True}])
def test_the_projection_that_attention_never_calls_is_left_out(how):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(6, 2, batch_first=True, **how), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.attend(x, x, x)[0])

    names = list(gather(Attention(), [torch.randn(2, 4, 6)]))
    # With a layer for each projection, all of them run.
    assert names == ["head"] if how else [f"attend.{one}_proj" for one in ("q", "k", "v", "out")] + ["head"]


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


def images(n=6, channels=2, size=7, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def patches_of(conv, x):
    """Samples in rows of a zero-padded convolution, float64, by torch's unfold."""
    columns = unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return columns.transpose(1, 2).flatten(0, 1).double().numpy()


def rows_of(y):
    return y.detach().movedim(1, -1).flatten(0, -2).double().numpy()


@pytest.mark.parametrize("sites", ["fc1", ["fc1"], Site(2, ("a",), ("b",))])
def test_what_is_no_list_of_sites_is_refused(sites):
    with pytest.raises(TypeError, match=r"sites must be a list of Site, got .*; names of layers are layers="):
        gather(nn.Linear(3, 2), [torch.zeros(4, 3)], sites)


@given(st.integers(0, 1000), st.lists(st.integers(1, 5), max_size=3, unique=True))
def test_a_convolution_reads_the_patches_of_its_padded_input(seed, cuts):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kernel, stride, padding = rng.integers(1, 4), rng.integers(1, 3), rng.integers(0, 3)
    conv = nn.Conv2d(2, 3, int(kernel), int(stride), int(padding), dilation=int(rng.integers(1, 3)))
    x = images(seed=seed)
    found = gather(nn.Sequential(conv), x.tensor_split(sorted(cuts)))["0"]
    group_size = conv.kernel_size[0] * conv.kernel_size[1]
    assert found.group_size == group_size
    assert_same(
        found, Correlations.from_samples(patches_of(conv, x), rows_of(conv(x)), group_size=group_size)
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 3, padding=2, padding_mode="replicate"),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Conv3d(2, 3, (1, 2, 3), stride=2, padding=1),
        nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1),
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
    ],
    ids=repr,
)
def test_least_squares_on_centred_correlations_gives_weight_and_bias_back(layer):
    torch.manual_seed(0)
    layer, shape = layer.double(), (40, 2, 9, 5, 5)[: layer.weight.ndim]
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([5.0, -3.0, 1.0]))
    x = 2.0 + torch.randn(shape, dtype=torch.float64)
    found = gather(nn.Sequential(layer), x.split(16))["0"]
    centred = found.centered()
    M = np.linalg.lstsq(centred.xx, centred.yx.T)[0].T
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    np.testing.assert_allclose(M, weight.flatten(1).numpy(), atol=1e-9)
    np.testing.assert_allclose(found.bias(M), layer.bias.detach().numpy(), atol=1e-9)


def test_one_image_without_a_batch_is_one_sample():
    conv, x = nn.Conv2d(2, 3, 3), images(1)
    assert_same(gather(nn.Sequential(conv), [x[0]])["0"], gather(nn.Sequential(conv), [x])["0"], rtol=0)


def test_all_layers_of_lenet_are_gathered_with_their_groups():
    torch.manual_seed(0)
    model, x = LeNet5(), torch.randn(3, 1, 28, 28)
    found = gather(model, [x])
    assert {name: c.yx.shape for name, c in found.items()} == {
        "conv1": (20, 25),
        "conv2": (50, 500),
        "fc1": (500, 800),
        "fc2": (10, 500),
    }
    assert [c.group_size for c in found.values()] == [25, 25, 1, 1]
    assert [c.count for c in found.values()] == [3 * 24 * 24, 3 * 8 * 8, 3, 3]
    sites = [Site(50, ("conv2",), ("fc1",)), Site(20, ("conv1",), ("conv2",))]
    assert {name: c.group_size for name, c in gather(model, [x], sites).items()} == {"fc1": 16, "conv2": 25}


def test_group_size_is_that_of_the_site_only_where_its_channels_are_all_inputs_in_order():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.zeros(4, 6)

    def group_size(*sites):
        return gather(model, [x], sites, ["0"])["1"].group_size

    turned, part = np.arange(6).reshape(2, 3).T, np.arange(4).reshape(2, 2)
    assert group_size(Site(2, ("0",), ("1",))) == 3
    assert group_size(Site(2, ("0",), ("1",), columns={"1": turned.T})) == 3
    assert group_size(Site(3, ("0",), ("1",), columns={"1": turned})) == 1
    assert group_size(Site(2, ("0",), ("1",), columns={"1": part})) == 1
    with pytest.raises(ValueError, match="1 has 6 channels, which are no multiple of the site's 4"):
        group_size(Site(4, ("0",), ("1",)))


def test_positions_keeps_a_share_of_the_patches_and_always_the_same():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3)), images(8, size=10)
    first, again = (gather(model, x.split(4), positions=0.1) for _ in range(2))
    assert [first["0"].count, first["1"].count] == [80, 2 * round(0.1 * 4 * 64)]
    assert_same(first["0"], again["0"], rtol=0)
    everything = gather(model, x.split(4))
    assert not np.allclose(first["0"].r_xx, everything["0"].r_xx)
    assert gather(model, [x[:1, :, :3, :3]], positions=0.01)["1"].count == 1


def test_each_call_draws_its_own_positions():
    conv, x = nn.Conv2d(1, 1, 1), torch.arange(100.0).reshape(1, 1, 10, 10)
    once = gather(nn.Sequential(conv), [x], positions=0.1)["0"]
    twice = gather(nn.Sequential(conv), [x, x], positions=0.1)["0"]
    assert twice.count == 2 * once.count
    assert twice.x_sum != 2 * once.x_sum


@pytest.mark.parametrize("target", [None, nn.Conv2d(2, 3, 3, padding=1, bias=False)])
def test_positions_pairs_patches_with_their_own_outputs(target):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False))
    other = None if target is None else nn.Sequential(target)
    found = gather(model, [images()], positions=0.2, target_model=other)["0"]
    weight = (other or model)[0].weight.detach().flatten(1).double().numpy()
    np.testing.assert_allclose(found.yx, weight @ found.xx, atol=1e-5 * np.abs(found.xx).max())


def test_a_convolutions_targets_are_taken_before_a_layer_changes_them_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))
    x = images()
    wanted = rows_of(other[0](x))
    found = gather(model, [x], layers=["0"], target_model=other)["0"]
    assert_same(found, Correlations.from_samples(patches_of(model[0], x), wanted, group_size=9))


def test_both_networks_must_write_equally_many_positions():
    model, target = nn.Sequential(nn.Conv2d(2, 3, 3)), nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    with pytest.raises(PysolveError, match="the same samples"):
        gather(model, [images()], target_model=target)


def test_every_call_of_a_shared_convolution_counts():
    conv, x = nn.Conv2d(2, 2, 3), images()
    read = np.concatenate([patches_of(conv, x), patches_of(conv, conv(x).detach())])
    written = np.concatenate([rows_of(conv(x)), rows_of(conv(conv(x)))])
    found = gather(nn.Sequential(conv, conv), [x])["0"]
    assert_same(found, Correlations.from_samples(read, written, group_size=9))


def test_values_that_are_not_finite_in_an_image_are_data_errors():
    x = images()
    x[1, 0, 3, 3] = float("nan")
    with pytest.raises(DataError, match="inputs of 0 hold NaN"):
        gather(nn.Sequential(nn.Conv2d(2, 3, 3)), [x])
    with pytest.raises(DataError, match="0 saw no samples"):
        gather(nn.Sequential(nn.Conv2d(2, 3, 3)), [x[:0]])


def test_a_convolution_that_pads_by_itself_is_gathered_over_what_it_pads():
    class Same(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    layer = Same(2, 3, 3, stride=2)
    plain = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 3, 3, stride=2))
    plain[1].load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 6, 6)
    by_itself = gather(nn.Sequential(layer), [x], progress=False)["0"]
    before_it = gather(plain, [x], progress=False)["1"]
    np.testing.assert_array_equal(by_itself.xx, before_it.xx)
    np.testing.assert_array_equal(by_itself.yx, before_it.yx)
