"""What an error at a layer does to the outputs: the Jacobian's square, and nothing of the network changes."""

import copy

import numpy as np
import pytest
import torch
from small import NETWORKS, Net, network, vectors
from torch import nn
from torch.utils.checkpoint import checkpoint

from pysolve.nn import sensitivity
from pysolve.nn.sensitivity import sensitivities


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def named(model, *names):
    return {name: model.get_submodule(name) for name in names}


def scaled(S):
    return S * (len(S) / np.trace(S))


def jacobian_squares(tails, starts):
    """Σ Jᵀ J over samples and positions, of functions from what a layer gives, classes less their mean."""
    total = 0
    for tail, y in zip(tails, starts, strict=True):
        J = torch.func.jacrev(lambda v, tail=tail: tail(v) - tail(v).mean())(y).double()
        J = J.reshape(len(J), y.shape[0], -1)
        total = total + torch.einsum("ohp,okp->hk", J, J)
    return total.detach().numpy()


def exact(monkeypatch):
    """Directions that are the classes in turn, so that nothing is left to chance."""

    def unit(low, high, shape, generator):
        unit.calls += 1
        signs = torch.zeros(*shape[:-1], shape[-1])
        signs[..., (unit.calls - 1) % shape[-1]] = 1
        return (signs + 1) / 2

    unit.calls = 0
    monkeypatch.setattr(sensitivity.torch, "randint", unit)
    monkeypatch.setattr(sensitivity, "PROBES", 3)


def test_of_an_mlp_it_is_the_jacobian_s_square(monkeypatch):
    model, x = mlp(), vectors(5, 4)
    expected = {}
    for name, i in (("0", 1), ("2", 3), ("4", 5)):
        starts = model[:i](x).detach()
        expected[name] = scaled(jacobian_squares([model[i:] if i < 5 else nn.Identity()] * 5, starts))
    exact(monkeypatch)
    found = sensitivities(model, named(model, "0", "2", "4"), [*x.split(1)])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_of_convolutions_it_is_summed_over_positions(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(27, 3)
    ).eval()
    x = vectors(3, 2, 7, 7)
    expected = {}
    for name, i in (("0", 1), ("2", 3)):

        def tail(v, i=i):
            return model[i:](v[None])[0]

        expected[name] = scaled(jacobian_squares([tail] * 3, model[:i](x).detach()))
    exact(monkeypatch)
    found = sensitivities(model, named(model, "0", "2"), [*x.split(1)])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_random_directions_are_right_on_average(monkeypatch):
    model, x = mlp(), vectors(40, 4)
    exact(monkeypatch)
    sure = sensitivities(model, named(model, "2"), [*x.split(1)])["2"]
    monkeypatch.undo()
    monkeypatch.setattr(sensitivity, "PROBES", 400)
    guess = sensitivities(model, named(model, "2"), [x])["2"]
    np.testing.assert_allclose(guess, sure, atol=0.15)
    other = sensitivities(model, named(model, "2"), [x], seed=1)["2"]
    assert not np.array_equal(guess, other)
    np.testing.assert_array_equal(guess, sensitivities(model, named(model, "2"), [x])["2"])


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_has_them_and_none_is_changed(name):
    model, batch = network(name)
    model[0].train() if isinstance(model, nn.Sequential) else model.train()
    layers = {
        one: layer
        for one, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    found = sensitivities(model, layers, [batch, batch])
    if name != "noisy":
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[one]) for one, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert found.keys() == layers.keys()
    for one, S in found.items():
        h = len(layers[one].weight)
        assert S.shape == (h, h)
        assert np.trace(S) == pytest.approx(h)
        np.testing.assert_allclose(S, S.T, atol=1e-12)
        assert np.linalg.eigvalsh(S).min() > -1e-6


def test_an_error_in_a_direction_that_the_outputs_do_not_see_counts_for_nothing():
    model = mlp()
    with torch.no_grad():
        model[4].weight[:, 0] = 0
    S = sensitivities(model, named(model, "2", "4"), [vectors(64, 4)])
    assert np.abs(S["2"][0]).max() < 1e-10
    # No softmax sees what all classes have in common.
    np.testing.assert_allclose(S["4"] @ np.ones(3), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 5), 1), ((6, 5, 7), -1), ((6, 5, 7, 2), 1), ((6,), None)], ids=str
)
def test_classes_lie_where_the_divergence_finds_them(shape, dim):
    v = sensitivity.without_mean(vectors(*shape))
    if dim is None:
        assert torch.equal(v, vectors(*shape))
    else:
        torch.testing.assert_close(v.mean(dim), torch.zeros_like(v.mean(dim)))


