"""Refitted front to back, a network loses nothing that can be kept; and what follows each layer is known."""

from itertools import pairwise
from math import inf

import numpy as np
import pytest
import torch
from graphs import traced as trace
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import Net, divided, images, network, vectors
from torch import nn
from torch.nn.functional import max_pool2d, relu

from pysolve.correlations import group_columns
from pysolve.methods.tasks import cuts_of
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.gathering.gather import gather
from pysolve.nn.graph.branches import Kept, Layer, find_layers, layer_values
from pysolve.nn.graph.calls import operator_name
from pysolve.nn.graph.labels import label_channels
from pysolve.nn.graph.sites import sites_of
from pysolve.nn.layer_matrix import channels, matrix, taps
from pysolve.nn.refit import layer_refit, lockstep
from pysolve.nn.refit.layer_refit import Sampling
from pysolve.nn.running import evaluating, forward
from pysolve.plan import Collapse, Plan
from pysolve.solve.least_squares import refit as least_squares

ALL_ROWS = 10**6


def nearly(model, cuts, ridge=1e-9):
    """Least squares, with so little of a ridge that only what is not determined keeps its old weights."""

    def fit(name, correlations, intercept):
        module = model.get_submodule(name)
        prior = matrix(module).double().numpy()
        if name in cuts:
            columns = group_columns(cuts[name].inputs, taps(module))
            prior = prior[:, columns][cuts[name].outputs]
        everything = np.arange(len(correlations.xx))
        return least_squares(correlations, everything, prior, ridge=ridge, intercept=intercept)[:2]

    return fit


def refitted(model, batches, sites, kept, *, passes=1, rows=ALL_ROWS, seed=0, **options):
    """New values, and the plan that they belong to."""
    graph = graph_of(model, batches[0]) if len(batches) == 1 else trace(model, batches[0])
    layers = {layer.name: layer for layer in find_layers(graph, model).values()}
    cuts = cuts_of(dict(zip(sites, kept, strict=True)), layers)
    fit = options.pop("fit", nearly(model, cuts))
    sampling = Sampling(rows_per_input=rows, passes=passes, seed=seed)
    given = {"values": {}, "progress": False, **options}
    values = lockstep.refit(graph, model, batches, cuts, fit, sampling=sampling, **given)
    pairs = [(site, keep) for site, keep in zip(sites, kept, strict=True) if len(keep) < site.channels]
    steps = tuple(Collapse(site, np.asarray(keep)) for site, keep in pairs)
    return values, Plan(steps, {name: value.numpy() for name, value in values.items()})


def output(model, batch):
    with evaluating(model):
        return forward(model, batch)


def error(a, b):
    """Squared error as a share of what is there."""
    return ((a - b).square().sum() / a.square().sum()).item()


def free_sites(model, batch):
    return [site for site in sites_of(label_channels(model, graph_of(model, batch))) if site.pinned is None]


def graph_of(model, batch, last=[]):  # noqa: B006
    """The graph, which takes most of the time, of the last network is at hand."""
    if not (last and last[0] is model and last[1] is batch):
        last[:] = [model, batch, trace(model, batch, free_sizes=False)]
    return last[2]


def chain(dtype=torch.float32, bias=True):
    """Three Linear layers with ReLU between them."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7, bias=bias), nn.ReLU(), nn.Linear(7, 4))
    return nn.Sequential(*layers).to(dtype), vectors(60, 5).to(dtype)


def convolutional(seed=0):
    """A chain of convolutions with a batch norm of gains of either sign, and a ReLU behind it."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    conv = nn.Conv2d(5, 6, 3, padding=1, bias=False)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), conv, norm, nn.ReLU(), nn.Conv2d(6, 2, 3, stride=2)
    ).eval(), images(size=10, n=8)


# --- what follows a layer


def test_what_layers_meet_is_found():
    model, batch = network("residual")
    graph = trace(model, batch, free_sizes=False)
    layers = {layer.name: layer for layer in find_layers(graph, model).values()}
    assert set(layers) == {"stem", "conv1", "conv2", "fc"}
    stem, conv1, conv2, fc = layers["stem"], layers["conv1"], layers["conv2"], layers["fc"]
    assert stem.norm is not None
    assert stem.mean == "bn.running_mean"
    assert [layer.flat for layer in (stem, conv1, conv2, fc)] == [(0, inf), (0, inf), (0, inf), None]
    assert [layer.shortcut is None for layer in (stem, conv1, conv2, fc)] == [True, True, False, True]
    assert "relu" in conv2.shortcut.name


