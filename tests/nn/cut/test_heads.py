"""The scale of scores in heads of fewer dimensions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from heads import inputs, network

from pysolve.errors import CollapseError
from pysolve.forms import LowRank
from pysolve.nn.cut.apply import apply, masked
from pysolve.nn.graph.sites import find_sites
from pysolve.plan import Collapse, Plan


def dims(**options):
    model, x = network(**options), inputs(4)
    return model, next(site for site in find_sites(model, x, head_dims=True) if site.attention)


@pytest.mark.parametrize("scale", ["held", "sizes"])
def test_queries_are_multiplied_and_nothing_else_of_theirs(scale):
    model, site = dims(scale=scale)
    smaller, own = apply(model, Plan((Collapse(site, np.array([0, 2])),)))[1].attend, model[1].attend
    kept = np.arange(12).reshape(3, 4)[:, [0, 2]].ravel()
    torch.testing.assert_close(smaller.q.weight, own.q.weight[kept] * 0.5**0.5)
    torch.testing.assert_close(smaller.q.bias, own.q.bias[kept] * 0.5**0.5)
    torch.testing.assert_close(smaller.k.weight, own.k.weight[kept], rtol=0, atol=0)


def test_the_masked_network_ignores_the_scores_of_what_goes():
    """With every dimension but one silent, scores are those of that one, at the scale of all."""
    model, site = dims(heads=1)
    wide, x = masked(model, Plan((Collapse(site, np.array([1])),)))[1].attend, torch.randn(2, 5, 8)
    own = model[1].attend
    q, k, v = (layer(x)[..., 1] for layer in (own.q, own.k, own.v))
    weights = (q[:, :, None] * k[:, None] * 4**-0.5).softmax(-1)
    expected = (weights @ v[..., None]) * own.o.weight[:, 1] + own.o.bias
    torch.testing.assert_close(wide(x), expected, rtol=1e-4, atol=1e-5)


def test_an_attribute_that_is_no_scale_is_refused():
    model, site = dims(scale="held")
    (one,) = site.attention
    site = replace(site, attention=(replace(one, scale="1.attend.heads"),))
    with pytest.raises(CollapseError, match=r"1\.attend\.heads is not the scale of scores"):
        apply(model, Plan((Collapse(site, np.arange(2)),)))


def test_queries_take_no_other_form_at_the_same_time():
    model, site = dims()
    form = LowRank(np.ones((6, 1)), np.ones((1, 8)))
    plan = Plan((Collapse(site, np.arange(2)),), forms={"1.attend.q.weight": form})
    with pytest.raises(CollapseError, match="takes no other form in the same plan"):
        apply(model, plan)