def test_layers_without_a_part_in_the_output_count_all_outputs_alike():
    model, x = network("unused_layer")
    found = sensitivities(model, named(model, "a", "c"), [x])
    np.testing.assert_array_equal(found["c"], np.eye(6))
    assert not np.array_equal(found["a"], np.eye(6))
    dead, x = network("dead_end")
    np.testing.assert_array_equal(sensitivities(dead, named(dead, "unread"), [x])["unread"], np.eye(5))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_networks_that_allow_no_gradient_count_all_outputs_alike(mode):
    def run(net, x):
        with mode():
            return net.net(x)

    model = Net(run, net=mlp()).eval()
    found = sensitivities(model, named(model, "net.0", "net.4"), [vectors(5, 4)])
    np.testing.assert_array_equal(found["net.0"], np.eye(6))
    np.testing.assert_array_equal(found["net.4"], np.eye(3))
    model, x = network("in_place")
    np.testing.assert_array_equal(sensitivities(model, named(model, "a"), [x])["a"], np.eye(6))


def test_every_call_of_a_layer_counts(monkeypatch):
    torch.manual_seed(0)
    twice = nn.Linear(5, 5)
    out = nn.Linear(5, 3)
    model = Net(lambda net, x: net.out(torch.tanh(net.twice(torch.tanh(net.twice(x))))), twice=twice, out=out)
    x = vectors(4, 5)
    first = model.twice(x).detach()
    second = model.twice(torch.tanh(first)).detach()

    def behind(v):
        return out(torch.tanh(v))

    def before(v):
        return behind(twice(torch.tanh(v)))

    expected = jacobian_squares([before] * 4, first) + jacobian_squares([behind] * 4, second)
    exact(monkeypatch)
    found = sensitivities(model.eval(), named(model, "twice"), [*x.split(1)])["twice"]
    np.testing.assert_allclose(found, scaled(expected), atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_in_place_layers_and_frozen_parameters_do_not_matter(frozen):
    def build(inplace):
        torch.manual_seed(0)
        relu = nn.ReLU(inplace)
        model = nn.Sequential(nn.Linear(4, 6), relu, nn.Linear(6, 5), relu, nn.Linear(5, 3)).eval()
        return model.requires_grad_(not (frozen and inplace))

    x = vectors(7, 4)
    before = x.clone()
    a, b = (sensitivities(m, named(m, "0", "2", "4"), [x]) for m in map(build, (True, False)))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-6)
    assert torch.equal(x, before)


def test_half_precision_and_any_scale_give_finite_numbers():
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float32, 1e-20), (torch.float32, 1e12)):
        model = mlp()
        with torch.no_grad():
            model[4].weight *= size
        model = model.to(dtype)
        found = sensitivities(model, named(model, "0", "2"), [vectors(9, 4).to(dtype)])
        for S in found.values():
            assert np.isfinite(S).all()
            assert np.trace(S) == pytest.approx(len(S))
            assert np.abs(S - np.eye(len(S))).max() > 0.1


def test_batches_count_by_their_samples():
    model, x = mlp(), vectors(60, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "PROBES", 200)
        one = sensitivities(model, named(model, "2"), [x])["2"]
        several = sensitivities(model, named(model, "2"), [*x.split(7)])["2"]
    np.testing.assert_allclose(one, several, atol=0.15)


def test_no_batches_count_all_outputs_alike():
    model = mlp()
    np.testing.assert_array_equal(sensitivities(model, named(model, "0"), [])["0"], np.eye(6))


def test_outputs_in_structures_are_followed():
    model, batch = network("keywords")
    found = sensitivities(model, named(model, "fc1"), [batch])
    assert not np.array_equal(found["fc1"], np.eye(7))


def test_of_no_layers_there_are_none():
    assert sensitivities(mlp(), {}, [torch.randn(3, 4)]) == {}


def test_code_that_runs_again_for_the_gradient_counts_once():
    model, x = mlp(), vectors(12, 4)
    plain = sensitivities(model, named(model, "0", "2", "4"), [*x.split(4)])
    run = model.forward
    model.forward = lambda x: checkpoint(run, x, use_reentrant=False)
    again = sensitivities(model, named(model, "0", "2", "4"), [*x.split(4)])
    for name in plain:
        np.testing.assert_allclose(again[name], plain[name], rtol=1e-6)