def layer_of(name, run, batch, **layers):
    model = Net(run, **layers).eval()
    return next(
        layer
        for layer in find_layers(trace(model, batch, free_sizes=False), model).values()
        if layer.name == name
    )


@pytest.mark.parametrize(
    ("run", "shortcut", "flat"),
    [
        (lambda net, x: relu(net.conv(x)), False, (0, inf)),
        (lambda net, x: relu(max_pool2d(net.conv(x), 2)), False, (0, inf)),
        (lambda net, x: relu(net.drop(net.conv(x))), False, (0, inf)),
        (lambda net, x: relu(x + net.conv(x)), True, (0, inf)),
        (lambda net, x: nn.functional.relu6(max_pool2d(net.conv(x), 2)), False, (0, 6)),
        (lambda net, x: nn.functional.hardtanh(net.conv(x)), False, (-1, 1)),
        (lambda net, x: nn.functional.hardswish(net.conv(x)), False, (-3, inf)),
        (lambda net, x: x * nn.functional.hardsigmoid(net.conv(x)), False, (-3, 3)),
        (lambda net, x: net.conv(x).add_(x), True, None),
        (lambda net, x: torch.add(x, net.conv(x), alpha=2), False, None),
        (lambda net, x: net.conv(x) + 1, False, None),
        (lambda net, x: 2 * net.conv(x) + x, False, None),
        (lambda net, x: (lambda y: y + y)(net.conv(x)), False, None),
        (lambda net, x: (lambda y: relu(y) + y)(net.conv(x)), False, None),
        (lambda net, x: torch.sigmoid(net.conv(x)), False, None),
        (lambda net, x: relu(nn.functional.avg_pool2d(net.conv(x), 2)), False, None),
    ],
)
def test_shortcuts_and_flat_operators_are_found_where_nothing_else_lies_between(run, shortcut, flat):
    layer = layer_of("conv", run, images(), conv=nn.Conv2d(3, 3, 3, padding=1), drop=nn.Dropout())
    assert (layer.shortcut is not None, layer.flat) == (shortcut, flat)


def test_a_batch_norm_over_positions_is_no_norm_of_the_channels():
    layer = layer_of(
        "fc", lambda net, x: net.norm(net.fc(x)), vectors(4, 6, 5), fc=nn.Linear(5, 6), norm=nn.BatchNorm1d(6)
    )
    assert layer.norm is None
    assert layer.mean is None


def test_a_batch_norm_that_two_layers_share_holds_the_bias_of_neither():
    def run(net, x):
        return net.norm(net.b(relu(net.norm(net.a(x)))))

    a, b = nn.Linear(5, 6, bias=False), nn.Linear(6, 6, bias=False)
    layer = layer_of("b", run, vectors(4, 5), a=a, b=b, norm=nn.BatchNorm1d(6))
    assert layer.norm is not None
    assert layer.mean is None
    assert not layer.takes_bias


def test_only_calls_of_layers_are_found():
    model, batch = network("shared_layer")
    found = find_layers(trace(model, batch, free_sizes=False), model)
    assert [layer.calls for layer in found.values() if layer.name == "twice"] == [2, 2]

    def run(net, x):
        return nn.functional.linear(net.c(x @ net.a.weight), net.b.weight)

    model = Net(run, a=nn.Linear(6, 5), b=nn.Linear(6, 3), c=nn.Linear(6, 6))
    found = find_layers(trace(model, vectors(4, 5), free_sizes=False), model)
    assert [layer.name for layer in found.values()] == ["c"]


def test_a_layer_of_two_names_goes_by_the_first():
    layer = nn.Linear(4, 4)
    model = Net(lambda net, x: net.second(x), first=layer, second=layer)
    (found,) = find_layers(trace(model, vectors(3, 4), free_sizes=False), model).values()
    assert found.name == "first"


