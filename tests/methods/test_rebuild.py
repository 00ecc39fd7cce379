"""Cuts say what stays of every layer, and readers refitted alone lose nothing that the kept inputs hold."""

from functools import cache

import numpy as np
import pytest
import torch
from small import Net, network, vectors
from torch import nn
from torch.nn.functional import relu

from pysolve.correlations import group_columns
from pysolve.methods.goal import Options
from pysolve.methods.menu import Chosen
from pysolve.methods.rebuild import independent
from pysolve.methods.study import Study
from pysolve.methods.tasks import cuts_of
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.divergence import run
from pysolve.nn.gathering.calibration import Calibration
from pysolve.nn.gathering.gather import gather
from pysolve.nn.graph.branches import Layer
from pysolve.nn.graph.sites import find_sites
from pysolve.nn.layer_matrix import LAYERS, channels, matrix, taps
from pysolve.nn.running import find_layer
from pysolve.plan import Collapse, Plan, Site
from pysolve.solve.least_squares import refit


@cache
def studied(name):
    """A network, a batch, its free sites and their layers."""
    model, batch = network(name)
    sites = [site for site in find_sites(model, batch) if site.pinned is None]
    names = dict.fromkeys(name for site in sites for name in (*site.readers, *site.writers))
    found = {name: find_layer(model, name) for name in names}
    return model, batch, sites, {n: Layer(n, m) for n, m in found.items() if isinstance(m, LAYERS)}


def some(sites, seed=0):
    rng = np.random.default_rng(seed)
    return {site: np.sort(rng.permutation(site.channels)[: -(-site.channels // 2)]) for site in sites}


def whole(sites):
    return {site: np.arange(site.channels) for site in sites}


def rebuilt(model, layers, found, keep):
    """Readers refitted on correlations, each by itself."""
    known = Study(model, Options(), layers=layers, correlations=found, calibration=Calibration(0))
    return independent(known, Chosen(keep))


NAMES = [
    "residual",
    "concat",
    "flattened_by_view",
    "transposed",
    "grouped_queries",
    "embedding_stream",
    "conv3d",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_is_what_surgery_leaves_of_a_layer(name):
    model, _, sites, layers = studied(name)
    kept = some(sites)
    steps = tuple(Collapse(site, keep) for site, keep in kept.items())
    smaller = apply(model, Plan(steps))
    cuts = cuts_of(kept, layers)
    assert set(cuts) == set(layers)
    for layer, cut in cuts.items():
        module, left = model.get_submodule(layer), smaller.get_submodule(layer)
        assert channels(left) == (len(cut.inputs), len(cut.outputs))
        rows, columns = torch.as_tensor(cut.outputs), torch.as_tensor(group_columns(cut.inputs, taps(module)))
        assert torch.equal(matrix(left), matrix(module)[rows][:, columns])


def test_whole_sites_cut_nothing():
    _, _, sites, layers = studied("residual")
    cuts = cuts_of(whole(sites), layers)
    for name, cut in cuts.items():
        inputs, outputs = channels(layers[name].module)
        np.testing.assert_array_equal(cut.inputs, np.arange(inputs))
        np.testing.assert_array_equal(cut.outputs, np.arange(outputs))


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_that_loses_inputs_is_refitted_on_the_rest(name):
    model, batch, sites, layers = studied(name)
    kept = some(sites)
    found = gather(model, [batch], sites, progress=False)
    fits = rebuilt(model, layers, found, kept).fits
    cuts = cuts_of(kept, layers)
    assert set(fits) == {reader for site in sites for reader in site.readers}
    for reader, fit in fits.items():
        module = layers[reader].module
        columns = group_columns(cuts[reader].inputs, taps(module))
        prior = matrix(module).double().numpy()[:, columns]
        wanted, own, _ = refit(found[reader], columns, prior, intercept=module.bias is not None)
        # BLAS rounds products of fewer rows otherwise.
        np.testing.assert_allclose(fit.weight, wanted[cuts[reader].outputs], rtol=1e-12, atol=1e-14)
        assert (fit.bias is None) == (own is None) == (module.bias is None)


def test_readers_that_keep_all_inputs_are_left_alone():
    model, batch, sites, layers = studied("residual")
    found = gather(model, [batch], sites, progress=False)
    assert rebuilt(model, layers, found, whole(sites)).fits == {}
    kept = {site: np.arange(site.channels - (site.writers == ("conv1",))) for site in sites}
    assert set(rebuilt(model, layers, found, kept).fits) == {"conv2"}


@pytest.mark.parametrize("name", NAMES)
def test_new_values_are_those_of_the_smaller_network(name):
    model, batch, sites, layers = studied(name)
    kept = some(sites)
    values = rebuilt(model, layers, gather(model, [batch], sites, progress=False), kept).values
    steps = tuple(Collapse(site, keep) for site, keep in kept.items())
    plan = Plan(steps, {key: value.numpy() for key, value in values.items()})
    (wide,) = run(model, [batch], values)
    # Inputs that go have no weight left, so the network of the same width computes what the smaller one does.
    for other in (masked(model, plan), apply(model, plan)):
        (output,) = run(other, [batch])
        torch.testing.assert_close(output, wide, rtol=1e-4, atol=1e-5)


def test_inputs_that_others_compensate_cost_nothing():
    torch.manual_seed(0)

    def hidden(net, x):
        h = relu(net.a(x))
        return torch.cat([h, h[:, :4] + 2 * h[:, 4:8]], 1)

    model = Net(lambda net, x: net.b(hidden(net, x)), a=nn.Linear(5, 8), b=nn.Linear(12, 3))
    batch, site = vectors(5000, 5), Site(12, ("a",), ("b",))
    layers = {"b": Layer("b", model.b)}
    found = gather(model, [batch], layers=["b"], progress=False)
    values = rebuilt(model, layers, found, {site: np.arange(8)}).values
    assert not values["b.weight"][:, 8:].any()
    (output,), (wanted,) = run(model, [batch], values), run(model, [batch])
    torch.testing.assert_close(output, wanted, rtol=1e-2, atol=1e-3)