@pytest.mark.parametrize("bias", [True, False])
def test_new_values_of_a_layer_hold_what_was_fitted_and_nothing_of_inputs_that_go(bias):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 5, 2, bias=bias)
    model = Net(lambda net, x: net.conv(x), conv=module)
    cut = Kept(np.array([0, 2, 3]), np.array([1, 4]))
    M, b = np.random.default_rng(0).standard_normal((2, 12)), np.array([3.0, -4.0])
    values = layer_values(model.state_dict(), Layer("conv", module), cut, M, b)
    weight = values["conv.weight"].double().numpy()
    np.testing.assert_allclose(weight[[1, 4]][:, [0, 2, 3]].reshape(2, 12), M, rtol=1e-6)
    assert not weight[[1, 4]][:, 1].any()
    # Outputs that go are zero: norms would count them.
    assert not weight[[0, 2, 3]].any()
    np.testing.assert_allclose(values["conv.bias"].numpy(), [0.0, 3.0, 0.0, 0.0, -4.0])


def test_a_bias_that_a_batch_norm_takes_moves_its_mean():
    module, norm = nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)
    norm.running_mean.fill_(1.0)
    model = Net(lambda net, x: net.norm(net.fc(x)), fc=module, norm=norm)
    layer = Layer("fc", module, mean="norm.running_mean")
    values = layer_values(model.state_dict(), layer, None, np.zeros((2, 3)), np.array([0.5, -2.0]))
    assert set(values) == {"fc.weight", "norm.running_mean"}
    assert values["norm.running_mean"].tolist() == [0.5, 3.0]
    assert norm.running_mean.tolist() == [1.0, 1.0]


# --- exactness


@pytest.mark.parametrize("name", ["residual", "attention", "in_place", "keywords"])
def test_nothing_is_refitted_when_nothing_goes(name):
    model, batch = network(name)
    sites = free_sites(model, batch)
    values, plan = refitted(model, [batch], sites, [np.arange(site.channels) for site in sites])
    assert values == {}
    assert plan.steps == ()


def twin(model, site):
    """Make the second half of a site's channels copies of the first; the channels that are enough."""
    half = -(-site.channels // 2)
    copies = np.arange(half, site.channels)
    for name in dict.fromkeys((*site.writers, *site.passed)):
        layer = model.get_submodule(name)
        turned = isinstance(layer, nn.Embedding | nn.ConvTranspose2d)
        for leaf, tensor in layer.state_dict().items():
            if tensor.ndim:
                rows = tensor.transpose(0, 1) if turned and leaf == "weight" else tensor
                table = torch.as_tensor(site.rows_of(name, len(rows)))
                rows[table[copies].ravel()] = rows[table[copies - half].ravel()].clone()
    return np.arange(half)


TWINNED = [
    *("residual", "two_residuals", "projection_shortcut", "padded_shortcut_in_code", "depthwise", "grouped"),
    *("transposed", "dilated", "concat", "chunked_swiglu", "flattened_by_view", "upsampled", "instance_norm"),
    *("norm_without_affine", "squeeze_and_excite", "attention", "grouped_queries", "multihead_attention"),
    *("embedding_stream", "conv3d", "in_place", "dead_end", "keywords"),
]


def many(batch, n=4, seed=0):
    """More samples like those of a batch."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(batch, dict):
        return {key: many(value, n, seed) for key, value in batch.items()}
    shape = (n * len(batch), *batch.shape[1:])
    if batch.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 10, shape, generator=generator)


@pytest.mark.parametrize("name", TWINNED)
def test_channels_that_others_equal_can_go_without_any_loss(name):
    model, batch = network(name)
    batch, sites = many(batch), free_sites(model, batch)
    kept = [twin(model, site) for site in sites]
    assert sites
    _, plan = refitted(model, [batch], sites, kept)
    wanted = torch.utils._pytree.tree_leaves(output(model, batch))
    got = torch.utils._pytree.tree_leaves(output(apply(model, plan, probe=batch), batch))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 50), st.booleans())
@settings(max_examples=10)
def test_on_a_chain_every_layer_is_the_best_for_its_compressed_inputs(seed, convolve):
    model, batch = convolutional(seed) if convolve else chain()
    sites = free_sites(model, batch)
    rng = np.random.default_rng(seed)
    kept = [np.sort(rng.permutation(site.channels)[: site.channels // 2]) for site in sites]
    values, plan = refitted(model, [batch], sites, kept, passes=0)
    # What a layer reads depends on the layers before it alone, so all may be in place.
    found = gather(masked(model, plan), [batch], sites, target_model=model, progress=False)
    for site, keep in zip(sites, kept, strict=True):
        (name,) = site.readers
        module, own = model.get_submodule(name), found[name].centered()
        columns = group_columns(site.columns_of(name, channels(module)[0])[keep].ravel(), taps(module))
        R, C = own.r_xx[np.ix_(columns, columns)], own.r_yx[:, columns]
        outputs = next((k for s, k in zip(sites, kept, strict=True) if name in s.writers), slice(None))
        best = np.linalg.lstsq(R, C.T, rcond=1e-9)[0].T[outputs]
        M = values[f"{name}.weight"].flatten(1).double().numpy()[:, columns][outputs]
        fresh, reached = (0.5 * np.vdot(w @ R, w) - np.vdot(C[outputs], w) for w in (best, M))
        assert reached == pytest.approx(fresh, rel=1e-4)


def residual_of_lines(convolve, seed=0):
    """Two branches without nonlinearities, the first of which is too narrow after its cut."""
    torch.manual_seed(seed)

    def run(net, x):
        x = net.stem(x)
        x = x + net.n1(net.b1(net.a1(x)))
        return x + net.n2(net.b2(net.a2(x)))

    def layer(i, o):
        return nn.Conv2d(i, o, 1) if convolve else nn.Linear(i, o)

    def norm():
        made = nn.BatchNorm2d(6) if convolve else nn.BatchNorm1d(6)
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2.0)
        made.weight.data = torch.randn(6) + torch.randn(6).sign()
        made.bias.data.normal_()
        return made

    layers = {"stem": layer(4, 6), "a1": layer(6, 5), "b1": layer(5, 6), "a2": layer(6, 8), "b2": layer(8, 6)}
    x = images(channels=4, size=4, n=12) if convolve else vectors(60, 4)
    return Net(run, **layers, n1=norm(), n2=norm()).eval(), x


@pytest.mark.parametrize("convolve", [False, True])
def test_a_branch_repairs_what_its_shortcut_has_lost(convolve, monkeypatch):
    model, batch = residual_of_lines(convolve)
    site = next(site for site in free_sites(model, batch) if site.writers == ("a1",))
    exact = output(model, batch)
    _, repaired = refitted(model, [batch], [site], [np.arange(2)])
    # The second branch can represent all that the first one lost.
    assert error(exact, output(apply(model, repaired), batch)) < 1e-6
    monkeypatch.setattr(layer_refit.Task, "shortcut", None)
    _, plain = refitted(model, [batch], [site], [np.arange(2)])
    assert error(exact, output(apply(model, plain), batch)) > 1e-3


def test_repairing_a_stream_of_nonlinear_branches_pays(monkeypatch):
    def run(net, x):
        x = net.stem(x)
        for branch in net.branches:
            x = x + branch(x)
        return x

    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3))
        model, batch = Net(run, stem=nn.Linear(6, 6), branches=branches), vectors(200, 6)
        sites = free_sites(model, batch)
        exact = output(model, batch)
        for repair in (True, False):
            with monkeypatch.context() as patch:
                if not repair:
                    patch.setattr(layer_refit.Task, "shortcut", None)
                _, plan = refitted(model, [batch], sites, [np.arange(4) for _ in sites])
            errors.append(error(exact, output(apply(model, plan), batch)))
    assert np.all(np.less(errors[::2], errors[1::2])), errors


@pytest.mark.parametrize("convolve", [False, True])
def test_a_channel_that_its_norm_silences_breaks_nothing(convolve, monkeypatch):
    model, batch = residual_of_lines(convolve)
    model.n2.weight.data[2] = 0.0
    model.n2.weight.data[3] = 1e-30
    sites = free_sites(model, batch)
    values, plan = refitted(model, [batch], sites, [np.arange(3) for _ in sites])
    assert all(value.isfinite().all() for value in values.values())
    assert output(apply(model, plan, probe=batch), batch).isfinite().all()
    # Nothing that it does could make up for what the shortcut lost.
    monkeypatch.setattr(layer_refit.Task, "shortcut", None)
    plain, _ = refitted(model, [batch], sites, [np.arange(3) for _ in sites])
    torch.testing.assert_close(values["b2.weight"][2:4], plain["b2.weight"][2:4])
    assert (values["b2.weight"][:2] - plain["b2.weight"][:2]).abs().max() > 1e-2


def test_a_layer_that_reads_nothing_new_makes_up_for_its_shortcut_too():
    torch.manual_seed(0)

    def run(net, x):
        lost = net.b(net.a(x))
        return lost + net.side(x)

    model = Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3), side=nn.Linear(4, 3))
    batch = vectors(30, 4)
    (site,) = free_sites(model, batch)
    _, plan = refitted(model, [batch], [site], [np.arange(2)])
    torch.testing.assert_close(output(apply(model, plan), batch), output(model, batch))


# --- targets that a ReLU leaves free


def rectified(seed, *, norm, shortcut, convolve, after=relu):
    """A layer that loses inputs, with a ReLU or the like behind it, and what lies between."""
    torch.manual_seed(seed)

    def run(net, x):
        s = net.side(x)
        y = net.b(torch.tanh(net.a(x)))
        y = net.norm(y)
        return after(y + s if shortcut else y)

    def layer(i, o):
        return nn.Conv2d(i, o, 1) if convolve else nn.Linear(i, o)

    between = (nn.BatchNorm2d(5) if convolve else nn.BatchNorm1d(5)) if norm else nn.Identity()
    if norm:
        between.weight.data.normal_()
        between.bias.data.normal_()
        between.running_mean.normal_()
        between.running_var.uniform_(0.5, 2.0)
    x = images(channels=4, size=5, n=12) if convolve else vectors(150, 4)
    return Net(run, a=layer(4, 8), b=layer(8, 5), side=layer(4, 5), norm=between).eval(), x


def before_relu(model, x, shortcut):
    """What the ReLU reads."""
    with evaluating(model):
        y = model.norm(model.b(torch.tanh(model.a(x))))
        return y + model.side(x) if shortcut else y


@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans())
@example(0, False, True, False)
@settings(max_examples=15)
def test_a_pass_for_a_relu_lowers_the_bound_of_the_error_behind_it(seed, norm, shortcut, convolve):
    model, batch = rectified(seed, norm=norm, shortcut=shortcut, convolve=convolve)
    site = next(site for site in free_sites(model, batch) if site.writers == ("a",))
    wanted = before_relu(model, batch, shortcut).double()
    bounds, errors = [], []
    for passes in (0, 1, 2, 5):
        _, plan = refitted(model, [batch], [site], [np.arange(4)], passes=passes)
        got = before_relu(masked(model, plan), batch, shortcut).double()
        # Below zero only the positive part of what is fitted counts; above, all of it.
        off = torch.where(wanted > 0, got - wanted, relu(got))
        bounds.append(off.square().sum().item())
        errors.append((relu(got) - relu(wanted)).square().sum().item())
    assert all(late <= early * (1 + 1e-4) + 1e-8 for early, late in pairwise(bounds))
    assert all(error <= bound * (1 + 1e-9) for error, bound in zip(errors, bounds, strict=True))


@pytest.mark.parametrize(
    ("after", "low", "high"),
    [(nn.functional.relu6, 0, 6), (nn.functional.hardtanh, -1, 1), (nn.functional.hardswish, -3, inf)],
)
@pytest.mark.parametrize("norm", [True, False])
def test_passes_leave_targets_free_wherever_an_operator_is_flat(after, low, high, norm):
    model, batch = rectified(0, norm=norm, shortcut=True, convolve=False, after=after)
    for layer in (model.side, model.norm if norm else model.b):
        # So that many values lie beyond either bound.
        layer.weight.data *= 4
    site = next(site for site in free_sites(model, batch) if site.writers == ("a",))
    wanted, bounds = before_relu(model, batch, True).double(), []
    for passes in (0, 1, 2, 5):
        _, plan = refitted(model, [batch], [site], [np.arange(4)], passes=passes)
        got = before_relu(masked(model, plan), batch, True).double()
        off = torch.where(
            wanted <= low, relu(got - low), torch.where(wanted >= high, relu(high - got), got - wanted)
        )
        bounds.append(off.square().sum().item())
    assert all(late <= early * (1 + 1e-4) + 1e-8 for early, late in pairwise(bounds))
    assert bounds[-1] < 0.99 * bounds[0]


def test_what_a_relu_reads_beside_the_layer_must_be_known_to_free_its_targets():
    model, batch = rectified(0, norm=False, shortcut=True, convolve=False)

    def run(net, x):
        return relu(net.b(torch.tanh(net.a(x))) + net.side(x))

    model.run = run
    site = next(site for site in free_sites(model, batch) if site.writers == ("a",))
    plain, freed = (refitted(model, [batch], [site], [np.arange(4)], passes=passes)[0] for passes in (0, 3))
    assert torch.equal(plain["b.weight"], freed["b.weight"])
    assert not torch.equal(plain["side.weight"], freed["side.weight"])


def test_without_inputs_that_went_a_relu_changes_nothing():
    model, batch = rectified(0, norm=True, shortcut=True, convolve=False)
    values, _ = refitted(model, [batch], [], [])
    assert values == {}


# --- biases, shared layers, sampling


@pytest.mark.parametrize("may", [True, False])
def test_a_layer_without_a_bias_is_given_one_only_if_it_may_have_one(may):
    model, batch = chain(bias=False)
    sites = free_sites(model, batch)
    kept = [np.arange(site.channels // 2) for site in sites]
    values, plan = refitted(model, [batch], sites, kept, new_biases={"2"} if may else ())
    assert ("2.bias" in values) == may
    smaller = apply(model, plan, probe=batch)
    assert (smaller[2].bias is not None) == may


def test_a_new_bias_is_in_place_before_the_next_layer_is_fitted():
    model, batch = chain(bias=False)
    sites = free_sites(model, batch)
    values, plan = refitted(model, [batch], sites, [np.arange(4), np.arange(4)], passes=0, new_biases={"2"})
    assert values["2.bias"].abs().max() > 1e-2
    found = gather(masked(model, plan), [batch], layers=["4"], target_model=model, progress=False)["4"]
    M, b = (values[f"4.{leaf}"].double().numpy() for leaf in ("weight", "bias"))
    # On the inputs that it really has the mean error is zero.
    np.testing.assert_allclose((found.y_sum - M @ found.x_sum) / found.count, b, atol=1e-5)


def test_a_batch_norm_takes_the_bias_and_no_parameter_is_added():
    model, batch = convolutional()
    sites = free_sites(model, batch)
    values, plan = refitted(model, [batch], sites, [np.arange(3) for _ in sites])
    assert set(values) <= set(model.state_dict())
    assert "3.running_mean" in values
    keep = next(np.arange(3) for site in sites if "2" in site.writers)
    assert not torch.equal(values["3.running_mean"][keep], model[3].running_mean[keep])
    apply(model, plan, probe=batch)


def test_layers_that_run_several_times_take_the_values_they_are_given():
    model, batch = network("shared_layer")
    batch, sites = many(batch, 16), free_sites(model, batch)
    kept = [np.arange(site.channels - 1) for site in sites]
    (site,) = (site for site in sites if "twice" in site.readers)
    given = {"twice.weight": model.twice.weight.detach() * 1.5}
    given["twice.weight"][:, site.columns_of("twice", 6)[-1]] = 0.0
    values, plan = refitted(model, [batch], sites, kept, values=given)
    assert torch.equal(values["twice.weight"], given["twice.weight"])
    assert "out.weight" in values
    assert given.keys() == {"twice.weight"}
    # What follows is fitted on what the given values make.
    found = gather(masked(model, plan), [batch], layers=["out"], target_model=model, progress=False)["out"]
    (cut,) = (keep for site, keep in zip(sites, kept, strict=True) if "out" in site.readers)
    M, b = (values[f"out.{leaf}"].double().numpy() for leaf in ("weight", "bias"))
    left = found.yx[:, cut] - M[:, cut] @ found.xx[np.ix_(cut, cut)] - np.outer(b, found.x_sum[cut])
    assert np.abs(left).max() < 1e-3 * np.abs(found.yx).max()


def test_double_precision_stays_double():
    model, batch = chain(torch.float64)
    sites = free_sites(model, batch)
    kept = [twin(model, site) for site in sites]
    values, plan = refitted(model, [batch], sites, kept)
    assert {value.dtype for value in values.values()} == {torch.float64}
    assert error(output(model, batch), output(apply(model, plan, probe=batch), batch)) < 1e-17


@pytest.mark.parametrize("convolve", [False, True])
def test_a_sample_of_rows_is_that_of_the_seed(convolve):
    model, batch = convolutional() if convolve else chain()
    sites = free_sites(model, batch)
    kept = [np.arange(site.channels // 2) for site in sites]
    first, again, other = (refitted(model, [batch], sites, kept, rows=3, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    whole, same = (refitted(model, [batch], sites, kept, seed=seed)[0] for seed in (0, 1))
    assert all(torch.equal(whole[name], same[name]) for name in whole)


def test_batches_of_different_sizes_count_by_their_samples():
    model, batch = chain()
    sites = free_sites(model, batch)
    kept = [np.arange(site.channels // 2) for site in sites]
    whole, _ = refitted(model, [batch], sites, kept)
    parts, _ = refitted(model, [batch[:7], batch[7:50], batch[50:]], sites, kept)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_is_not_of_zeros_is_not_padded_twice(mode):
    torch.manual_seed(0)
    first, second = (nn.Conv2d(i, o, 3, padding=1, padding_mode=mode) for i, o in ((3, 6), (6, 2)))
    model, batch = nn.Sequential(first, nn.ReLU(), second), images(n=6)
    (site,) = free_sites(model, batch)
    kept = [twin(model, site)]
    _, plan = refitted(model, [batch], [site], kept)
    torch.testing.assert_close(
        output(apply(model, plan, probe=batch), batch), output(model, batch), rtol=1e-3, atol=1e-3
    )


def test_what_follows_the_last_layer_does_not_run(monkeypatch):
    model, x = (
        Net(lambda net, x: net.b(net.a(x).relu()).softmax(-1), a=nn.Linear(5, 8), b=nn.Linear(8, 4)),
        vectors(20, 5),
    )
    ran = []
    run = lockstep.Walk._run
    monkeypatch.setattr(
        lockstep.Walk,
        "_run",
        lambda walk, node, *given: ran.append(str(node.target)) or run(walk, node, *given),
    )
    refitted(model, [x], [], [], always=["a", "b"])
    assert not any("softmax" in target for target in ran)
    assert sum("linear" in target for target in ran) == 3


@pytest.mark.parametrize("cut", [False, True])
def test_logits_are_not_made_and_change_nothing(cut, monkeypatch):
    """A head of more outputs than inputs is refitted to what it reads."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 40)).double(), vectors(60, 5).double()
    sites = free_sites(model, x) if cut else []
    kept = [np.arange(5) for _ in sites]
    run, found, ran = lockstep.Walk._run, [], []

    def noted(walk, node, *given):
        ran.append(str(node.target))
        return run(walk, node, *given)

    monkeypatch.setattr(lockstep.Walk, "_run", noted)
    for made in (False, True):
        if made:
            monkeypatch.setattr(lockstep, "unread", lambda graph: set())
        new, _ = refitted(model, [x], sites, kept, always=["2"])
        found.append(new)
    assert ran.count("aten.linear.default") == 1 + 2
    assert found[0].keys() == found[1].keys() >= {"2.weight"}
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_correlations_from_inputs_of_both_are_those_with_the_outputs(touched, bias, monkeypatch):
    model, x = chain(torch.float64, bias)
    found = []

    def noted(name, correlations, intercept):
        found.append(correlations)
        return nearly(model, {})(name, correlations, intercept)

    values = new_first_layer(model) if touched else {}
    for crossed in (True, False):
        monkeypatch.setattr(layer_refit, "_is_cheaper_crossed", lambda task, crossed=crossed: crossed)
        refitted(model, [x], [], [], fit=noted, values=values, only=["2"], always=["2"], passes=0)
    one, other = found
    assert one.count == other.count
    for part in ("xx", "yx", "x_sum", "y_sum", "energy"):
        np.testing.assert_allclose(getattr(one, part), getattr(other, part), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("together", [1, 100])
def test_rows_that_are_no_numbers_any_more_count_in_no_fit(together, monkeypatch):
    """``together``: outputs of the layers that read these rows, few or many."""
    model, (batch, *_) = divided()
    sites, told = free_sites(model, batch), []
    (site,) = (one for one in sites if one.writers == ("a",))
    monkeypatch.setattr(layer_refit, "_is_cheaper_crossed", lambda task: together > 1)
    kept = np.array([13, 14])
    values, plan = refitted(model, [batch], [site], [kept], told=lambda *found: told.append(found))
    with torch.no_grad():
        inner = model.a(batch)[:, kept].relu().any(1)
    assert 0 < inner.sum() < len(batch)
    assert [name for name, _ in told] == ["mid", "out"]
    assert operator_name(told[0][1]) == "div"
    assert all(bool(value.isfinite().all()) for value in values.values())
    smaller = apply(model, plan)
    assert torch.equal(smaller(batch).isfinite().all(1), inner)
    assert error(smaller(batch)[inner], model(batch)[inner]) < 0.1


def test_the_original_is_left_alone():
    model, batch = network("residual")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = free_sites(model, batch)
    refitted(model, [batch], sites, [np.arange(site.channels // 2) for site in sites])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- which layers are fitted


def counting(model, seen):
    fit = nearly(model, {})

    def noted(name, correlations, intercept):
        seen.append(name)
        return fit(name, correlations, intercept)

    return noted


def new_first_layer(model):
    with torch.no_grad():
        return {"0.weight": model[0].weight * 1.5}


@pytest.mark.parametrize(
    ("options", "fitted"),
    [
        ({}, []),
        ({"always": ["2"]}, ["2", "4"]),
        ({"always": ["0", "2", "4"]}, ["0", "2", "4"]),
        ({"always": ["2"], "only": ["2"]}, ["2"]),
        ({"always": ["2"], "only": ["0", "2"]}, ["2"]),
        ({"always": ["0", "2"], "only": ["0", "4"]}, ["0", "4"]),
        ({"always": ["4"]}, ["4"]),
    ],
)
def test_layers_are_fitted_always_or_where_their_inputs_change_and_none_but_those_allowed(options, fitted):
    model, x = chain()
    seen = []

    def change(name, correlations, intercept):
        seen.append(name)
        return matrix(model.get_submodule(name)).double().numpy() * 0.5, model.get_submodule(
            name
        ).bias.detach().double().numpy()

    values, _ = refitted(model, [x], [], [], fit=change, passes=0, **options)
    assert seen == fitted
    assert values.keys() == {f"{name}.{part}" for name in fitted for part in ("weight", "bias")}


def test_layers_that_may_not_be_fitted_still_pass_on_what_changed():
    model, x = chain()
    seen = []
    values = new_first_layer(model)
    kept, _ = refitted(model, [x], [], [], fit=counting(model, seen), values=values, only=["4"], passes=0)
    assert seen == ["4"]
    assert "2.weight" not in kept
    changed = apply(model, Plan(values={name: value.numpy() for name, value in kept.items()}))
    alone = apply(model, Plan(values={"0.weight": values["0.weight"].numpy()}))
    assert error(output(model, x), output(changed, x)) < 0.5 * error(output(model, x), output(alone, x))


def test_a_layer_that_is_always_fitted_to_its_own_outputs_stays_as_it_is():
    model, x = chain(torch.float64)
    values, _ = refitted(model, [x], [], [], always=["0", "2", "4"])
    for name, value in values.items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_a_layer_may_read_a_parameter_instead_of_the_data():
    def run(net, x):
        return net.b(net.a(x).relu()) @ net.c(net.latents).mT

    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 4), "c": nn.Linear(6, 4)}
    model = Net(run, latents=nn.Parameter(vectors(3, 6)), **layers)
    x = vectors(20, 5)
    seen = []
    values, _ = refitted(model, [x], [], [], fit=counting(model, seen), always=["c"])
    assert seen == ["c"]
    torch.testing.assert_close(values["c.weight"] @ model.latents.T, model.c.weight @ model.latents.T)
